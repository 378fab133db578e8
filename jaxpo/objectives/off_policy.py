"""Group-relative REINFORCE read as an off-policy method: masks, weights, residuals and shifted baselines."""

import jax.numpy as jnp
from jax import Array, lax

from jaxpo.batch import Rollouts, TokenStats
from jaxpo.objectives.grammar.base import Objective, State
from jaxpo.objectives.grammar.parts import Part
from jaxpo.objectives.grammar.policy_gradient import policy_gradient
from jaxpo.objectives.parts import advantages, ratios, regularizers, surrogates
from jaxpo.objectives.parts.surrogates import unused
from jaxpo.primitives import aggregation, grouping
from jaxpo.primitives.advantages import choice
from jaxpo.primitives.numerics import promote
from jaxpo.primitives.ratios import sequence_sum_log_ratio
from jaxpo.registry import register


@register(source="REC, arXiv:2509.24203; Trinity-RFT rec_policy_loss")
def rec(
    clip_mode: str = "one-side",
    weight: str = "none",
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    ring_low: float = 0.6,
    ring_high: float = 2.0,
    regularizer: str = "none",
    coef: float = 0.1,
    drop: str = "none",
    temp: float = 1.0,
    normalize: bool = False,
    singleton: str = "zero",
    log_ratio_clip: float = 20.0,
) -> Objective:
    """REINFORCE with a group baseline under a binary clip mask M and a weight w: ``-sg(A w M) logp``; the ratio is
    only looked at.

    Shapes: logp [B, T], reward [B]. Members of the family by their names are in ``REC_MEMBERS``.

    Args:
      clip_mode: "none", "one-side", "two-side", "ring", or "gspo-one-side" (the one-side test on the mean log-ratio
        of the row, averaged over rows).
      weight: "none", "importance_sampling" (r), or "advantage" (``exp(A / temp)``).
      ring_low, ring_high: the outer bounds of "ring". normalize: divide A by the population std + 1e-6.
      regularizer, coef: "k2": ``coef (logp - logp_old)^2``; "forward-kl": ``-coef logp``.
      drop: "balance" removes the negatives that outnumber the positives of a group, at random by the rows' seeds.
    """
    choice("regularizer", regularizer, ("none", "k2", "forward-kl"))
    unused("coef", coef, 0.1, regularizer != "none", "a regularizer")
    looks = clip_mode not in ("none", "gspo-one-side") or weight == "importance_sampling"
    unused("log_ratio_clip", log_ratio_clip, 20.0, looks, "a mask or weight made of token ratios")
    penalty = {
        "none": [],
        "k2": [(coef, regularizers.kl_to_old("k2", scale=2.0))],
        "forward-kl": [(coef, regularizers.forward_kl())],
    }[regularizer]
    return policy_gradient(
        advantage=advantages.rec(normalize, drop, singleton),
        ratio=ratios.token(log_ratio_clip),
        surrogate=surrogates.rec(clip_mode, weight, eps_low, eps_high, ring_low, ring_high, temp),
        regularizers=penalty,
        aggregate=aggregation.seq_mean if clip_mode == "gspo-one-side" else aggregation.token_mean,
    )


REC_MEMBERS = {
    "REC-OneSide-NoIS": dict(clip_mode="one-side", eps_low=0.6, eps_high=2.0),
    "REC-OneSide-IS": dict(clip_mode="one-side", weight="importance_sampling"),
    "REC-TwoSide-NoIS": dict(clip_mode="two-side"),
    "REC-TwoSide-IS": dict(clip_mode="two-side", weight="importance_sampling"),
    "REC-Ring-NoIS": dict(clip_mode="ring"),
    "REC-Ring-IS": dict(clip_mode="ring", weight="importance_sampling"),
    "OPMD": dict(clip_mode="none", regularizer="k2", coef=0.1),
    "AsymRE": dict(clip_mode="none", regularizer="forward-kl", coef=0.1),
    "RED-Drop": dict(clip_mode="none", drop="balance"),
    "RED-Weight": dict(clip_mode="none", weight="advantage", temp=1.0),
}


@register(source="Kimi k1.5, arXiv:2501.12599; Trinity-RFT opmd_policy_loss")
def opmd(
    form: str = "simple", tau: float = 1.0, baseline: str = "mean", coef: float = 0.1, singleton: str = "zero"
) -> Objective:
    """Online Policy Mirror Descent: the residual ``A - tau Delta`` of its optimality condition, in four forms.

    Shapes: logp [B, T], reward [B]; ``Delta_i = sum_t (logp - logp_old)`` is not clamped, so long rows dominate
      "kimi" and "pairwise".

    Args:
      form: "simple": ``-token_mean(A logp) / (1 + tau)``; "kimi": ``mean_i (A_i - tau Delta_i)^2``; "pairwise":
        ``mean over groups of (1/K^2) sum_{i<j} ((R_i - tau Delta_i) - (R_j - tau Delta_j))^2 / (1 + tau)^2``
        (normalising constants assumed); "surrogate": ``rec(clip_mode="none", regularizer="k2", coef=coef)``.
      baseline: "mean" or "logavgexp" (``tau log mean exp(R / tau)``) of the group; of "simple" and "kimi" only.
      coef: of "surrogate" only; tau: of the others."""
    choice("form", form, ("simple", "kimi", "pairwise", "surrogate"))
    unused("coef", coef, 0.1, form == "surrogate", "form='surrogate'")
    unused("tau", tau, 1.0, form != "surrogate", "the other forms")
    unused("baseline", baseline, "mean", form in ("simple", "kimi"), "form='simple' and form='kimi'")
    unused("singleton", singleton, "zero", form != "pairwise", "the other forms")
    if form == "surrogate":
        return rec("none", regularizer="k2", coef=coef, singleton=singleton)
    advantage = advantages.opmd(baseline, tau, singleton)
    if form == "simple":
        return policy_gradient(
            advantage=advantage,
            ratio=ratios.token(),
            surrogate=surrogates.log_prob(),
            aggregate=aggregation.token_mean,
            scale=1 / (1 + tau),
        )
    if form == "kimi":
        return policy_gradient(
            advantage=advantage,
            ratio=ratios.sequence_sum(),
            surrogate=surrogates.squared_residual(tau),
            aggregate=aggregation.seq_mean,
        )
    return policy_gradient(
        advantage=advantages.reward(),
        ratio=ratios.sequence_sum(),
        surrogate=_pairwise_residual(tau),
        aggregate=aggregation.group_mean,
        scale=1 / (1 + tau) ** 2,
        needs=("group",),
        coupling="group",
    )


def _pairwise_residual(tau: float) -> Part:
    """``(x_i - group mean of x)^2`` per row, ``x = R - tau Delta``: its mean over K rows is the sum over pairs over
    K^2. The mean needs no gradient (deviations from it sum to 0), which leaves a row without tokens a member of its
    pairs."""

    def fn(log_ratio: Array, adv: Array, stats: TokenStats, b: Rollouts, s: State) -> Array:
        drift = sequence_sum_log_ratio(stats.logp, b.logp_old, b.mask, log_ratio_clip=jnp.inf)
        x = promote(b.reward) - tau * drift
        return jnp.square(x - lax.stop_gradient(grouping.group_mean(x, b.group, b.count)))

    return Part(fn)


@register(source="Asymmetric REINFORCE, arXiv:2506.20520; Trinity-RFT asymre_advantage")
def asymre(shift: float = -0.1, tau: float = 0.0, singleton: str = "zero") -> Objective:
    """REINFORCE with a baseline below the group mean: ``-token_mean(A logp) / (1 + tau)``, ``A = reward - (group mean
    + shift)``.

    Shapes: logp [B, T], reward [B]. No ratio, no clip; solved groups keep the push ``-shift``, so do not filter
      them out.

    Args:
      shift: below 0; above it off-policy learning collapses. tau: 0 is the plain form; Trinity's default of 1 halves
        the loss."""
    return policy_gradient(
        advantage=advantages.asymre(shift, singleton),
        ratio=ratios.token(),
        surrogate=surrogates.log_prob(),
        aggregate=aggregation.token_mean,
        scale=1 / (1 + tau),
    )
