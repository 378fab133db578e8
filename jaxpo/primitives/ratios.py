"""Importance ratios between the policy and the one that is compared with, as clamped log-ratios.

The clamp ``log_ratio_clip`` keeps ``exp`` finite; outside it the gradient is 0. Masked positions are 0 (ratio 1).
"""

import jax.numpy as jnp
from jax import Array

from jaxpo.primitives.numerics import promote, ratio_or_zero


def token_log_ratio(logp: Array, logp_old: Array, mask: Array, *, log_ratio_clip: float = 20.0) -> Array:
    """``clip(logp - logp_old, -C, C)`` [B, T]."""
    difference = jnp.where(mask > 0, promote(logp) - promote(logp_old), 0)
    return jnp.clip(difference, -log_ratio_clip, log_ratio_clip)


def sequence_sum_log_ratio(logp: Array, logp_old: Array, mask: Array, *, log_ratio_clip: float = 20.0) -> Array:
    """``clip(sum_t (logp - logp_old), -C, C)`` [B]: the ratio of whole-completion probabilities."""
    difference = jnp.where(mask > 0, promote(logp) - promote(logp_old), 0)
    return jnp.clip(difference.sum(-1), -log_ratio_clip, log_ratio_clip)


def sequence_mean_log_ratio(logp: Array, logp_old: Array, mask: Array, *, log_ratio_clip: float = 20.0) -> Array:
    """``clip(mean_t (logp - logp_old), -C, C)`` [B]: log of the geometric-mean ratio (GSPO, arXiv:2507.18071)."""
    difference = jnp.where(mask > 0, promote(logp) - promote(logp_old), 0)
    mean = ratio_or_zero(difference.sum(-1), (mask > 0).sum(-1).astype(difference.dtype))
    return jnp.clip(mean, -log_ratio_clip, log_ratio_clip)
