"""Critic-free policy gradients: objectives whose advantage compares the responses to one prompt."""

from collections.abc import Callable
from typing import Any, Literal

from jaxpo.arguments import NONZERO, AboveOne, NonNegative, Positive, PositiveOrInfinite, Share, Threshold, Whole, when
from jaxpo.objectives.clipped import EMPTY_WHEN, clipped_tokens, eps_pair
from jaxpo.objectives.grammar.base import Gathering, Objective, is_off
from jaxpo.objectives.grammar.policy_gradient import policy_gradient
from jaxpo.objectives.parts import advantages, aggregation_of, filters, ratios, regularizers, shaping, surrogates
from jaxpo.objectives.parts.advantages import ADORA_WHEN, CANON_WHEN, Schedule
from jaxpo.objectives.parts.shaping import OVERLONG_WHEN
from jaxpo.primitives import aggregation
from jaxpo.primitives.advantages import Scale, Singleton
from jaxpo.primitives.aggregation import EmptyRows
from jaxpo.registry import register


@register(source="Williams 1992, Machine Learning 8", when=EMPTY_WHEN)
def reinforce(
    baseline: Literal["none", "batch_mean"] = "none", agg: str = "token_mean", empty_rows: EmptyRows = "count"
) -> Objective:
    """REINFORCE for sequence rewards: ``-sg(A_i) logp[i, t]``, ``A_i = reward_i - m``.

    Shapes: logp [B, T], reward [B]. ``logp_old`` plays no part.

    Args:
      baseline: m = 0 ("none") or the batch mean of rewards ("batch_mean").
      agg: "token_mean", "seq_mean", or "seq_sum" (the gradient of the expected sequence reward; the others reweigh by
        length)."""
    return policy_gradient(
        advantage=advantages.reward(baseline),
        ratio=ratios.token(),
        surrogate=surrogates.log_prob(),
        aggregate=aggregation_of(agg, empty_rows=empty_rows),
    )


PPO_FORM = dict.fromkeys(("eps_low", "eps_high", "eps", "log_ratio_clip"), when(form="ppo"))


@register(source="Back to Basics, arXiv:2402.14740; TRL RLOOTrainer", when=PPO_FORM)
def rloo(
    form: Literal["reinforce", "ppo"] = "reinforce",
    beta: NonNegative = 0.05,
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.2,
    eps: Positive | None = None,
    normalize: bool = False,
    singleton: Singleton = "zero",
    log_ratio_clip: PositiveOrInfinite = 20.0,
    empty_rows: EmptyRows = "count",
) -> Objective:
    """REINFORCE Leave-One-Out, sequence level, with the KL in the reward.

    ``R_i = reward_i - beta sum_t (logp_old - logp_ref)``; ``A_i = R_i - mean of the other R of the group``. Shapes:
    logp [B, T], reward [B].

    Args:
      form: "reinforce": ``-mean_i A_i sum_t logp[i, t]``; "ppo": the clipped surrogate on the ratio of whole
        sequences (TRL).
      beta: KL coefficient; a Python 0 removes the need for ``logp_ref``.
      eps_low, eps_high, eps, log_ratio_clip: of form "ppo" only.
      normalize: standardize advantages over the batch. singleton: see `advantages.leave_one_out`.
    """
    common = dict(
        advantage=advantages.leave_one_out(singleton, normalize),
        shaping=[] if is_off(beta) else [shaping.kl_in_reward(beta)],
    )
    if form == "reinforce":
        return policy_gradient(
            ratio=ratios.token(),
            surrogate=surrogates.log_prob(),
            aggregate=aggregation_of("seq_sum", empty_rows=empty_rows),
            **common,
        )
    return policy_gradient(
        ratio=ratios.sequence_sum(log_ratio_clip),
        surrogate=surrogates.clipped(*eps_pair(eps, eps_low, eps_high, (0.2, 0.2))),
        aggregate=aggregation_of("seq_mean", empty_rows=empty_rows),
        **common,
    )


BASELINE = {"kl_estimator": when(variant="baseline", kl_coef=NONZERO), "singleton": when(variant="baseline")}


@register(source="REINFORCE++, arXiv:2501.03262; verl reinforce_plus_plus", when=BASELINE)
def reinforce_pp(
    variant: Literal["standard", "baseline"] = "standard",
    gamma: Share = 1.0,
    kl_coef: NonNegative = 0.01,
    kl_estimator: Literal["k2", "k3"] = "k2",
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.2,
    eps: Positive | None = None,
    singleton: Singleton = "zero",
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """REINFORCE++: returns-to-go with a KL per token in the reward, whitened over all tokens of the batch; PPO clip,
    token mean.

    ``rho_t = -kl_coef (logp_old - logp_ref)``, plus the reward at the last token; ``G_t = sum_{s>=t} gamma^(s-t)
    rho_s``; ``A`` is G whitened. Shapes: logp [B, T], reward [B].

    Args:
      variant: "standard", or "baseline": the reward less its group's mean, and the KL a term of the loss.
      kl_coef: a Python 0 removes the need for ``logp_ref``. kl_estimator: "k2" or "k3", of variant "baseline" only.
      singleton: of variant "baseline": what a group of one row gets ("zero", "raw").
    """
    baseline = variant == "baseline"
    kl = [(kl_coef, regularizers.kl_to_reference(kl_estimator))] if baseline else []
    return policy_gradient(
        advantage=advantages.reinforce_pp(gamma, 0.0 if baseline else kl_coef, baseline, singleton),
        ratio=ratios.token(log_ratio_clip),
        surrogate=surrogates.clipped(*eps_pair(eps, eps_low, eps_high, (0.2, 0.2))),
        regularizers=kl,
        aggregate=aggregation.token_mean,
    )


GRPO_WHEN = EMPTY_WHEN | {"adv_eps": when(scale=("group", "batch")), "kl_is": when(beta=NONZERO)}


@register(source="DeepSeekMath, arXiv:2402.03300, eq. 3-4", when=GRPO_WHEN)
def grpo(
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.2,
    eps: Positive | None = None,
    beta: NonNegative = 0.04,
    adv_eps: NonNegative = 1e-6,
    scale: Scale = "group",
    singleton: Singleton = "zero",
    dual_clip: AboveOne | None = None,
    kl_is: bool = False,
    agg: str = "seq_mean",
    L_const: Positive | None = None,  # noqa: N803
    log_ratio_clip: PositiveOrInfinite = 20.0,
    empty_rows: EmptyRows = "count",
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
      empty_rows: whether rows without tokens "count" in the number of rows (TRL), or "leave" it (verl)."""
    weighted = dict(is_weighted=True, log_ratio_clip=log_ratio_clip) if kl_is else {}
    return policy_gradient(
        advantage=advantages.group_normalized(adv_eps, scale, singleton=singleton),
        ratio=ratios.token(log_ratio_clip),
        surrogate=surrogates.clipped(*eps_pair(eps, eps_low, eps_high, (0.2, 0.2)), dual_clip),
        regularizers=[(beta, regularizers.kl_to_reference("k3", **weighted))],
        aggregate=aggregation_of(agg, L_const, empty_rows),
    )


@register(source="Understanding R1-Zero-Like Training, arXiv:2503.20783", budget={"L_const": 1.0})
def dr_grpo(
    L_const: Positive,  # noqa: N803
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.2,
    eps: Positive | None = None,
    singleton: Singleton = "zero",
    log_ratio_clip: PositiveOrInfinite = 20.0,
    empty_rows: EmptyRows = "count",
) -> Objective:
    """GRPO Done Right: ``A_i = reward_i - group mean``, token-level clip, sums over tokens divided by the constant
    ``L_const``.

    Shapes: logp [B, T], reward [B]. ``L_const`` is the generation budget, the same for all steps; never the padded
      width."""
    return clipped_tokens(
        advantages.group_normalized(scale="none", singleton=singleton),
        eps_pair(eps, eps_low, eps_high, (0.2, 0.2)),
        agg="seq_sum_const",
        empty_rows=empty_rows,
        L_const=L_const,
        log_ratio_clip=log_ratio_clip,
    )


@register(source="DAPO, arXiv:2503.14476", budget={"max_len": 1.0, "buffer": 0.2}, when=OVERLONG_WHEN)
def dapo(
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.28,
    eps: Positive | None = None,
    max_len: Whole = 20480,
    buffer: Whole = 4096,
    penalty: NonNegative = 1.0,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    dual_clip: AboveOne | None = None,
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """Decoupled Clip and Dynamic sAmpling: solved and failed groups leave, long answers pay, clip-higher, token mean,
    no KL.

    Order: filter on ``correct``, then ``reward + p(length)``, then GRPO advantages. Shapes: logp [B, T], reward,
      correct [B].

    Args:
      max_len, buffer: tokens; ``p`` falls from 0 at ``max_len - buffer`` to ``-penalty`` at ``max_len``. A Python 0
        ``penalty`` removes the shaping.
      dual_clip: the released recipe uses 10, the paper none."""
    return clipped_tokens(
        advantages.group_normalized(adv_eps, singleton=singleton),
        eps_pair(eps, eps_low, eps_high, (0.2, 0.28)),
        agg="token_mean",
        dual_clip=dual_clip,
        log_ratio_clip=log_ratio_clip,
        filters=[filters.mixed_groups()],
        shaping=[] if is_off(penalty) else [shaping.overlong(max_len, buffer, penalty)],
        protocol=Gathering("dapo"),
    )


@register(source="Lite PPO, in Part I: Tricks or Traps?, arXiv:2508.08221")
def lite_ppo(
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.2,
    eps: Positive | None = None,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """Lite PPO: ``A = (reward - group mean) / (std of all rewards of the batch + adv_eps)``, PPO clip, token mean; no
    critic, no KL.

    Shapes: logp [B, T], reward [B]."""
    return clipped_tokens(
        advantages.lite_ppo(adv_eps, singleton),
        eps_pair(eps, eps_low, eps_high, (0.2, 0.2)),
        agg="token_mean",
        log_ratio_clip=log_ratio_clip,
    )


@register(source="GDPO, arXiv:2601.05242; TRL multi_objective_aggregation")
def gdpo(
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.2,
    eps: Positive | None = None,
    adv_eps: NonNegative = 1e-4,
    whiten: bool = True,
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """Group reward-Decoupled normalization: each of several rewards is normalized in its group before they are added,
    so that none drowns in another's spread; PPO clip, token mean.

    ``A_i = sum_k w_k (r_ik - group mean) / (group std + adv_eps)``, standardized over the batch. Shapes: logp [B, T],
    rewards_multi, reward_weights [B, R].

    Args:
      whiten: standardize the sum over the batch."""
    return clipped_tokens(
        advantages.gdpo(adv_eps, whiten),
        eps_pair(eps, eps_low, eps_high, (0.2, 0.2)),
        agg="token_mean",
        log_ratio_clip=log_ratio_clip,
    )


@register(source="BNPO, arXiv:2506.02864; code of changyi7231/BNPO")
def bnpo(
    min: float = 0.0,
    max: float = 1.0,
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.28,
    eps: Positive | None = None,
    dual_clip: AboveOne = 10.0,
    components: bool = False,
    singleton: Singleton = "zero",
    log_ratio_clip: PositiveOrInfinite = 20.0,
    empty_rows: EmptyRows = "count",
) -> Objective:
    """Beta Normalization: each prompt weighs 1 over the density, at its success rate, of a Beta distribution fitted
    to the batch's success rates; PPO clip, dual clip, sequence sums. Not what TRL calls "bnpo".

    Shapes: logp [B, T], reward [B] (or ``rewards_multi`` [B, R]).

    Args:
      min, max: range of the rewards; one outside is an error. components: average the advantages of ``rewards_multi``.
    """
    return clipped_tokens(
        advantages.bnpo(min, max, components, singleton),
        eps_pair(eps, eps_low, eps_high, (0.2, 0.28)),
        agg="seq_sum",
        empty_rows=empty_rows,
        dual_clip=dual_clip,
        log_ratio_clip=log_ratio_clip,
    )


@register(source="A-GRAE, arXiv:2602.05548; code of Yu7-code/A-GRAE", when=EMPTY_WHEN)
def a_grae(
    alpha: Positive = 1.0,
    easy_form: Literal["paper", "official"] = "paper",
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.2,
    eps: Positive | None = None,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    dual_clip: AboveOne | None = None,
    agg: str = "seq_mean",
    L_const: Positive | None = None,  # noqa: N803
    log_ratio_clip: PositiveOrInfinite = 20.0,
    empty_rows: EmptyRows = "count",
) -> Objective:
    """Asymmetric Group Relative Advantage Estimation: hard questions weigh more early and easy ones late, positive
    advantages are damped by ``min(1, omega / alpha)`` while the mean success rate omega is low; GRPO's loss without a
    KL.

    Shapes: logp [B, T], reward [B] in [0, 1].

    Args:
      alpha: 1 for mathematics in text, 0.5 for geometry and medicine. easy_form: "paper" (``sqrt(1-p)``) or "official".
    """
    return clipped_tokens(
        advantages.a_grae(alpha, easy_form, adv_eps, singleton),
        eps_pair(eps, eps_low, eps_high, (0.2, 0.2)),
        agg=agg,
        empty_rows=empty_rows,
        L_const=L_const,
        dual_clip=dual_clip,
        log_ratio_clip=log_ratio_clip,
    )


@register(
    source="ADORA, arXiv:2602.10019; code of ShadeCloak/ADORA", budget={"max_len": 1.0}, when=ADORA_WHEN | EMPTY_WHEN
)
def adora(
    max_len: PositiveOrInfinite | None = None,
    lam: NonNegative = 0.1,
    rule: Literal["llm", "vlm"] | Callable[..., Any] = "llm",
    correct_score: Threshold = 0.5,
    beta: NonNegative = 0.001,
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.2,
    eps: Positive | None = None,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    dual_clip: AboveOne | None = None,
    agg: str = "seq_mean",
    L_const: Positive | None = None,  # noqa: N803
    log_ratio_clip: PositiveOrInfinite = 20.0,
    empty_rows: EmptyRows = "count",
) -> Objective:
    """Advantage Dynamics via Online Rollout Adaptation: GRPO whose advantage counts ``lam`` in groups where the
    longest right answer is not longer than the wrong ones are on average.

    Shapes: logp [B, T], reward [B].

    Args:
      max_len: wrong answers as long are truncated and left out of the comparison (a run takes its generation budget);
        None or infinite: all wrong answers are compared.
      rule: "llm", "vlm" (how one-sided groups count), or a function batch -> [B] bool.
      correct_score: rewards above it are right (the released 1.01 belongs to another reward).
    """
    return clipped_tokens(
        advantages.adora(max_len, lam, rule, correct_score, adv_eps, singleton),
        eps_pair(eps, eps_low, eps_high, (0.2, 0.2)),
        agg=agg,
        empty_rows=empty_rows,
        L_const=L_const,
        dual_clip=dual_clip,
        beta=beta,
        log_ratio_clip=log_ratio_clip,
    )


@register(source="CANON, arXiv:2509.23962; code of biuboomc/CANON", when=CANON_WHEN)
def canon(
    metric: Literal["entropy", "length"] = "entropy",
    mu: Share = 1.0,
    mu_schedule: Schedule = "constant",
    mu_period: Whole | None = None,
    alpha: NonNegative = 1.0,
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.28,
    eps: Positive | None = None,
    dual_clip: AboveOne = 3.0,
    L_const: Positive = 8192.0,  # noqa: N803
    singleton: Singleton = "zero",
    log_ratio_clip: PositiveOrInfinite = 20.0,
    empty_rows: EmptyRows = "count",
) -> Objective:
    """Conditional Advantage Estimation: the group is split by entropy or length, and ``A = mu (reward - mean of the
    other half) + (1 - mu) (reward - mean of the own half)``; PPO clip, dual clip, sequence sums over ``L_const``.

    Shapes: logp [B, T], reward [B], entropy_old [B, T] (metric "entropy"). ``mu = 1/2`` with even groups is Dr. GRPO.

    Args:
      mu_schedule: "constant", "accuracy", "inverse_accuracy" (of the batch), or "cosine" with restarts each
        ``mu_period`` iterations.
      alpha: damps the long (metric "length") or the low-entropy half of the first bracket.
    """
    return clipped_tokens(
        advantages.canon(metric, mu, mu_schedule, mu_period, alpha, singleton),
        eps_pair(eps, eps_low, eps_high, (0.2, 0.28)),
        agg="seq_sum_const",
        empty_rows=empty_rows,
        L_const=L_const,
        dual_clip=dual_clip,
        log_ratio_clip=log_ratio_clip,
    )
