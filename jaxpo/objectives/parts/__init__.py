"""The parts of the grammar, each registered under its kind: primitives applied to a batch, with what they ask of it."""

from jaxpo.objectives.parts import (
    advantages,
    corrections,
    critics,
    diagnostics,
    filters,
    ratios,
    regularizers,
    shaping,
    surrogates,
)
from jaxpo.objectives.parts.aggregations import aggregation_of

__all__ = [
    "advantages",
    "aggregation_of",
    "corrections",
    "critics",
    "diagnostics",
    "filters",
    "ratios",
    "regularizers",
    "shaping",
    "surrogates",
]
