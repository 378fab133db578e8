"""The gap between the sampler and the trainer: weights and rejections from ``logp_old`` (trainer) and ``logp_beh``
(sampler), both constants of the rollout.

With them a loss has three policies: the sampler's (``logp_beh``), the one that ratios are measured from (``logp_old``),
and the current one ("decoupled" PPO, arXiv:2110.00641). ``pi_old / pi_beh`` corrects from the first to the second.
"""

from typing import Literal

import jax.numpy as jnp
from jax import Array, lax

from jaxpo.arguments import choice
from jaxpo.primitives.numerics import promote, ratio_or_zero
from jaxpo.primitives.regularizers import Estimator, kl_estimate

Level = Literal["token", "sequence", "geometric"]
LEVELS = ("token", "sequence", "geometric")


def log_weight(logp_old: Array, logp_beh: Array, mask: Array, level: Level, *, log_ratio_clip: float = 20.0) -> Array:
    """``log(pi_old / pi_beh)``, clamped to ± ``log_ratio_clip``: for each "token" [B, T], or summed ("sequence") or
    averaged ("geometric") over the row [B]."""
    choice("level", level, LEVELS)
    gap = jnp.where(mask > 0, promote(logp_old) - promote(logp_beh), 0)
    if level != "token":
        gap = gap.sum(-1)
    if level == "geometric":
        gap = ratio_or_zero(gap, (mask > 0).sum(-1).astype(gap.dtype))
    return lax.stop_gradient(jnp.clip(gap, -log_ratio_clip, log_ratio_clip))


def truncated(log_w: Array, cap: float) -> Array:
    """``min(w, cap)``: truncated importance sampling; biased, with bounded variance."""
    return jnp.minimum(jnp.exp(log_w), cap)


def masked(log_w: Array, low: float, high: float) -> Array:
    """``w`` inside [low, high] and 0 outside: masked importance sampling."""
    w = jnp.exp(log_w)
    return jnp.where((w >= low) & (w <= high), w, 0)


def kept(
    logp_old: Array,
    logp_beh: Array,
    mask: Array,
    estimator: Estimator,
    level: Level,
    bound: float,
    low: float | None = None,
) -> Array:
    """[B, T] or [B] bool: the divergence between sampler and trainer is at most ``bound`` (and at least ``low``).

    Args:
      estimator: the estimate of the divergence, with ``d = logp_beh - logp_old``, since the sampler drew the tokens.
      level: the estimate of a "token" [B, T], its sum over the row ("sequence") or its mean ("geometric") [B]."""
    choice("level", level, LEVELS)
    gap = jnp.where(mask > 0, kl_estimate(logp_beh, logp_old, estimator), 0)
    if level != "token":
        gap = gap.sum(-1)
    if level == "geometric":
        gap = ratio_or_zero(gap, (mask > 0).sum(-1).astype(gap.dtype))
    ok = gap <= bound
    return lax.stop_gradient(ok if low is None else ok & (gap >= low))
