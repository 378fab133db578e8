"""Published objectives as short compositions of primitives, in one registry."""

from jaxpo.objectives import (  # noqa: F401 (imported for their registrations)
    distillation,
    entropy,
    group_relative,
    guidance,
    hybrid,
    nash,
    off_policy,
    parts,
    preference_multi,
    reward_models,
    successes,
    trust_region,
    unified,
    value_baseline,
)
from jaxpo.objectives import preference as _preference  # noqa: F401 (the function below takes the module's name)
from jaxpo.objectives.grammar import strings  # noqa: F401 (imported for its registration)
from jaxpo.objectives.grammar.base import (
    Asks,
    Gathering,
    Hooks,
    Objective,
    Policy,
    State,
    Term,
    Unit,
    asks_of,
    evaluate,
    from_terms,
    linearized,
    role,
)
from jaxpo.objectives.grammar.parts import (
    Advantage,
    Correction,
    Filter,
    Part,
    Ratio,
    Regularizer,
    Shaping,
    Surrogate,
    reads,
)
from jaxpo.objectives.grammar.policy_gradient import policy_gradient
from jaxpo.objectives.grammar.units import preference
from jaxpo.registry import describe, make, names, register

__all__ = [
    "Advantage",
    "Asks",
    "Correction",
    "Filter",
    "Gathering",
    "Hooks",
    "Objective",
    "Part",
    "Policy",
    "Ratio",
    "Regularizer",
    "Shaping",
    "State",
    "Surrogate",
    "Term",
    "Unit",
    "asks_of",
    "describe",
    "evaluate",
    "from_terms",
    "linearized",
    "make",
    "names",
    "policy_gradient",
    "preference",
    "reads",
    "register",
    "role",
]
