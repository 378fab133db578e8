"""Objectives that learn from which of the policy's own answers succeed: imitation of the good ones, and of what they
lack, flawed successes, sums of several rewards."""

from typing import Literal

import jax.numpy as jnp
from jax import Array

from jaxpo.arguments import NONZERO, AboveOne, NonNegative, Positive, PositiveOrInfinite, Whole, when
from jaxpo.batch import Rollouts, TokenStats
from jaxpo.objectives.clipped import clipped_tokens, eps_pair
from jaxpo.objectives.grammar.base import Gathering, Hooks, Objective, State, Term, asks_of, from_terms, is_off
from jaxpo.objectives.grammar.parts import Advantage, Surrogate
from jaxpo.objectives.grammar.policy_gradient import policy_gradient
from jaxpo.objectives.parts import advantages, aggregation_of, filters, ratios, regularizers, shaping, surrogates
from jaxpo.objectives.parts.shaping import OVERLONG_WHEN
from jaxpo.primitives import aggregation, imitation
from jaxpo.primitives.advantages import Singleton
from jaxpo.primitives.grouping import group_mean
from jaxpo.primitives.imitation import Select
from jaxpo.primitives.numerics import promote
from jaxpo.registry import register

RFT_WHEN = {"threshold": when(select=("correct", "first_correct"))}


@register(source="RFT, arXiv:2308.01825; best of K: RAFT, arXiv:2304.06767", when=RFT_WHEN)
def rft(
    select: Select = "correct",
    threshold: float = 1.0,
    agg: str = "token_mean",
    L_const: Positive | None = None,  # noqa: N803
) -> Objective:
    """Rejection-sampling fine-tuning: ``-logp`` of the policy's own good answers, averaged over these.

    Shapes: logp [B, T], reward [B]. The other rows leave every denominator.

    Args:
      select: "correct": rows with ``reward >= threshold``; "first_correct": the first of them of each prompt; "best":
        each prompt's row of the highest reward, whatever it is (RAFT).
    """
    needs = ("reward",) if select == "correct" else ("reward", "group")

    def choose(b: Rollouts, s: State) -> tuple[Rollouts, State]:
        kept = imitation.selected(b.reward, b.group, b.count, select=select, threshold=threshold)
        return b.replace(count=b.count * kept), s

    nll = Term("nll", lambda stats, b, s: -stats.logp, aggregation_of(agg, L_const))
    return from_terms([nll], asks=asks_of(*needs), hooks=Hooks(prepare=choose))


NFT_WHEN = {
    "agg": when(ratio_type="token"),
    "L_const": when(ratio_type="token", agg=tuple(aggregation.WITH_CONSTANT)),
    "clamp_neg": when(neg_weight=NONZERO),
}


@register(source="NFT, arXiv:2505.18116; code of NVlabs/NFT", when=NFT_WHEN)
def nft(
    neg_weight: NonNegative = 1.0,
    clamp_pos: NonNegative = 0.0,
    clamp_neg: Positive = 1.0,
    normalize: Literal[0, 1, 2] = 1,
    ratio_type: Literal["token", "sequence"] = "token",
    agg: str = "sum_const",
    L_const: Positive | None = 1000.0,  # noqa: N803
) -> Objective:
    """Negative-aware fine-tuning: the likelihood of good answers, and of bad ones under the policy that is left when
    the good ones are taken out of the old one.

    ``omega(q) (c pos + (1 - c) neg_weight neg)``; ``pos = -log floor(R, clamp_pos)``, ``neg = -log floor((1 - q R) / (1
    - q), clamp_neg)``, ``R = exp(min(logp - logp_old, 10))``, c the reward in {0, 1}, q the mean reward of the prompt
    in [0.02, 0.98]. The floors pass the gradient on. Prompts without both outcomes leave. Shapes: logp [B, T]; reward
    [B].

    Args:
      neg_weight: 0 imitates the good answers alone.
      normalize: omega is 1 (0), ``1 - q`` (1: on policy the gradient of mean-centred advantages), or ``sqrt((1 - q) /
        q)`` (2: of GRPO with the population std).
      ratio_type: one R a token, or one a row, of the sum of its log-ratios; the loss is then the sum over rows.
      agg, L_const: the released code divides the sum over tokens by 1000.
    """
    omega = {0: jnp.ones_like, 1: lambda q: 1 - q, 2: lambda q: jnp.sqrt((1 - q) / q)}[normalize]

    def rate(b: Rollouts, s: State) -> Array:
        return jnp.clip(group_mean(b.reward, b.group, b.count), 0.02, 0.98)

    def value(x: Array, q: Array, stats: TokenStats, b: Rollouts, s: State) -> Array:
        q = jnp.where(q > 0, q, 0.5)  # rows that do not count hold 0
        c = promote(b.reward) if x.ndim == 1 else promote(b.reward)[:, None]
        clamps = dict(neg_weight=neg_weight, clamp_pos=clamp_pos, clamp_neg=clamp_neg)
        return omega(q) * imitation.negative_aware(x, c, q, **clamps)

    token = ratio_type == "token"
    return policy_gradient(
        advantage=Advantage(rate, asks_of("reward", "group", responses=2, rewards=(0.0, 1.0)), id="success_rate"),
        ratio=ratios.token(jnp.inf) if token else ratios.sequence_sum(jnp.inf),
        surrogate=Surrogate(value, per="token" if token else "row", id="negative_aware"),
        aggregate=aggregation_of(agg, L_const if agg in aggregation.WITH_CONSTANT else None)
        if token
        else aggregation.row_sum,
        filters=[filters.solved_sometimes()],
        protocol=Gathering("dapo"),
    )


@register(
    source="FAPO, arXiv:2510.22543; recipe/fapo of volcengine/verl",
    budget={"max_len": 1.0, "buffer": 0.5},
    when=OVERLONG_WHEN,
)
def fapo(
    lam: NonNegative = 1.0,
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.28,
    eps: Positive | None = None,
    max_len: Whole = 8192,
    buffer: Whole = 4096,
    penalty: NonNegative = 1.0,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    dual_clip: AboveOne | None = None,
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """Flawed-Aware Policy Optimization: GRPO with the reward 1 for a right answer, -1 for a wrong one, less ``lam`` for
    a right answer with a wrong step in it.

    Shapes: logp [B, T]; correct, flawed [B]. ``flawed`` of a wrong answer is not read.

    Args:
      lam: 1 makes a flawed success worth 0.
      max_len, buffer, penalty: long answers pay, as in `dapo`; a Python 0 ``penalty`` removes that.
      dual_clip: the released scripts use 10.
    """
    edits = [shaping.less_flawed(lam)] + ([] if is_off(penalty) else [shaping.overlong(max_len, buffer, penalty)])
    return clipped_tokens(
        advantages.group_normalized(adv_eps, singleton=singleton),
        eps_pair(eps, eps_low, eps_high, (0.2, 0.28)),
        agg="token_mean",
        dual_clip=dual_clip,
        log_ratio_clip=log_ratio_clip,
        shaping=edits,
        protocol=Gathering("fapo"),
    )


POLICY_CLIFF_WHEN = {"adv_eps": when(use_std=True)}


@register(source="The Policy Cliff, arXiv:2507.20150 (normalization and alpha assumed)", when=POLICY_CLIFF_WHEN)
def policy_cliff(
    alpha: NonNegative = 0.01,
    use_std: bool = True,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    agg: str = "token_mean",
    L_const: Positive | None = None,  # noqa: N803
) -> Objective:
    """REINFORCE of the effective reward ``R = sum_k weight_k reward_k`` with the entropy bonus that makes the map from
    rewards to policies stable: ``-A logp - alpha H``, A the group-normalized R, H differentiable.

    Shapes: logp, entropy [B, T]; rewards_multi, reward_weights [B, R], weights of each row. No ratio, no clip. The
    soft-optimal policies of two rewards then differ by at most ``||R1 - R2||_inf / (2 alpha (1 - gamma))`` in total
    variation; without the bonus they jump where two answers tie.
    """
    return policy_gradient(
        advantage=advantages.group_normalized(adv_eps, "group" if use_std else "none", singleton=singleton),
        ratio=ratios.token(),
        surrogate=surrogates.log_prob(),
        regularizers=[(alpha, regularizers.entropy())],
        shaping=[shaping.weighted_sum()],
        aggregate=aggregation_of(agg, L_const),
    )
