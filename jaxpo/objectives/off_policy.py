"""Group-relative REINFORCE read as an off-policy method: masks, weights, residuals and shifted baselines."""

from typing import Literal

import jax.numpy as jnp
from jax import Array, lax

from jaxpo.arguments import NONZERO, NonNegative, Positive, PositiveOrInfinite, when
from jaxpo.batch import Rollouts, TokenStats
from jaxpo.objectives.grammar.base import Objective, State, Unit, asks_of
from jaxpo.objectives.grammar.parts import Surrogate
from jaxpo.objectives.grammar.policy_gradient import policy_gradient
from jaxpo.objectives.parts import advantages, ratios, regularizers, surrogates
from jaxpo.objectives.parts.surrogates import REC_WHEN, ClipMode, RecWeight
from jaxpo.primitives import aggregation, grouping
from jaxpo.primitives.advantages import Singleton
from jaxpo.primitives.numerics import promote
from jaxpo.primitives.ratios import sequence_sum_log_ratio
from jaxpo.registry import register

LOOKING = ("one-side", "two-side", "ring")  # masks made of token ratios
OBJECTIVE_REC_WHEN = {
    **REC_WHEN,
    "coef": when(regularizer=("k2", "forward-kl")),
    "regularizer": when(coef=NONZERO),
    "log_ratio_clip": (when(clip_mode=LOOKING), when(weight="importance_sampling")),
}


@register(source="REC, arXiv:2509.24203; Trinity-RFT rec_policy_loss", when=OBJECTIVE_REC_WHEN)
def rec(
    clip_mode: ClipMode = "one-side",
    weight: RecWeight = "none",
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.2,
    ring_low: NonNegative = 0.6,
    ring_high: NonNegative = 2.0,
    regularizer: Literal["none", "k2", "forward-kl"] = "none",
    coef: NonNegative = 0.1,
    drop: Literal["none", "balance"] = "none",
    temp: Positive = 1.0,
    normalize: bool = False,
    singleton: Singleton = "zero",
    log_ratio_clip: PositiveOrInfinite = 20.0,
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


OPMD_WHEN = {
    "coef": when(form="surrogate"),
    "tau": when(form=("simple", "kimi", "pairwise")),
    "baseline": when(form=("simple", "kimi")),
    "singleton": when(form=("simple", "kimi", "surrogate")),
}


@register(source="Kimi k1.5, arXiv:2501.12599; Trinity-RFT opmd_policy_loss", when=OPMD_WHEN)
def opmd(
    form: Literal["simple", "kimi", "pairwise", "surrogate"] = "simple",
    tau: NonNegative = 1.0,
    baseline: Literal["mean", "logavgexp"] = "mean",
    coef: NonNegative = 0.1,
    singleton: Singleton = "zero",
) -> Objective:
    """Online Policy Mirror Descent: the residual ``A - tau Delta`` of its optimality condition, in four forms.

    Shapes: logp [B, T], reward [B]; ``Delta_i = sum_t (logp - logp_old)`` is not clamped, so long rows dominate
      "kimi" and "pairwise".

    Args:
      form: "simple": ``-token_mean(A logp) / (1 + tau)``; "kimi": ``mean_i (A_i - tau Delta_i)^2``; "pairwise":
        ``mean over groups of (1/K^2) sum_{i<j} ((R_i - tau Delta_i) - (R_j - tau Delta_j))^2 / (1 + tau)^2``
        (normalizing constants assumed); "surrogate": ``rec(clip_mode="none", regularizer="k2", coef=coef)``.
      baseline: "mean" or "logavgexp" (``tau log mean exp(R / tau)``) of the group; of "simple" and "kimi" only.
      coef: of "surrogate" only; tau: of the others."""
    if form == "surrogate":
        return rec("none", regularizer="k2", coef=coef, singleton=singleton)
    smooth = {} if baseline == "mean" else {"tau": tau}
    advantage = advantages.opmd(baseline, singleton=singleton, **smooth)
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
        asks=asks_of("group"),
        unit=Unit(coupling="group"),
    )


def _pairwise_residual(tau: float) -> Surrogate:
    """``(x_i - group mean of x)^2`` per row, ``x = R - tau Delta``: its mean over K rows is the sum over pairs over
    K^2. The mean needs no gradient (deviations from it sum to 0), which leaves a row without tokens a member of its
    pairs."""

    def fn(log_ratio: Array, adv: Array, stats: TokenStats, b: Rollouts, s: State) -> Array:
        drift = sequence_sum_log_ratio(stats.logp, b.logp_old, b.mask, log_ratio_clip=jnp.inf)
        x = promote(b.reward) - tau * drift
        return jnp.square(x - lax.stop_gradient(grouping.group_mean(x, b.group, b.count)))

    return Surrogate(fn)


@register(source="Asymmetric REINFORCE, arXiv:2506.20520; Trinity-RFT asymre_advantage")
def asymre(shift: float = -0.1, tau: NonNegative = 0.0, singleton: Singleton = "zero") -> Objective:
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
