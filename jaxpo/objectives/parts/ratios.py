"""Ratios: ``fn(stats, batch) -> log-ratio`` [B, T], or [B] when ``per`` is "row"."""

from jax import Array

from jaxpo.objectives.grammar.parts import Part
from jaxpo.primitives import aggregation, ratios
from jaxpo.registry import register


@register("ratio")
def token(log_ratio_clip: float = 20.0) -> Part:
    """``exp(clip(logp - logp_old, -C, C))`` per token."""
    return Part(
        lambda stats, b: ratios.token_log_ratio(stats.logp, b.logp_old, b.mask, log_ratio_clip=log_ratio_clip),
        kernel=None if isinstance(log_ratio_clip, Array) else lambda b: dict(log_ratio_clip=log_ratio_clip),
    )


@register("ratio")
def sequence_sum(log_ratio_clip: float = 20.0) -> Part:
    """``exp(clip(sum_t (logp - logp_old), -C, C))`` per row."""
    return Part(
        lambda stats, b: ratios.sequence_sum_log_ratio(stats.logp, b.logp_old, b.mask, log_ratio_clip=log_ratio_clip),
        per="row",
    )


@register("ratio", id="gspo", source="GSPO, arXiv:2507.18071")
@register("ratio", source="GSPO, arXiv:2507.18071")
def sequence(log_ratio_clip: float = 10.0) -> Part:
    """``exp(min(mean_t (logp - logp_old), C))`` per row."""
    return Part(
        lambda stats, b: ratios.sequence_mean_log_ratio(stats.logp, b.logp_old, b.mask, log_ratio_clip=log_ratio_clip),
        per="row",
    )


@register("ratio", id="gspo_token", source="GSPO, arXiv:2507.18071")
@register("ratio", source="GSPO, arXiv:2507.18071")
def sequence_token(log_ratio_clip: float = 10.0) -> Part:
    """The row's ``sequence`` ratio at every token, with the gradient of the token's own log-prob."""
    return Part(
        lambda stats, b: ratios.sequence_token_log_ratio(stats.logp, b.logp_old, b.mask, log_ratio_clip=log_ratio_clip)
    )


@register("ratio")
def on_policy() -> Part:
    """``exp(logp - sg(logp))``: 1, with the gradient of ``logp``, whatever the old policy was."""
    return Part(lambda stats, b: ratios.own_gradient(stats.logp, b.mask))


@register("ratio", id="mhpo", source="MHPO, arXiv:2603.16929")
@register("ratio", source="MHPO, arXiv:2603.16929")
def bounded(c: float = 1.5) -> Part:
    """``exp(c tanh((logp - logp_old) / c))`` per token: within ``exp(±c)``, smooth."""
    aggregation.positive("c", c)
    return Part(lambda stats, b: ratios.bounded_log_ratio(stats.logp, b.logp_old, b.mask, c=c))
