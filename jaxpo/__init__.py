"""jaxpo: policy optimization of language models in JAX; every objective a pure function."""

__version__ = "0.1.0"

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if find_spec("jaxpo.kernels") is None:  # the folder kernels/ gets this name when jaxpo is installed
    raise ModuleNotFoundError(
        "jaxpo is found but not installed: in its checkout, call: pip install --constraint constraints.txt --editable ."
    )

if TYPE_CHECKING:
    from jaxpo.batch import Demonstrations, Pairs, Rollouts, TokenStats, from_sequences
    from jaxpo.objectives import (
        Objective,
        Term,
        describe,
        evaluate,
        from_terms,
        make,
        names,
        policy_gradient,
        preference,
        register,
    )
    from jaxpo.protocols.protocol import Protocol

# Loaded on first use: the processes that run verifiers import jaxpo.tasks and must not pay for, or hold, jax.
_HOME = {
    "jaxpo.batch": ("Demonstrations", "Pairs", "Rollouts", "TokenStats", "from_sequences"),
    "jaxpo.protocols.protocol": ("Protocol",),
    "jaxpo.objectives": (
        "Objective",
        "Term",
        "describe",
        "evaluate",
        "from_terms",
        "make",
        "names",
        "policy_gradient",
        "preference",
        "register",
    ),
}
__all__ = [
    "Demonstrations",
    "Objective",
    "Pairs",
    "Protocol",
    "Rollouts",
    "Term",
    "TokenStats",
    "describe",
    "evaluate",
    "from_sequences",
    "from_terms",
    "make",
    "names",
    "policy_gradient",
    "preference",
    "register",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name == "testing":
        return importlib.import_module("jaxpo.testing")
    for module, exports in _HOME.items():
        if name in exports:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'jaxpo' has no attribute {name!r}")
