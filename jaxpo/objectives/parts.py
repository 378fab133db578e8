"""The parts of the grammar, each registered under its kind: primitives applied to a batch, with what they ask of it."""

from typing import Any

import jax.numpy as jnp

from jaxpo.batch import Rollouts
from jaxpo.objectives.base import Part, State
from jaxpo.primitives import advantages, aggregation, ratios, regularizers, shaping, surrogates
from jaxpo.primitives.numerics import promote
from jaxpo.registry import make, names, register, unknown

NEEDS_REWARD = frozenset({"reward"})
NEEDS_GROUPS = frozenset({"reward", "group"})


# ---- advantages ---------------------------------------------------------------------------------------------------


@register("advantage", source="Williams 1992")
def reward(baseline: str = "none") -> Part:
    """``A_i = reward_i - m``, m = 0 (``none``) or the mean of the counted rewards (``batch_mean``)."""
    if baseline not in ("none", "batch_mean"):
        raise ValueError(unknown("baseline", baseline, ("none", "batch_mean")))
    if baseline == "none":
        return Part(lambda b, s: b.reward, NEEDS_REWARD)
    return Part(lambda b, s: advantages.batch_centered(b.reward, b.count), NEEDS_REWARD)


@register("advantage", source="DeepSeekMath, arXiv:2402.03300")
def group_normalized(adv_eps: float = 1e-6, scale: str = "group", ddof: int = 1, singleton: str = "zero") -> Part:
    """``A_i = (reward_i - group mean) / (std + adv_eps)``; see `jaxpo.primitives.advantages.group_normalized`."""
    advantages.choice("scale", scale, ("group", "batch", "none"))
    advantages.choice("singleton", singleton, ("zero", "raw"))
    return Part(
        lambda b, s: advantages.group_normalized(
            b.reward, b.group, b.count, scale=scale, adv_eps=adv_eps, ddof=ddof, singleton=singleton
        ),
        NEEDS_GROUPS,
    )


@register("advantage", source="RLOO, arXiv:2402.14740")
def leave_one_out(singleton: str = "zero", normalize: bool = False) -> Part:
    """``A_i = K/(K-1) (reward_i - group mean)``, then optionally standardised over the batch (``adv_eps`` 1e-4)."""

    advantages.choice("singleton", singleton, ("zero", "raw"))

    def fn(b: Rollouts, s: State) -> Any:
        adv = advantages.leave_one_out(b.reward, b.group, b.count, singleton=singleton)
        return advantages.batch_standardized(adv, b.count) if normalize else adv

    return Part(fn, NEEDS_GROUPS)


# ---- ratios -------------------------------------------------------------------------------------------------------


@register("ratio")
def token(log_ratio_clip: float = 20.0) -> Part:
    """``exp(clip(logp - logp_old, -C, C))`` per token."""
    return Part(lambda stats, b: ratios.token_log_ratio(stats.logp, b.logp_old, b.mask, log_ratio_clip=log_ratio_clip))


@register("ratio")
def sequence_sum(log_ratio_clip: float = 20.0) -> Part:
    """``exp(clip(sum_t (logp - logp_old), -C, C))`` per row."""
    return Part(
        lambda stats, b: ratios.sequence_sum_log_ratio(stats.logp, b.logp_old, b.mask, log_ratio_clip=log_ratio_clip),
        per="row",
    )


@register("ratio", source="GSPO, arXiv:2507.18071")
def sequence(log_ratio_clip: float = 20.0) -> Part:
    """``exp(clip(mean_t (logp - logp_old), -C, C))`` per row."""
    return Part(
        lambda stats, b: ratios.sequence_mean_log_ratio(stats.logp, b.logp_old, b.mask, log_ratio_clip=log_ratio_clip),
        per="row",
    )


# ---- surrogates ---------------------------------------------------------------------------------------------------


@register("surrogate", source="PPO, arXiv:1707.06347")
def clipped(eps_low: float = 0.2, eps_high: float = 0.2, dual_clip: float | None = None) -> Part:
    """``-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)``, optionally dual-clipped at ``dual_clip`` for A < 0."""
    aggregation.positive("eps_low", eps_low), aggregation.positive("eps_high", eps_high)
    if isinstance(dual_clip, int | float) and dual_clip <= 1:
        raise ValueError(f"dual_clip is a ratio above 1, not {dual_clip}")
    low, high = 1 - eps_low, 1 + eps_high
    return Part(
        lambda r, adv, stats, b, s: surrogates.clipped(r, adv, low, high, dual_clip),
        clipped=lambda r, adv, stats, b, s: surrogates.is_clipped(r, adv, low, high, dual_clip),
    )


@register("surrogate", source="Williams 1992")
def log_prob() -> Part:
    """``-A logp`` per token: REINFORCE, without a ratio."""
    return Part(lambda r, adv, stats, b, s: surrogates.log_prob(stats.logp, adv))


# ---- regularizers -------------------------------------------------------------------------------------------------


@register("regularizer", source="Schulman 2020; DeepSeekMath, arXiv:2402.03300, eq. 4")
def kl_to_reference(
    estimator: str = "k3", gradient: str | None = None, is_weighted: bool = False, log_ratio_clip: float = 20.0
) -> Part:
    """KL penalty to ``logp_ref``; ``is_weighted`` multiplies by the differentiable ratio (exact reverse-KL gradient
    off-policy)."""
    for name in (estimator, *([gradient] if gradient else [])):
        if name not in regularizers.KL_ESTIMATORS:
            raise ValueError(unknown("KL estimator", name, regularizers.KL_ESTIMATORS))

    def fn(stats: Any, b: Rollouts, s: State) -> Any:
        r = (
            jnp.exp(ratios.token_log_ratio(stats.logp, b.logp_old, b.mask, log_ratio_clip=log_ratio_clip))
            if is_weighted
            else None
        )
        return regularizers.kl_penalty(stats.logp, b.get("logp_ref"), estimator, gradient, r)

    return Part(fn, frozenset({"logp_ref"}), name="kl_ref")


# ---- shaping and filters ------------------------------------------------------------------------------------------


@register("reward", source="RLOO, arXiv:2402.14740")
def kl_in_reward(beta: float = 0.05) -> Part:
    """``reward - beta sum_t (logp_old - logp_ref)``: the k1 estimate on the rollout's own log-probs, a constant."""

    def fn(b: Rollouts, s: State) -> Any:
        difference = jnp.where(b.mask > 0, promote(b.get("logp_old")) - promote(b.get("logp_ref")), 0)
        return b.reward - beta * difference.sum(-1)

    return Part(fn, frozenset({"reward", "logp_old", "logp_ref"}))


@register("reward", source="DAPO, arXiv:2503.14476, eq. 13", budget={"max_len": 1.0, "buffer": 0.2})
def overlong(max_len: int = 20480, buffer: int = 4096, penalty: float = 1.0) -> Part:
    """``reward + p(length)``; see `jaxpo.primitives.shaping.overlong_penalty`."""
    return Part(
        lambda b, s: b.reward + shaping.overlong_penalty(b.lengths, max_len=max_len, buffer=buffer, penalty=penalty),
        NEEDS_REWARD,
    )


@register("filter", source="DAPO, arXiv:2503.14476")
def mixed_groups() -> Part:
    """Keep groups whose ``correct`` is neither all 0 nor all 1 (and groups of one row)."""
    return Part(lambda b, s: shaping.mixed_groups(b.get("correct"), b.group, b.count), frozenset({"correct", "group"}))


# ---- aggregation --------------------------------------------------------------------------------------------------

for _name, _fn in aggregation.PER_TOKEN.items():
    register("aggregation", id=_name)((lambda fn: lambda: fn)(_fn))
for _name, _fn in aggregation.WITH_CONSTANT.items():
    register("aggregation", id=_name, budget={"L_const": 1.0})(_fn)


def aggregation_of(agg: str, L_const: float | None = None) -> aggregation.Aggregation:  # noqa: N803
    """The aggregation called ``agg``; ``L_const`` belongs to the ``*_const`` ones and is refused elsewhere."""
    if agg not in names("aggregation"):
        raise ValueError(unknown("aggregation", agg, names("aggregation")))
    if agg in aggregation.WITH_CONSTANT:
        return make(agg, "aggregation", L_const=L_const)
    if L_const is not None:
        raise ValueError(
            f"L_const has no effect with agg={agg!r}; it belongs to {' and '.join(aggregation.WITH_CONSTANT)}"
        )
    return make(agg, "aggregation")
