"""Critic-free policy gradients: objectives whose advantage compares the responses to one prompt."""

from jaxpo.objectives import parts
from jaxpo.objectives.base import Objective, is_off, policy_gradient
from jaxpo.primitives import aggregation
from jaxpo.registry import register


def _eps(eps: float | None, eps_low: float, eps_high: float, default: tuple[float, float]) -> tuple[float, float]:
    """``eps`` sets both clip ranges; together with one of them it would hide a contradiction."""
    if eps is None:
        return eps_low, eps_high
    if (eps_low, eps_high) != default:
        raise ValueError("give either eps (both sides) or eps_low and eps_high, not both")
    return eps, eps


@register(source="Williams 1992, Machine Learning 8")
def reinforce(baseline: str = "none", agg: str = "token_mean") -> Objective:
    """REINFORCE for sequence rewards: ``-sg(A_i) logp[i, t]``, ``A_i = reward_i - m``.

    Shapes: logp [B, T], reward [B]. ``logp_old`` plays no part.

    Args:
      baseline: m = 0 ("none") or the batch mean of rewards ("batch_mean").
      agg: "token_mean", "seq_mean", or "seq_sum" (the gradient of the expected sequence reward; the others reweigh
        by length).
    """
    return policy_gradient(
        advantage=parts.reward(baseline),
        ratio=parts.token(),
        surrogate=parts.log_prob(),
        aggregate=parts.aggregation_of(agg),
    )


@register(source="Back to Basics, arXiv:2402.14740; TRL RLOOTrainer")
def rloo(
    form: str = "reinforce",
    beta: float = 0.05,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    eps: float | None = None,
    normalize: bool = False,
    singleton: str = "zero",
    log_ratio_clip: float = 20.0,
) -> Objective:
    """REINFORCE Leave-One-Out, sequence level, with the KL in the reward.

    ``R_i = reward_i - beta sum_t (logp_old - logp_ref)``; ``A_i = R_i - mean of the other R of the group``. Shapes:
    logp [B, T], reward [B].

    Args:
      form: "reinforce": ``-mean_i A_i sum_t logp[i, t]``; "ppo": the clipped surrogate on the ratio of whole
        sequences (TRL).
      beta: KL coefficient; a Python 0 removes the need for ``logp_ref``.
      eps_low, eps_high, eps, log_ratio_clip: of form "ppo" only.
      normalize: standardise advantages over the batch. singleton: see `advantages.leave_one_out`.
    """
    shaping = [] if is_off(beta) else [parts.kl_in_reward(beta)]
    common = dict(advantage=parts.leave_one_out(singleton, normalize), shaping=shaping)
    if form == "reinforce":
        if (eps_low, eps_high, eps, log_ratio_clip) != (0.2, 0.2, None, 20.0):
            raise ValueError(
                "eps_low, eps_high, eps and log_ratio_clip have no effect with form='reinforce'; they belong "
                "to form='ppo'"
            )
        return policy_gradient(ratio=parts.token(), surrogate=parts.log_prob(), aggregate=aggregation.seq_sum, **common)
    if form == "ppo":
        low, high = _eps(eps, eps_low, eps_high, (0.2, 0.2))
        return policy_gradient(
            ratio=parts.sequence_sum(log_ratio_clip),
            surrogate=parts.clipped(low, high),
            aggregate=aggregation.seq_mean,
            **common,
        )
    raise ValueError(f"form must be reinforce or ppo, not {form!r}")


@register(source="DeepSeekMath, arXiv:2402.03300, eq. 3-4")
def grpo(
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    eps: float | None = None,
    beta: float = 0.04,
    adv_eps: float = 1e-6,
    scale: str = "group",
    singleton: str = "zero",
    dual_clip: float | None = None,
    kl_is: bool = False,
    agg: str = "seq_mean",
    L_const: float | None = None,  # noqa: N803
    log_ratio_clip: float = 20.0,
) -> Objective:
    """Group Relative Policy Optimization: ``ppo(r, A) + beta k3(logp, logp_ref)``, ``A = (reward - group mean) /
    (group std + adv_eps)``.

    The paper's form (mean over rows of token means, beta 0.04); current libraries mean ``agg="token_mean", beta=0``.
    Shapes: logp [B, T], reward [B].

    Args:
      scale: std of the "group", the "batch", or "none". dual_clip: bound for A < 0 (verl: 3).
      kl_is: multiply k3 by the ratio (unbiased KL gradient off-policy). beta: a Python 0 removes the need for
        ``logp_ref``.
      agg, L_const: aggregation; ``L_const`` only with the ``*_const`` ones.
    """
    low, high = _eps(eps, eps_low, eps_high, (0.2, 0.2))
    return policy_gradient(
        advantage=parts.group_normalized(adv_eps, scale, singleton=singleton),
        ratio=parts.token(log_ratio_clip),
        surrogate=parts.clipped(low, high, dual_clip),
        regularizers=[(beta, parts.kl_to_reference("k3", is_weighted=kl_is, log_ratio_clip=log_ratio_clip))],
        aggregate=parts.aggregation_of(agg, L_const),
    )


@register(source="Understanding R1-Zero-Like Training, arXiv:2503.20783", budget={"L_const": 1.0})
def dr_grpo(
    L_const: float,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    eps: float | None = None,
    singleton: str = "zero",  # noqa: N803
    log_ratio_clip: float = 20.0,
) -> Objective:
    """GRPO Done Right: ``A_i = reward_i - group mean``, token-level clip, sums over tokens divided by the constant
    ``L_const``.

    Shapes: logp [B, T], reward [B]. ``L_const`` is the generation budget, the same for all steps; never the padded
      width.
    """
    low, high = _eps(eps, eps_low, eps_high, (0.2, 0.2))
    return policy_gradient(
        advantage=parts.group_normalized(scale="none", singleton=singleton),
        ratio=parts.token(log_ratio_clip),
        surrogate=parts.clipped(low, high),
        aggregate=aggregation.seq_sum_const(L_const),
    )


@register(source="DAPO, arXiv:2503.14476", budget={"max_len": 1.0, "buffer": 0.2})
def dapo(
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    eps: float | None = None,
    max_len: int = 20480,
    buffer: int = 4096,
    penalty: float = 1.0,
    adv_eps: float = 1e-6,
    singleton: str = "zero",
    dual_clip: float | None = None,
    log_ratio_clip: float = 20.0,
) -> Objective:
    """Decoupled Clip and Dynamic sAmpling: solved and failed groups leave, long answers pay, clip-higher, token mean,
    no KL.

    Order: filter on ``correct``, then ``reward + p(length)``, then GRPO advantages. Shapes: logp [B, T], reward,
      correct [B].

    Args:
      max_len, buffer: tokens; ``p`` falls from 0 at ``max_len - buffer`` to ``-penalty`` at ``max_len``. A Python 0
        ``penalty`` removes the shaping.
      dual_clip: the released recipe uses 10, the paper none.
    """
    low, high = _eps(eps, eps_low, eps_high, (0.2, 0.28))
    shaping = [] if is_off(penalty) else [parts.overlong(max_len, buffer, penalty)]
    return policy_gradient(
        advantage=parts.group_normalized(adv_eps, singleton=singleton),
        ratio=parts.token(log_ratio_clip),
        surrogate=parts.clipped(low, high, dual_clip),
        filters=[parts.mixed_groups()],
        shaping=shaping,
        aggregate=aggregation.token_mean,
        protocol="dynamic_sampling",
    )
