"""Objectives that steer entropy: by covariance, by improbable tokens, by shared tokens, by temperature."""

from typing import Literal

from jaxpo.arguments import (
    NONZERO,
    AboveOne,
    NonNegative,
    NonNegativeOrInfinite,
    OpenShare,
    Positive,
    PositiveOrInfinite,
    PositiveShare,
    Share,
    ShareBelowOne,
    Threshold,
    Whole,
    when,
)
from jaxpo.objectives.clipped import clipped_tokens, eps_pair
from jaxpo.objectives.grammar.base import Gathering, Objective, is_off
from jaxpo.objectives.grammar.policy_gradient import policy_gradient
from jaxpo.objectives.parts import advantages, aggregation_of, filters, ratios, regularizers, shaping, surrogates
from jaxpo.objectives.parts.advantages import DCPO_WHEN
from jaxpo.objectives.parts.regularizers import Proxy
from jaxpo.objectives.parts.shaping import OVERLONG_WHEN
from jaxpo.primitives import aggregation
from jaxpo.primitives.advantages import Singleton
from jaxpo.primitives.aggregation import EmptyRows
from jaxpo.registry import register


@register(source="arXiv:2505.22617; PRIME-RL/Entropy-Mechanism-of-RL, verl clip_cov")
def clip_cov(
    ratio: Share = 2e-4,
    lb: Threshold = 1.0,
    ub: Threshold = 5.0,
    eps_low: Positive = 1.0,
    eps_high: Positive = 1.0,
    eps: Positive | None = None,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """Clip-Cov: a few tokens of high covariance ``(A - mean A)(logp - mean logp)`` lose their gradient, at random.

    Shapes: logp [B, T], reward [B], seed [B]. Of the N tokens ``max(int(ratio N), 1)`` with ``lb < cov < ub`` have
      loss 0 and stay in the token mean; the others have PPO's clip, wide open by default (``r`` in [0, 2])."""
    return policy_gradient(
        advantage=advantages.group_normalized(adv_eps, singleton=singleton),
        ratio=ratios.token(log_ratio_clip),
        surrogate=surrogates.clip_cov(
            ratio, lb, ub, *eps_pair(eps, eps_low, eps_high, (1.0, 1.0)), log_ratio_clip=log_ratio_clip
        ),
        aggregate=aggregation.token_mean,
    )


@register(source="arXiv:2505.22617; PRIME-RL/Entropy-Mechanism-of-RL, verl kl_cov", when={"ratio": when(coef=NONZERO)})
def kl_cov(
    ratio: Share = 2e-3,
    coef: NonNegative = 1.0,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """KL-Cov: ``-r A``, and ``coef |logp - logp_old|`` at the ``max(1, int(ratio N))`` tokens of largest covariance;
    token mean.

    Shapes: logp [B, T], reward [B]. Inert while ``logp == logp_old``, so it needs several optimizer steps an iteration.

    Args:
      ratio: 2e-3 for 7B models, 2e-4 for 32B."""
    return policy_gradient(
        advantage=advantages.group_normalized(adv_eps, singleton=singleton),
        ratio=ratios.token(log_ratio_clip),
        surrogate=surrogates.linear(),
        regularizers=[(coef, regularizers.kl_cov(ratio))],
        aggregate=aggregation.token_mean,
    )


LP_REG_WHEN = {
    "U": when(form="paper"),
    "proxy": when(form="paper", beta=NONZERO),
    **dict.fromkeys(("eps_low", "eps_high", "eps"), when(form="released")),
    **dict.fromkeys(("rho", "tau"), when(beta=NONZERO)),
    "kappa": when(beta=NONZERO, tau=None),
}


@register(source="Lp-Reg, arXiv:2510.03222; code of CarlanLark/Lp-Reg-dev", when=LP_REG_WHEN)
def lp_reg(
    form: Literal["released", "paper"] = "released",
    rho: PositiveShare = 0.01,
    beta: NonNegative = 1.0,
    kappa: OpenShare = 0.02,
    tau: OpenShare | None = None,
    proxy: Proxy = "current",
    U: Positive = 10.0,  # noqa: N803 (the card's name)
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.2,
    eps: Positive | None = None,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """Low-probability Regularization: improbable tokens of failed answers are held near a proxy, the policy without
    its noise (tokens with ``pi <= kappa max pi``); token mean.

    Shapes: logp [B, T], reward [B]; the proxy comes from the logits, slice by slice.

    Args:
      form: "released": the ``int(rho n)`` least probable of the tokens with A < 0, if less probable than their proxy,
        have ``-r A + beta k3`` by the sampled token, the others PPO's clip. "paper": ``-min(r, U) A``, and the full
        ``KL(proxy || pi)`` at the surviving ones among the ``rho`` least probable of all tokens with A < 0.
      rho: 0.01 for 14B models, 0.005 for 32B. tau: a fixed threshold of the proxy instead of ``kappa max pi`` (0.02 in
        the paper's ablation).
      proxy: of "paper": made of the "current" policy (the paper's on-policy case), or of the "old" one at the start of
        the iteration (its off-policy case; a run keeps that copy).
      U: of "paper"; eps_low, eps_high: of "released".
    """
    paper = form == "paper"
    if not paper and is_off(beta):
        raise ValueError("form='released' without beta would unclip tokens that nothing protects: take grpo")
    surrogate = (
        surrogates.capped(U)
        if paper
        else surrogates.clipped_but_protected(*eps_pair(eps, eps_low, eps_high, (0.2, 0.2)))
    )
    return policy_gradient(
        advantage=advantages.group_normalized(adv_eps, singleton=singleton),
        ratio=ratios.token(log_ratio_clip),
        surrogate=surrogate,
        regularizers=[(beta, regularizers.lp_reg(form, rho, kappa, tau, proxy))],
        aggregate=aggregation.token_mean,
    )


@register(source="GTPO, arXiv:2508.03772; code of winstonsmith1897/GTPO")
def gtpo(
    entropy_threshold: Threshold = 0.7,
    entropy_scale: NonNegative = 0.1,
    w_pos: NonNegative = 2.0,
    conflict_norm: Literal["max", "none"] = "max",
    adv_eps: NonNegative = 1e-4,
    singleton: Singleton = "zero",
    empty_rows: EmptyRows = "count",
) -> Objective:
    """Group-relative Trajectory-based Policy Optimization: tokens that right and wrong answers share at their
    beginning or end are spared in the wrong ones; answers of high entropy are left out; no KL, no old policy.

    Shapes: logp [B, T], reward [B], tokens, entropy of the current policy [B, T]. Per token ``-exp(logp - sg(logp))
      A' lambda / n``, mean over rows (the released code sums them).

    Args:
      entropy_threshold, entropy_scale: ``A' = A - entropy_scale H_i`` where the row's mean entropy is within the
        threshold, else 0.
      w_pos: weight of shared tokens in right answers. conflict_norm: "max" divides by the longer run, "none" does not.
    """
    return policy_gradient(
        advantage=advantages.gtpo(entropy_threshold, entropy_scale, w_pos, conflict_norm, adv_eps, singleton),
        ratio=ratios.on_policy(),
        surrogate=surrogates.linear(),
        aggregate=aggregation_of("seq_mean", empty_rows=empty_rows),
    )


@register(
    source="HAPO, arXiv:2509.16591; code of starriver030515/HAPO",
    budget={"max_len": 1.0, "buffer": 0.2},
    when=OVERLONG_WHEN,
)
def hapo(
    rho: Share = 0.8,
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.28,
    eps: Positive | None = None,
    tau: ShareBelowOne = 0.05,
    T0: Positive = 1.0,  # noqa: N803 (the card's name)
    guard: NonNegativeOrInfinite = 5.0,
    redistribution: NonNegative = 1.0,
    clip_strength: NonNegative = 1.0,
    sign: Literal["intended", "official"] = "intended",
    dual_clip: AboveOne = 10.0,
    max_len: Whole = 20480,
    buffer: Whole = 4096,
    penalty: NonNegative = 1.0,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """Heterogeneous Adaptive Policy Optimization: the entropy of each token drives its temperature, advantage and
    clip bounds, on top of DAPO (filter, overlong penalty, token mean).

    Shapes: logp [B, T], reward, correct [B], entropy_old [B, T].

    Args:
      rho: quantile of log-entropy that separates high from low. tau, T0: the sampler's ``T = T0 (1 + tau h)`` per
        token (0.05 in the code, 0.1 in the paper), by the numbers of the previous step. guard: groups with an |A| as
        large have GRPO's A.
      redistribution, clip_strength: how much ``h`` moves advantages and bounds. sign: "official" reproduces the
        release."""
    return policy_gradient(
        advantage=advantages.hapo(guard, adv_eps, singleton),
        ratio=ratios.token(log_ratio_clip),
        surrogate=surrogates.hapo(
            *eps_pair(eps, eps_low, eps_high, (0.2, 0.28)), rho, redistribution, clip_strength, sign, dual_clip
        ),
        filters=[filters.mixed_groups()],
        shaping=[] if is_off(penalty) else [shaping.overlong(max_len, buffer, penalty)],
        aggregate=aggregation.token_mean,
        protocol=Gathering("hapo", dict(tau=tau, T0=T0, official=sign == "official")),
    )


@register(source="DCPO, arXiv:2601.12730; code of 597358816/DCPO", when=DCPO_WHEN)
def dcpo_distribution(
    H0: NonNegative = 0.25,  # noqa: N803 (the card's names)
    cap: NonNegative = 0.1,
    T_hot: Positive = 1.2,  # noqa: N803
    T_cold: Positive = 0.8,  # noqa: N803
    threshold: Threshold = 0.05,
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.2,
    eps: Positive | None = None,
    dual_clip: AboveOne = 3.0,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """Distribution-Centric Policy Optimization: right answers are pulled towards the policy at a higher temperature
    while entropy is below ``H0``, at a lower one above; GRPO's clip, dual clip, token mean.

    Shapes: logp, logp_old, logp_old_hot, logp_old_cold [B, T] (the old policy at ``T_hot`` and ``T_cold``), reward [B].
    ``A' = (1 - w) A + w 1[reward > threshold] exp(logp_old^T - logp_old)``.

    Args:
      H0: entropy to hold (0.25 best, 0.5 in the script). cap: bound of ``|H0 - H|`` in the weight.
    """
    return clipped_tokens(
        advantages.dcpo_distribution(H0, cap, T_hot, T_cold, threshold, adv_eps, singleton),
        eps_pair(eps, eps_low, eps_high, (0.2, 0.2)),
        agg="token_mean",
        dual_clip=dual_clip,
        log_ratio_clip=log_ratio_clip,
    )


@register(source="D3S, arXiv:2509.22115 (reconstructed from secondary summaries)", budget={"total": "steps"})
def d3s(
    base: Literal["grpo", "gspo"] = "grpo",
    N_init: PositiveShare = 0.5,  # noqa: N803 (the card's names)
    K_init: PositiveShare = 0.2,  # noqa: N803
    N_final: PositiveShare = 1.0,  # noqa: N803
    K_final: PositiveShare = 1.0,  # noqa: N803
    total: Whole = 1,
    level: Literal["cross", "within"] = "cross",
    eps_low: Positive | None = None,
    eps_high: Positive | None = None,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    log_ratio_clip: PositiveOrInfinite | None = None,
) -> Objective:
    """Dynamic Dual-level Down-Sampling: train on the rows whose advantages vary most and on their tokens of largest
    ``|A| H``; both shares grow to 1 over training. The mean is over kept tokens.

    Shapes: logp [B, T], reward [B], entropy_old [B, T]. Defaults of shares, ties and the mean over kept tokens are
      assumed.

    Args:
      base: "grpo" or "gspo" (ratio and clip ranges). N_init, N_final: share of rows; K_init, K_final: of tokens.
      total: iterations over which they go (a run takes its own number). level: choose rows "cross" groups or
        "within" each.
      eps_low, eps_high, log_ratio_clip: None = the base's: 0.2, 0.2, 20 or 3e-4, 4e-4, 10.
    """
    low, high, bound = (0.2, 0.2, 20.0) if base == "grpo" else (3e-4, 4e-4, 10.0)
    ratio = ratios.token if base == "grpo" else ratios.sequence_token
    return policy_gradient(
        advantage=advantages.group_normalized(adv_eps, singleton=singleton),
        ratio=ratio(bound if log_ratio_clip is None else log_ratio_clip),
        surrogate=surrogates.clipped(low if eps_low is None else eps_low, high if eps_high is None else eps_high),
        filters=[filters.d3s_rows(N_init, N_final, total, level), filters.d3s_tokens(K_init, K_final, total)],
        aggregate=aggregation.token_mean,
    )
