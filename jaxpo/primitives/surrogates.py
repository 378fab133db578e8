"""Surrogate losses per token (or per row): their gradient is the policy-gradient step that a paper takes."""

import jax.numpy as jnp
from jax import Array

from jaxpo.primitives.numerics import promote


def log_prob(logp: Array, adv: Array) -> Array:
    """``-A logp`` (REINFORCE, Williams 1992)."""
    return -adv * promote(logp)


def clipped(ratio: Array, adv: Array, low: Array | float, high: Array | float, dual: float | None = None) -> Array:
    """``-min(r A, clip(r, low, high) A)`` (PPO, arXiv:1707.06347, eq. 7), the bounds being ratio values.

    Args:
      ratio, adv: [B, T] or [B]. low, high: scalars or per-token bounds.
      dual: c > 1 bounds the objective of A < 0 below by ``c A`` (dual clip, arXiv:1912.09729); None = off.
    """
    loss = -jnp.minimum(ratio * adv, jnp.clip(ratio, low, high) * adv)
    if dual is not None:
        loss = jnp.where(adv < 0, jnp.minimum(loss, -dual * adv), loss)
    return loss


def is_clipped(ratio: Array, adv: Array, low: Array | float, high: Array | float, dual: float | None = None) -> Array:
    """Bool: the token's gradient is cut by `clipped`."""
    cut = ((adv > 0) & (ratio > high)) | ((adv < 0) & (ratio < low))
    return cut if dual is None else cut | ((adv < 0) & (ratio > dual))
