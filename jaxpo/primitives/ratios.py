"""Importance ratios between the current and an older policy, as clamped log-ratios.

The clamp ``log_ratio_clip`` keeps ``exp`` finite; at it and beyond the gradient is 0 (`numerics.clamp`), that of
everything the ratio is in. Masked positions are 0 (ratio 1).
"""

import jax.numpy as jnp
from jax import Array, lax

from jaxpo.primitives.numerics import clamp, promote, ratio_or_zero


def token_log_ratio(logp: Array, logp_old: Array, mask: Array, *, log_ratio_clip: float = 20.0) -> Array:
    """``clip(logp - logp_old, -C, C)`` [B, T]."""
    difference = jnp.where(mask > 0, promote(logp) - promote(logp_old), 0)
    return clamp(difference, -log_ratio_clip, log_ratio_clip)


def sequence_sum_log_ratio(logp: Array, logp_old: Array, mask: Array, *, log_ratio_clip: float = 20.0) -> Array:
    """``clip(sum_t (logp - logp_old), -C, C)`` [B]: the ratio of whole-completion probabilities."""
    difference = jnp.where(mask > 0, promote(logp) - promote(logp_old), 0)
    return clamp(difference.sum(-1), -log_ratio_clip, log_ratio_clip)


def sequence_mean_log_ratio(logp: Array, logp_old: Array, mask: Array, *, log_ratio_clip: float = 10.0) -> Array:
    """``min(mean_t (logp - logp_old), C)`` [B]: log of the geometric-mean ratio (GSPO, arXiv:2507.18071, eq. 7).

    Only clamped above: rows with A < 0 have no other upper bound, and a very negative log-ratio does no harm.
    """
    difference = jnp.where(mask > 0, promote(logp) - promote(logp_old), 0)
    mean = ratio_or_zero(difference.sum(-1), (mask > 0).sum(-1).astype(difference.dtype))
    return clamp(mean, high=log_ratio_clip)


def sequence_token_log_ratio(logp: Array, logp_old: Array, mask: Array, *, log_ratio_clip: float = 10.0) -> Array:
    """``sg(s_i) + logp - sg(logp)`` [B, T] with ``s_i`` from `sequence_mean_log_ratio`: the value of the row with the
    gradient of the token's own log-prob (GSPO-token, arXiv:2507.18071, eq. 14). At the clamp and beyond the gradient is
    0, as that of the row's ratio is."""
    row = sequence_mean_log_ratio(logp, logp_old, mask, log_ratio_clip=jnp.inf)[:, None]
    inside = row < log_ratio_clip
    return lax.stop_gradient(jnp.minimum(row, log_ratio_clip)) + jnp.where(inside, own_gradient(logp, mask), 0)


def own_gradient(logp: Array, mask: Array) -> Array:
    """``logp - sg(logp)`` [B, T]: the log-ratio to the current policy itself. Its value is 0, its gradient is that of
    ``logp``."""
    logp = jnp.where(mask > 0, promote(logp), 0)
    return logp - lax.stop_gradient(logp)


def bounded_log_ratio(logp: Array, logp_old: Array, mask: Array, *, c: float = 1.5) -> Array:
    """``c tanh((logp - logp_old) / c)`` [B, T]: a smooth bound at ±c (MHPO, arXiv:2603.16929)."""
    return c * jnp.tanh(jnp.where(mask > 0, promote(logp) - promote(logp_old), 0) / c)
