"""Ratios: ``fn(stats, batch) -> log-ratio`` [B, T], or [B] when ``per`` is "row". Their formulas are in
`jaxpo.primitives.ratios`."""

import jax.numpy as jnp
from jax import Array

from jaxpo.arguments import Positive, PositiveOrInfinite
from jaxpo.objectives.grammar.parts import Ratio, reads
from jaxpo.primitives import ratios
from jaxpo.primitives.numerics import clamp
from jaxpo.registry import register


@register("ratio")
def token(log_ratio_clip: PositiveOrInfinite = 20.0) -> Ratio:
    """``exp(clip(logp - logp_old, -C, C))`` per token."""
    kernel = None if isinstance(log_ratio_clip, Array) else lambda batch: dict(log_ratio_clip=log_ratio_clip)
    return Ratio(*reads(ratios.token_log_ratio, log_ratio_clip=log_ratio_clip), kernel=kernel)


@register("ratio")
def sequence_sum(log_ratio_clip: PositiveOrInfinite = 20.0) -> Ratio:
    """``exp(clip(sum_t (logp - logp_old), -C, C))`` per row."""
    return Ratio(*reads(ratios.sequence_sum_log_ratio, log_ratio_clip=log_ratio_clip), per="row")


@register("ratio", id="gspo", source="GSPO, arXiv:2507.18071")
@register("ratio", source="GSPO, arXiv:2507.18071")
def sequence(log_ratio_clip: PositiveOrInfinite = 10.0) -> Ratio:
    """``exp(min(mean_t (logp - logp_old), C))`` per row."""
    return Ratio(*reads(ratios.sequence_mean_log_ratio, log_ratio_clip=log_ratio_clip), per="row")


@register("ratio", source="DYPO, arXiv:2604.08926")
def sequence_mean(log_ratio_clip: PositiveOrInfinite = 20.0) -> Ratio:
    """``exp(clip(mean_t (logp - logp_old), -C, C))`` per row: `sequence`, clamped on both sides."""
    mean, asks = reads(ratios.sequence_mean_log_ratio, log_ratio_clip=jnp.inf)
    return Ratio(lambda stats, b: clamp(mean(stats, b), -log_ratio_clip, log_ratio_clip), asks, per="row")


@register("ratio", id="gspo_token", source="GSPO, arXiv:2507.18071")
@register("ratio", source="GSPO, arXiv:2507.18071")
def sequence_token(log_ratio_clip: PositiveOrInfinite = 10.0) -> Ratio:
    """The row's ``sequence`` ratio at every token, with the gradient of the token's own log-prob."""
    return Ratio(*reads(ratios.sequence_token_log_ratio, log_ratio_clip=log_ratio_clip))


@register("ratio")
def on_policy() -> Ratio:
    """``exp(logp - sg(logp))``: 1, with the gradient of ``logp``, whatever the old policy was."""
    return Ratio(*reads(ratios.own_gradient))


@register("ratio", id="mhpo", source="MHPO, arXiv:2603.16929")
@register("ratio", source="MHPO, arXiv:2603.16929")
def bounded(c: Positive = 1.5) -> Ratio:
    """``exp(c tanh((logp - logp_old) / c))`` per token: within ``exp(±c)``, smooth."""
    return Ratio(*reads(ratios.bounded_log_ratio, c=c))
