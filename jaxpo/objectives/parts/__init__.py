"""The parts of the grammar, each registered under its kind: primitives applied to a batch, with what they ask of it."""

from jaxpo.objectives.parts import advantages, batches, preferences, ratios, regularizers, surrogates
from jaxpo.objectives.parts.aggregations import aggregation_of

__all__ = ["advantages", "aggregation_of", "batches", "preferences", "ratios", "regularizers", "surrogates"]
