"""Corrections of the gap between sampler and trainer: ``fn(batch, state) ->`` constant factor [B, T] or [B]."""

import jax.numpy as jnp
from jax import Array

from jaxpo.arguments import NonNegative, PositiveOrInfinite, Threshold
from jaxpo.batch import Rollouts
from jaxpo.objectives.grammar.base import State
from jaxpo.objectives.grammar.parts import Correction, reads
from jaxpo.primitives import mismatch
from jaxpo.primitives.numerics import promote
from jaxpo.registry import register


@register("correction", source="arXiv:2110.00641; TIS, Yao et al. 2025")
def truncated_weight(level: mismatch.Level = "token", cap: PositiveOrInfinite = 2.0) -> Correction:
    """``min(pi_old / pi_beh, cap)`` of the token, the whole "sequence", or its "geometric" mean."""
    log_weight, asks = reads(mismatch.log_weight, level=level)
    return Correction(
        lambda b, s: mismatch.truncated(log_weight(b, s), cap), asks, per="token" if level == "token" else "row"
    )


@register("correction", source="arXiv:2510.18855 (IcePop)")
def masked_weight(
    level: mismatch.Level = "token", low: NonNegative = 0.5, high: PositiveOrInfinite = 2.0
) -> Correction:
    """``pi_old / pi_beh`` within [low, high], 0 outside (the tokens stay in the denominator)."""
    log_weight, asks = reads(mismatch.log_weight, level=level)
    return Correction(
        lambda b, s: mismatch.masked(log_weight(b, s), low, high), asks, per="token" if level == "token" else "row"
    )


@register("correction")
def token_rejection(
    estimator: mismatch.Estimator = "k1", bound: Threshold = 0.5, low: Threshold | None = None
) -> Correction:
    """Leave out tokens on which sampler and trainer disagree (they leave the denominator): keep those whose k1, k2 or
    k3 estimate is at most ``bound`` (and at least ``low``)."""
    kept, asks = reads(mismatch.kept, estimator=estimator, level="token", bound=bound, low=low)

    def tokens(b: Rollouts, s: State) -> Array:
        return promote(kept(b, s))

    return Correction(lambda b, s: jnp.ones_like(promote(b.mask)), asks, per="token", tokens=tokens)
