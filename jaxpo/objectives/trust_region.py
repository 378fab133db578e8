"""Objectives that differ in how far a step may go: ratios of sequences, detached or bounded ratios, adaptive clips,
penalties."""

import warnings
from typing import Literal

from jaxpo.arguments import AboveOne, NonNegative, Positive, PositiveOrInfinite, when
from jaxpo.objectives.clipped import EMPTY_WHEN, eps_pair
from jaxpo.objectives.grammar.base import Gathering, Objective
from jaxpo.objectives.grammar.policy_gradient import policy_gradient
from jaxpo.objectives.parts import advantages, aggregation_of, ratios, regularizers, surrogates
from jaxpo.primitives import aggregation
from jaxpo.primitives.advantages import Singleton
from jaxpo.primitives.aggregation import EmptyRows
from jaxpo.registry import register


@register(source="GSPO, arXiv:2507.18071")
def gspo(
    eps_low: Positive = 3e-4,
    eps_high: Positive = 4e-4,
    eps: Positive | None = None,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    log_ratio_clip: PositiveOrInfinite = 10.0,
    empty_rows: EmptyRows = "count",
) -> Objective:
    """Group Sequence Policy Optimization: the clipped surrogate on ``s_i = exp(mean_t (logp - logp_old))``, mean over
    rows.

    Shapes: logp [B, T], reward [B]. The ratio is a geometric mean, so clip ranges are a hundred times smaller than
      PPO's.

    Args:
      log_ratio_clip: bound of ``log s`` from above only (rows with A < 0 have no other).
    """
    return policy_gradient(
        advantage=advantages.group_normalized(adv_eps, singleton=singleton),
        ratio=ratios.sequence(log_ratio_clip),
        surrogate=surrogates.clipped(*eps_pair(eps, eps_low, eps_high, (3e-4, 4e-4))),
        aggregate=aggregation_of("seq_mean", empty_rows=empty_rows),
    )


@register(source="GSPO, arXiv:2507.18071, eq. 13-14", when=EMPTY_WHEN)
def gspo_token(
    eps_low: Positive = 3e-4,
    eps_high: Positive = 4e-4,
    eps: Positive | None = None,
    agg: str = "seq_mean",
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    log_ratio_clip: PositiveOrInfinite = 10.0,
    empty_rows: EmptyRows = "count",
) -> Objective:
    """GSPO's token variant: ``sg(s_i) exp(logp - sg(logp))`` at every token, so that advantages may differ inside a
    row.

    Shapes: logp [B, T], reward [B].

    Args:
      agg: anything but "seq_mean" is another objective, of which a warning reminds.
    """
    if agg != "seq_mean":
        warnings.warn(f"gspo_token with agg={agg!r} is no longer GSPO, whose rows weigh the same", stacklevel=2)
    return policy_gradient(
        advantage=advantages.group_normalized(adv_eps, singleton=singleton),
        ratio=ratios.sequence_token(log_ratio_clip),
        surrogate=surrogates.clipped(*eps_pair(eps, eps_low, eps_high, (3e-4, 4e-4))),
        aggregate=aggregation_of(agg, empty_rows=empty_rows),
    )


@register(source="MiniMax-M1, arXiv:2506.13585, eq. 4-5", when=EMPTY_WHEN)
def cispo(
    eps_low: Positive = 1.0,
    eps_high: Positive = 4.0,
    eps: Positive | None = None,
    agg: str = "token_mean",
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    log_ratio_clip: PositiveOrInfinite = 20.0,
    empty_rows: EmptyRows = "count",
) -> Objective:
    """Clipped IS-weight Policy Optimization: ``-sg(clip(r, 1 - eps_low, 1 + eps_high)) A logp``; no token loses its
    gradient.

    Shapes: logp [B, T], reward [B]. The value holds raw log-probs: compare the metric ``surrogate`` instead.

    Args:
      eps_low, eps_high: 1 = no lower bound; 4 = the ratio is capped at 5 (TRL's ``epsilon_high`` is that cap itself).
    """
    return policy_gradient(
        advantage=advantages.group_normalized(adv_eps, singleton=singleton),
        ratio=ratios.token(log_ratio_clip),
        surrogate=surrogates.cispo(*eps_pair(eps, eps_low, eps_high, (1.0, 4.0))),
        aggregate=aggregation_of(agg, empty_rows=empty_rows),
    )


@register(source="BAPO, arXiv:2510.18927; code of WooooDyy/BAPO", when={"low_step": when(mode="paper")})
def bapo(
    mode: Literal["official", "paper"] = "official",
    target: NonNegative | None = None,
    low0: NonNegative | None = None,
    low_max: NonNegative | None = None,
    low_step: Positive | None = None,
    high0: Positive | None = None,
    high_max: Positive | None = None,
    high_step: Positive | None = None,
    dual_clip: AboveOne = 3.0,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """Balanced Policy Optimization: clip bounds raised, for every update, until tokens of positive advantage carry
    ``target``.

    Shapes: logp [B, T], reward [B]. Bounds are ratio values: ``ppo(r, A; cl, ch, dual_clip)``, token mean.

    Args:
      mode: "official": ``P/(N + 1e-8)``, the lower bound first; it ends at ``low0`` or ``low_max``, whatever
        ``low_step``. "paper": ``P/(P+N)`` weighted by the old probabilities, the upper bound first.
      target, low0, ..., high_step: None = the mode's own: official 1.0, 0.6→0.8 by 0.05, 1.2→2.0 by 0.05; paper 0.4,
        0.6→0.9 by 0.02, 1.2→3.0 by 0.05.
    """
    return policy_gradient(
        advantage=advantages.group_normalized(adv_eps, singleton=singleton),
        ratio=ratios.token(log_ratio_clip),
        surrogate=surrogates.bapo(
            mode, target, low0, low_max, low_step, high0, high_max, high_step, dual_clip, log_ratio_clip
        ),
        aggregate=aggregation.token_mean,
    )


@register(source="MHPO, arXiv:2603.16929 (reconstructed from two secondary transcriptions)", when=EMPTY_WHEN)
def mhpo(
    c: Positive = 1.5,
    k_pos: Positive = 1.5,
    lam_pos: Positive = 1.0,
    k_neg: Positive = 2.0,
    lam_neg: Positive = 0.8,
    agg: str = "seq_mean",
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    empty_rows: EmptyRows = "count",
) -> Objective:
    """Modulated Hazard-aware Policy Optimization: ``-exp(psi - sg(zeta)) A``, ``psi = c tanh((logp - logp_old)/c)``,
    zeta a Weibull hazard of drifting; no clip, no KL.

    Shapes: logp [B, T], reward [B]. Even on-policy the step is damped, by 0.27 with the defaults.

    Args:
      k_pos, lam_pos, k_neg, lam_neg: shape and scale of the hazard for ratios above and below 1.
    """
    return policy_gradient(
        advantage=advantages.group_normalized(adv_eps, singleton=singleton),
        ratio=ratios.bounded(c),
        surrogate=surrogates.mhpo(k_pos, lam_pos, k_neg, lam_neg),
        aggregate=aggregation_of(agg, empty_rows=empty_rows),
    )


@register(source="R2VPO, arXiv:2601.03320 and 2605.26784 (reconstructed from the abstracts)")
def r2vpo(
    lam0: NonNegative = 0.1,
    delta: Positive = 0.02,
    lr_dual: NonNegative = 0.1,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    log_ratio_clip: PositiveOrInfinite = 5.0,
) -> Objective:
    """Ratio-Variance Regularized Policy Optimization: ``-r A + lam ((r - 1)^2 - delta)``, unclipped, lam adapted
    after each step.

    Shapes: logp [B, T], reward [B]. Token level, GRPO advantages, projected ascent and all defaults are assumed.
      Protocol "replay" is its off-policy mode.

    Args:
      lam0: first multiplier (state ``lam``); delta: allowed variance; lr_dual: its step.
      log_ratio_clip: tight, since ``(r - 1)^2`` explodes on stale data."""
    return policy_gradient(
        advantage=advantages.group_normalized(adv_eps, singleton=singleton),
        ratio=ratios.token(log_ratio_clip),
        surrogate=surrogates.linear(),
        regularizers=[(1.0, regularizers.r2vpo(lam0, delta, lr_dual, log_ratio_clip))],
        aggregate=aggregation.token_mean,
    )


@register(source="arXiv:2603.06009 (the loss is our rendering)")
def ppo_outer_loop(
    eta: PositiveOrInfinite = 1.0,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """One PPO iteration as a proximal step of an outer optimizer: ``-r A + (1/eta)(r - 1 - log r)``, token mean, no
    clip.

    Shapes: logp [B, T], reward [B]. The second term is the sample form of ``KL(pi_old || pi)``; ``eta``, the outer
      step size, is what to lower when learning stagnates, or draw more rollouts with minibatch, learning rate and
      epochs as they are."""
    return policy_gradient(
        advantage=advantages.group_normalized(adv_eps, singleton=singleton),
        ratio=ratios.token(log_ratio_clip),
        surrogate=surrogates.linear(),
        regularizers=[(1 / eta, regularizers.proximal(log_ratio_clip))],
        aggregate=aggregation.token_mean,
        protocol=Gathering("ppo_outer_loop"),
    )
