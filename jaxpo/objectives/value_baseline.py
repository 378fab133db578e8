"""Objectives whose baseline is a value: of a prompt, tracked over training, or of a prefix, by Monte Carlo."""

from typing import Literal

from jaxpo.arguments import AboveOne, NonNegative, Positive, PositiveOrInfinite, Whole, when
from jaxpo.objectives.clipped import clipped_tokens, eps_pair
from jaxpo.objectives.grammar.base import Gathering, Objective
from jaxpo.objectives.grammar.policy_gradient import policy_gradient
from jaxpo.objectives.parts import advantages, ratios, regularizers, surrogates
from jaxpo.primitives import aggregation
from jaxpo.registry import register


@register(source="SPO (Tencent), arXiv:2509.13232; verl-recipe spo")
def spo_single_stream(
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.28,
    eps: Positive | None = None,
    dual_clip: AboveOne = 10.0,
    adv_eps: NonNegative = 1e-8,
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """Single-stream Policy Optimization: one response a prompt against a value tracked for the prompt, ``A = reward -
    v`` standardized over the batch; clip-higher, dual clip, token mean.

    Shapes: logp [B, T], reward [B] in [0, 1], tracker_value [B]. The protocol of the same name keeps the tracker,
      draws prompts by ``sqrt(v (1 - v)) + 0.05`` and measures how far the policy has moved since it last saw them."""
    return clipped_tokens(
        advantages.spo_single_stream(adv_eps),
        eps_pair(eps, eps_low, eps_high, (0.2, 0.28)),
        agg="token_mean",
        dual_clip=dual_clip,
        log_ratio_clip=log_ratio_clip,
        protocol=Gathering("spo_single_stream"),
    )


@register(source="SPO (segments), arXiv:2505.23564; AIFrameResearch/SPO", when={"interval": when(form="chain")})
def spo_segment(
    form: Literal["chain", "tree"] = "chain",
    interval: Whole = 5,
    threshold: Positive = 0.9,
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.2,
    eps: Positive | None = None,
    beta: NonNegative = 0.0,
    log_ratio_clip: PositiveOrInfinite = 10.0,
) -> Objective:
    """Segment Policy Optimization: a segment's advantage is the gain in value from its first token to the next
    segment's, values by extra rollouts; PPO clip over the tokens of probability below ``threshold`` only.

    Shapes: logp, logp_old [B, T], reward [B]; "chain": mc_value [B, T], the value of the prefix before each
      cutpoint; "tree": edge_adv [B].

    Args:
      form: "chain": cutpoints at every ``interval``-th token of low probability; "tree": rows are the edges of a
        tree of rollouts.
      beta: k3 to the reference over all tokens; a Python 0 removes it."""
    return policy_gradient(
        advantage=advantages.spo_segment(form, interval, threshold),
        ratio=ratios.token(log_ratio_clip),
        surrogate=surrogates.clipped(*eps_pair(eps, eps_low, eps_high, (0.2, 0.2))),
        regularizers=[(beta, regularizers.kl_to_reference("k3"))],
        aggregate=aggregation.token_mean,
        protocol=Gathering("spo_segment", dict(form=form, interval=interval, threshold=threshold)),
    )
