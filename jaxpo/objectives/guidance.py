"""Objectives whose rows begin with a hint, or were repaired by somebody else."""

from jaxpo.arguments import NonNegative, Positive, PositiveOrInfinite
from jaxpo.objectives.clipped import clipped_tokens, eps_pair
from jaxpo.objectives.grammar.base import Gathering, Objective
from jaxpo.objectives.grammar.policy_gradient import policy_gradient
from jaxpo.objectives.hybrid import LUFFY_WHEN, luffy
from jaxpo.objectives.parts import advantages, ratios, shaping, surrogates
from jaxpo.primitives import aggregation
from jaxpo.primitives.advantages import Singleton
from jaxpo.registry import register

CRITIQUE_WHEN = {name: LUFFY_WHEN[name] for name in ("eps", "adv_eps")}


@register(source="GHPO, arXiv:2507.10628; code of hkgc-1/GHPO")
def ghpo(
    w_acc: NonNegative = 1.0,
    w_fmt: NonNegative = 0.5,
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.2,
    eps: Positive | None = None,
    beta_kl: NonNegative = 0.0,
    adv_eps: NonNegative = 1e-4,
    singleton: Singleton = "zero",
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """Guided Hybrid Policy Optimization: GRPO on the answers to the easiest version of each prompt that is needed; a
    prompt that the policy never solves is asked again with the beginning of its solution (protocol ``ghpo``).

    The reward is ``w_acc accuracy + w_fmt format``, ``A = (reward - group mean) / (group std + adv_eps)``; PPO clip,
    token mean. Shapes: logp [B, T]; rewards_multi, reward_weights [B, R], accuracy first. Hints are part of the prompt
    and get no gradient.

    Args:
      w_acc, w_fmt: of the first reward and of the others; the task's own weights play no part. A task with one reward
        needs ``w_fmt=0``.
      beta_kl: of ``beta_kl k3`` to the reference; a Python 0 removes the need for ``logp_ref``.
    """
    return clipped_tokens(
        advantages.group_normalized(adv_eps, singleton=singleton),
        eps_pair(eps, eps_low, eps_high, (0.2, 0.2)),
        agg="token_mean",
        beta=beta_kl,
        log_ratio_clip=log_ratio_clip,
        shaping=[shaping.accuracy_and_format(w_acc, w_fmt)],
        protocol=Gathering("ghpo"),
    )


@register(
    source="ADHint, arXiv:2512.13095 (reconstructed from a secondary text: modulation, weights and defaults assumed)"
)
def adhint(
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.2,
    eps: Positive | None = None,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """Adaptive Hints with Difficulty Priors: ``c clip_surrogate(r, A)``, token mean, over answers from scratch and
    answers that began with a hint (role ``hinted``; protocol ``adhint``).

    A is GRPO's over both kinds, times ``1 + gap`` on the good answers without a hint and on the bad ones with one, gap
    how much better the hinted ones are. c is 1 off the hint; on it, 0 in rows with A < 0, else how alike the token's
    entropy is to that of the row's other tokens. Shapes: logp, hint_mask, entropy_old [B, T], reward [B]. Tokens of
    hints stay in the denominator.
    """
    low, high = eps_pair(eps, eps_low, eps_high, (0.2, 0.2))
    return policy_gradient(
        advantage=advantages.hinted(adv_eps, singleton),
        ratio=ratios.token(log_ratio_clip),
        surrogate=surrogates.clipped(low, high),
        aggregate=aggregation.token_mean,
        protocol=Gathering("adhint"),
    )


@register(source="Critique-GRPO, arXiv:2506.03106; code of zhangxy-2019/critique-GRPO", budget={}, when=CRITIQUE_WHEN)
def critique_grpo(
    gamma: Positive = 0.1,
    clip: bool = False,
    eps: Positive = 0.2,
    use_std: bool = True,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    entropy_coef: NonNegative = 0.001,
    agg: str = "token_mean",
    L_const: Positive | None = None,  # noqa: N803
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """`luffy`, whose expert rows are the policy's own refinements: answers that it gave after a critique, trained under
    the original prompt (protocol ``critique_grpo``).

    Shapes: logp [B, T]; reward, role [B]. Arguments as in `luffy`; the std is on here, as in the runs of the paper.
    """
    loss = luffy(
        gamma=gamma,
        clip=clip,
        **(dict(eps=eps) if clip else {}),
        use_std=use_std,
        **(dict(adv_eps=adv_eps) if use_std else {}),
        singleton=singleton,
        entropy_coef=entropy_coef,
        agg=agg,
        L_const=L_const,
        log_ratio_clip=log_ratio_clip,
    )
    return loss._replace(protocol=Gathering("critique_grpo"))


@register(source="SCOPE, arXiv:2602.24110 (reconstructed from abstract and summaries: loss and defaults assumed)")
def scope(
    gamma: Positive = 0.1,
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.2,
    eps: Positive | None = None,
    use_std: bool = True,
    singleton: Singleton = "zero",
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """Step-wise Correction for On-policy Exploration: GRPO on the policy's own tokens, and ``-f(p) A`` with ``f(p) =
    p / (p + gamma)`` on the tokens with which a corrector went on from the first wrong step (protocol ``scope``).

    Token mean. Shapes: logp, off_mask [B, T], reward [B]. ``logp_old`` of the corrector's tokens is not read.

    Args:
      use_std: divide A by the group's std + 1e-6.
    """
    low, high = eps_pair(eps, eps_low, eps_high, (0.2, 0.2))
    return policy_gradient(
        advantage=advantages.group_normalized(scale="group" if use_std else "none", singleton=singleton),
        ratio=ratios.token(log_ratio_clip),
        surrogate=surrogates.by_token(surrogates.clipped(low, high), "off_mask", surrogates.shaped_probability(gamma)),
        aggregate=aggregation.token_mean,
        protocol=Gathering("scope"),
    )
