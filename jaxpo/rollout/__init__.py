"""Sampling from the policy: one jitted function, on the same mesh and with the same numerics as training."""

from jaxpo.rollout.engine import generate
from jaxpo.rollout.sampling import SamplingOptions

__all__ = ["SamplingOptions", "generate"]
