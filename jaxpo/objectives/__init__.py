"""Published objectives as short compositions of primitives, in one registry."""

from jaxpo.objectives import (  # noqa: F401 (imported for their registrations)
    answers,
    credit,
    entropy,
    grammar,
    group_relative,
    hybrid,
    nash,
    off_policy,
    parts,
    reward_models,
    trust_region,
)
from jaxpo.objectives import preference as _preference  # noqa: F401 (the function below takes the module's name)
from jaxpo.objectives.base import Objective, Policy, Protocol, State, Term, evaluate, from_terms, linearized
from jaxpo.objectives.composition import Part, policy_gradient
from jaxpo.objectives.units import preference
from jaxpo.registry import describe, make, names, register

__all__ = [
    "Objective",
    "Part",
    "Policy",
    "Protocol",
    "State",
    "Term",
    "describe",
    "evaluate",
    "from_terms",
    "linearized",
    "make",
    "names",
    "policy_gradient",
    "preference",
    "register",
]
