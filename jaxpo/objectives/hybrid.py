"""Objectives that learn from demonstrations, alone or mixed with reinforcement learning."""

from typing import Literal

from jaxpo.arguments import NonNegative, Positive, PositiveOrInfinite, when
from jaxpo.objectives.grammar.base import Gathering, Objective, Term, from_terms
from jaxpo.objectives.grammar.policy_gradient import policy_gradient
from jaxpo.objectives.parts import advantages, aggregation_of, ratios, regularizers, surrogates
from jaxpo.primitives.advantages import Singleton
from jaxpo.registry import register


@register(source="standard maximum likelihood", budget={})
def sft(agg: str = "token_mean", L_const: Positive | None = None) -> Objective:  # noqa: N803
    """Supervised fine-tuning: ``-logp`` of the completion tokens, averaged over the whole batch.

    Shapes: logp [B, T]. Prompt tokens are never trained.

    Args:
      agg, L_const: "token_mean" (default), "seq_mean", or "seq_sum_const" with its constant.
    """
    return from_terms([Term("nll", lambda stats, batch, state: -stats.logp, aggregation_of(agg, L_const))])


LUFFY_WHEN = {
    "shaping": when(recorded=False),
    "gamma": when(shaping="p_div_p", recorded=False),
    "eps": when(clip=True),
    "adv_eps": when(use_std=True),
}


@register(source="LUFFY, arXiv:2504.14945; code of ElliottYan/LUFFY", budget={}, when=LUFFY_WHEN)
def luffy(
    shaping: Literal["p_div_p", "none"] = "p_div_p",
    gamma: Positive = 0.1,
    recorded: bool = False,
    clip: bool = False,
    eps: Positive = 0.2,
    use_std: bool = False,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    entropy_coef: NonNegative = 0.0,
    agg: str = "token_mean",
    L_const: Positive | None = None,  # noqa: N803
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """Mixed-policy GRPO: own rows ``-r A``, expert rows ``-f(p) A`` with ``p = exp(logp)``, unclipped; A over own and
    expert rows of a prompt together.

    The expert's own probability is taken as 1, or as recorded. Shapes: logp [B, T]; reward, role [B].

    Args:
      shaping: ``f(p) = p / (p + gamma)`` ("p_div_p") or ``f(p) = p`` ("none").
      recorded: expert rows get ``-p / (q + 1e-6) A`` instead, q = expert_prob [B, T].
      clip, eps: PPO's clip on own rows; the released code has none.
      use_std: divide A by the group's std + adv_eps.
      entropy_coef: of an entropy bonus; 0.001 in the released script.
      agg, L_const: over the tokens of own and expert rows.
    """
    own = surrogates.clipped(eps, eps) if clip else surrogates.linear()
    expert = surrogates.shaped_probability(gamma if shaping == "p_div_p" else None)
    if recorded:
        expert = surrogates.expert_ratio()
    return policy_gradient(
        advantage=advantages.group_normalized(adv_eps, "group" if use_std else "none", singleton=singleton),
        ratio=ratios.token(log_ratio_clip),
        surrogate=surrogates.by_role(own, expert=expert),
        regularizers=[(entropy_coef, regularizers.entropy())],
        aggregate=aggregation_of(agg, L_const),
        protocol=Gathering("demonstrations"),
    )
