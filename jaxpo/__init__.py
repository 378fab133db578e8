"""jaxpo: policy optimization of language models in JAX; every objective a pure function."""
__version__ = "0.1.0"

from jaxpo.batch import Demonstrations, Pairs, Rollouts, TokenStats, from_sequences
from jaxpo.objectives import Objective, Protocol, Term, describe, evaluate, from_terms, make, names, policy_gradient, preference, register

__all__ = ["Demonstrations", "Objective", "Pairs", "Protocol", "Rollouts", "Term", "TokenStats", "describe", "evaluate", "from_sequences",
           "from_terms", "make", "names", "policy_gradient", "preference", "register"]
