"""Advantages: ``fn(batch, state) -> [B] or [B, T]``."""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from jaxpo.arguments import (
    NONZERO,
    Domain,
    NonNegative,
    NonNegativeOrInfinite,
    Positive,
    PositiveOrInfinite,
    Share,
    Threshold,
    Whole,
    number,
    when,
)
from jaxpo.batch import Rollouts, TokenStats
from jaxpo.fields import role_id
from jaxpo.metrics import Mean, Metrics
from jaxpo.objectives.grammar.base import Asks, Hooks, State, is_off
from jaxpo.objectives.grammar.parts import Advantage, asks_of, reads
from jaxpo.primitives import advantages, guidance, returns, selection, token_advantages
from jaxpo.primitives.advantages import Scale, Singleton
from jaxpo.primitives.numerics import promote, ratio_or_zero
from jaxpo.primitives.regularizers import log_prob_at
from jaxpo.registry import register

GROUPS = asks_of("reward", "group")


def compares(asks: Asks, singleton: Singleton = "zero") -> Asks:
    """What an advantage asks for that compares the answers to a prompt: at least two, if one alone gets 0."""
    return asks._replace(responses=2) if singleton == "zero" else asks


@register("advantage", source="Williams 1992")
def reward(baseline: Literal["none", "batch_mean"] = "none") -> Advantage:
    """``A_i = reward_i - m``, m = 0 (``none``) or the mean of the counted rewards (``batch_mean``)."""
    if baseline == "none":
        return Advantage(lambda b, s: b.reward, asks_of("reward"))
    return Advantage(*reads(advantages.batch_centered))


@register("advantage", id="grpo", source="DeepSeekMath, arXiv:2402.03300")
@register(
    "advantage",
    source="DeepSeekMath, arXiv:2402.03300",
    when={"adv_eps": when(scale=("group", "batch")), "ddof": when(scale=("group", "batch"))},
)
def group_normalized(
    adv_eps: NonNegative = 1e-6,
    scale: Scale = "group",
    ddof: Literal[0, 1] = 1,
    singleton: Singleton = "zero",
    clip: Positive | None = None,
) -> Advantage:
    """``A_i = (reward_i - group mean) / (std + adv_eps)``; see `jaxpo.primitives.advantages.group_normalized`.

    Args:
      scale: the std of the "group", of the whole "batch", or "none". ddof: 1 = sample std, 0 = population std.
      singleton: a group of one row gets "zero", or "raw" = its reward.
      clip: bound of ``|A|``; None = no bound."""
    options = dict(scale=scale, adv_eps=adv_eps, ddof=ddof, singleton=singleton)
    fn, asks = reads(advantages.group_normalized, **options)
    bounded = fn if clip is None else lambda b, s: jnp.clip(fn(b, s), -clip, clip)
    return Advantage(bounded, compares(asks, singleton))


@register("advantage", source="arXiv:2508.08221")
def lite_ppo(adv_eps: NonNegative = 1e-6, singleton: Singleton = "zero") -> Advantage:
    """``A_i = (reward_i - group mean) / (std of all rewards of the batch + adv_eps)``."""
    return group_normalized(adv_eps, "batch", singleton=singleton)


@register("advantage", id="rloo", source="RLOO, arXiv:2402.14740")
@register("advantage", source="RLOO, arXiv:2402.14740")
def leave_one_out(singleton: Singleton = "zero", normalize: bool = False) -> Advantage:
    """``A_i = K/(K-1) (reward_i - group mean)``, then optionally standardized over the batch (``adv_eps`` 1e-4)."""
    fn, asks = reads(advantages.leave_one_out, singleton=singleton)
    asks = compares(asks, singleton)
    return Advantage(lambda b, s: advantages.batch_standardized(fn(b, s), b.count) if normalize else fn(b, s), asks)


@register("advantage", source="Schulman et al., arXiv:1506.02438; verl compute_gae_advantage_return")
def gae(gamma: Share = 1.0, lam: Share = 0.95, kl_coef: NonNegative = 0.0) -> Advantage:
    """Generalized advantage estimation [B, T]: ``A_t = delta_t + gamma lam A_(t+1)``, ``delta_t = rho_t + gamma
    V_(t+1) - V_t`` over masked tokens, V = value_old; writes ``returns`` = A + V [B, T] for a value term.

    ``rho_t = -kl_coef (logp_old - logp_ref)``, plus the reward at the row's last token.

    Args:
      gamma: discount per token. lam: 0 = one-step differences, 1 = returns minus values.
      kl_coef: a Python 0 removes the need for ``logp_ref``.
    """

    def estimate(b: Rollouts) -> tuple[Array, Array]:
        return returns.gae(token_reward(b, promote(b.reward), kl_coef), b.get("value_old"), b.mask, gamma, lam)

    def write(b: Rollouts, s: State) -> tuple[Rollouts, State]:
        return b.with_token(returns=estimate(b)[1]), s

    needs = () if is_off(kl_coef) else ("logp_old", "logp_ref")
    asks = asks_of("reward", "value_old", *needs)
    return Advantage(lambda b, s: estimate(b)[0], asks, Hooks(prepare=write), per="token")


def token_reward(b: Rollouts, reward: Array, kl_coef: float | Array) -> Array:
    """[B, T] ``-kl_coef (logp_old - logp_ref)``, plus the reward [B] at the row's last token."""
    rewards = jnp.where(token_advantages.last_token(b.mask), reward[:, None], 0)
    if is_off(kl_coef):
        return rewards
    drift = promote(b.get("logp_old")) - promote(b.get("logp_ref"))
    return rewards - kl_coef * jnp.where(b.mask > 0, drift, 0)


@register("advantage", source="REINFORCE++, arXiv:2501.03262", when={"singleton": when(baseline=True)})
def reinforce_pp(
    gamma: Share = 1.0, kl_coef: NonNegative = 0.01, baseline: bool = False, singleton: Singleton = "zero"
) -> Advantage:
    """Returns-to-go of ``-kl_coef (logp_old - logp_ref)`` per token and the reward at the last token, whitened over all
    tokens of the batch.

    Args:
      gamma: discount per token. kl_coef: a Python 0 removes the need for ``logp_ref``.
      baseline: subtract the group mean from the reward first (``singleton`` says what a group of one row gets).
    """

    def fn(b: Rollouts, s: State) -> Array:
        reward = promote(b.reward)
        if baseline:
            reward = advantages.group_centered(b.reward, b.group, b.count, singleton=singleton)
        rewards = token_reward(b, reward, kl_coef)
        return token_advantages.token_whitened(
            token_advantages.returns_to_go(rewards, b.mask, gamma), promote(b.mask) * promote(b.count)[:, None]
        )

    needs = ("reward", *(("group",) if baseline else ()), *(() if is_off(kl_coef) else ("logp_old", "logp_ref")))
    return Advantage(fn, compares(asks_of(*needs), singleton if baseline else "raw"), per="token")


@register("advantage", source="REC, arXiv:2509.24203")
def rec(normalize: bool = False, drop: Literal["none", "balance"] = "none", singleton: Singleton = "zero") -> Advantage:
    """``reward - group mean``, over the population std + 1e-6 with ``normalize``.

    Args:
      drop: "balance" removes, at random by the row's seed, the negatives that outnumber the positives of a group; mean
        and std are those of the rest, and the removed have A = 0 (they stay in the denominators).
    """

    def fn(b: Rollouts, s: State) -> Array:
        count = promote(b.count)
        if drop == "balance":
            priority = selection.row_uniform(b.get("seed"), stream=1)
            kept = advantages.drop_excess_negatives(b.reward, b.group, b.count, priority)
            count = count * kept
        scale = "group" if normalize else "none"
        adv = advantages.group_normalized(b.reward, b.group, count, scale=scale, ddof=0, singleton=singleton)
        return jnp.where(count > 0, adv, 0)

    return Advantage(fn, compares(asks_of("reward", "group", *(("seed",) if drop == "balance" else ())), singleton))


@register("advantage", source="Kimi k1.5, arXiv:2501.12599", when={"tau": when(baseline="logavgexp")})
def opmd(
    baseline: Literal["mean", "logavgexp"] = "mean", tau: Positive = 1.0, singleton: Singleton = "zero"
) -> Advantage:
    """``reward - b_g``, ``b_g`` the group mean or ``tau log mean exp(reward / tau)`` ("logavgexp")."""
    if baseline == "mean":
        return group_normalized(scale="none", singleton=singleton)

    def fn(b: Rollouts, s: State) -> Array:
        adv = promote(b.reward) - advantages.log_average_exp(b.reward, b.group, b.count, tau=tau)
        return jnp.where(advantages.group_size(b.group, b.count) == 1, b.reward, adv) if singleton == "raw" else adv

    return Advantage(fn, compares(GROUPS, singleton))


@register("advantage", source="Asymmetric REINFORCE, arXiv:2506.20520")
def asymre(shift: float = -0.1, singleton: Singleton = "zero") -> Advantage:
    """``reward - (group mean + shift)``: with a negative shift every sampled token is pushed up a little, also in
    solved groups; filtering those out would remove the push."""
    fn, asks = reads(advantages.group_centered, singleton=singleton)
    return Advantage(lambda b, s: fn(b, s) - shift, asks)


@register("advantage", source="GDPO, arXiv:2601.05242")
def gdpo(adv_eps: NonNegative = 1e-4, whiten: bool = True) -> Advantage:
    """Each of ``rewards_multi`` [B, R] is normalized in its group before they are added by ``reward_weights`` [B, R];
    see `jaxpo.primitives.advantages.decoupled`.

    Args:
      whiten: standardize the sum over the batch."""
    fn, asks = reads(advantages.decoupled, adv_eps=adv_eps, whiten=whiten)
    return Advantage(fn, compares(asks))


@register("advantage", source="ADHint, arXiv:2512.13095 (the form is assumed)")
def hinted(adv_eps: NonNegative = 1e-6, singleton: Singleton = "zero") -> Advantage:
    """GRPO's advantage over rows with and without a hint (role ``hinted``), stronger where the hints help, times the
    weight of each token of the hint [B, T]; see `jaxpo.primitives.guidance.hinted_advantage` and ``hint_weight``."""

    def fn(b: Rollouts, s: State) -> Array:
        began = b.role == role_id("hinted")
        adv = guidance.hinted_advantage(b.reward, b.group, began, b.count, adv_eps=adv_eps, singleton=singleton)
        return adv[:, None] * guidance.hint_weight(adv, b.get("hint_mask"), b.entropy_old, b.mask)

    asks = asks_of("reward", "group", "role", "hint_mask", "entropy_old")
    return Advantage(fn, compares(asks, singleton), per="token")


@register("advantage", source="BNPO, arXiv:2506.02864")
def bnpo(min: float = 0.0, max: float = 1.0, components: bool = False, singleton: Singleton = "zero") -> Advantage:
    """Centered rewards over the density of a Beta distribution fitted to the success rates of the batch.

    Args:
      min, max: range of the rewards. components: average the advantages of ``rewards_multi`` [B, R] instead, each
        times its weight if the batch has ``reward_weights`` [B, R].
    """
    concrete = isinstance(min, int | float) and isinstance(max, int | float)
    if concrete:
        number("max", max, Domain(min, ends="(]"))

    def one(reward: Array, b: Rollouts) -> Array:
        return advantages.beta_normalized(reward, b.group, b.count, min=min, max=max, singleton=singleton)

    def fn(b: Rollouts, s: State) -> Array:
        if not components:
            return one(b.reward, b)
        rewards = b.get("rewards_multi")
        each = jnp.stack([one(rewards[:, r], b) for r in range(rewards.shape[1])], 1)
        return jnp.mean(each * b.per_row.get("reward_weights", 1), 1)

    needs = ("rewards_multi", "group") if components else ("reward", "group")
    return Advantage(fn, compares(asks_of(*needs, rewards=(min, max) if concrete else None), singleton))


@register("advantage", source="GTPO, arXiv:2508.03772; code of winstonsmith1897/GTPO")
def gtpo(
    entropy_threshold: Threshold = 0.7,
    entropy_scale: NonNegative = 0.1,
    w_pos: NonNegative = 2.0,
    conflict_norm: Literal["max", "none"] = "max",
    adv_eps: NonNegative = 1e-4,
    singleton: Singleton = "zero",
) -> Advantage:
    """GRPO's A, less ``entropy_scale H_i`` (H_i the row's mean entropy under the current policy), 0 where ``H_i``
    exceeds the threshold; tokens of prefixes and suffixes that answers of both signs share are spared in failed
    answers and count ``w_pos`` times in the others.

    Args:
      conflict_norm: "max" divides a row by its longer run, as the released code does; "none" does not.
    """
    normalized = group_normalized(adv_eps, singleton=singleton)

    def write(b: Rollouts, s: State) -> tuple[Rollouts, State]:
        weight = token_advantages.conflict_weight(
            b.completions, b.mask, b.group, jnp.where(b.count > 0, normalized.fn(b, s), 0), w_pos=w_pos,
            normalize=conflict_norm == "max",
        )  # fmt: skip
        return b.with_token(conflict_weight=weight), s

    def current(adv: Array, stats: TokenStats, b: Rollouts, s: State) -> Array:
        on = promote(b.mask > 0)
        h = ratio_or_zero(jnp.sum(stats.entropy * on, -1), on.sum(-1))
        damped = jnp.where(h <= entropy_threshold, adv - entropy_scale * h, 0)
        return damped[:, None] * b.per_token["conflict_weight"]

    asks = compares(asks_of("reward", "group", "tokens", wants=("entropy",)), singleton)
    return Advantage(normalized.fn, asks, Hooks(prepare=write), per="token", current=current)


@register("advantage", source="SPO (Tencent), arXiv:2509.13232")
def spo_single_stream(adv_eps: NonNegative = 1e-8) -> Advantage:
    """``reward - v`` standardized over the batch, ``v`` the prompt's tracked value before the step (``tracker_value``
    [B])."""

    def fn(b: Rollouts, s: State) -> Array:
        adv = promote(b.reward) - promote(b.get("tracker_value"))
        return advantages.batch_standardized(adv, b.count, adv_eps=adv_eps)

    return Advantage(fn, asks_of("reward", "tracker_value", rewards=(0.0, 1.0)))


@register("advantage", source="SPO (segments), arXiv:2505.23564", when={"interval": when(form="chain")})
def spo_segment(form: Literal["chain", "tree"] = "chain", interval: Whole = 5, threshold: Positive = 0.9) -> Advantage:
    """Monte-Carlo advantages of segments, whitened over the tokens of probability below ``threshold``; the others leave
    the loss.

    Args:
      form: "chain": values of prefixes ``mc_value`` [B, T] at cutpoints, every ``interval``-th token of low
        probability; "tree": one advantage a row, ``edge_adv`` [B], of an edge of the tree."""

    def low(b: Rollouts, s: State) -> Array:
        return promote((jnp.exp(promote(b.get("logp_old"))) < threshold) & (b.mask > 0))

    def fn(b: Rollouts, s: State) -> Array:
        logp_old = b.get("logp_old")
        if form == "chain":
            adv = token_advantages.segment_advantage(
                b.reward, b.get("mc_value"), logp_old, b.mask, interval=interval, threshold=threshold
            )
        else:
            sure = jnp.exp(promote(logp_old)) > threshold
            adv = jnp.where((b.mask > 0) & ~sure, promote(b.get("edge_adv"))[:, None], 0)
        count = promote(b.count)[:, None]
        weight, everything = low(b, s) * count, promote(b.mask) * count
        return token_advantages.token_whitened(adv, jnp.where(jnp.any(weight > 0), weight, everything))

    needs = ("logp_old", "reward", "mc_value") if form == "chain" else ("logp_old", "edge_adv")
    return Advantage(fn, asks_of(*needs), per="token", tokens=low)


@register("advantage", source="A-GRAE, arXiv:2602.05548")
def a_grae(
    alpha: Positive = 1.0,
    easy_form: Literal["paper", "official"] = "paper",
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
) -> Advantage:
    """GRPO's A re-weighted towards hard questions early and easy ones late, positive advantages damped until the mean
    success rate reaches ``alpha``."""
    normalized = group_normalized(adv_eps, singleton=singleton)

    def fn(b: Rollouts, s: State) -> Array:
        return advantages.asymmetric(normalized.fn(b, s), b.reward, b.group, b.count, alpha=alpha, easy_form=easy_form)

    return Advantage(fn, compares(asks_of("reward", "group", rewards=(0.0, 1.0)), singleton))


ADORA_WHEN = dict.fromkeys(("correct_score", "max_len"), when(rule=("llm", "vlm")))


@register("advantage", source="ADORA, arXiv:2602.10019", budget={"max_len": 1.0}, when=ADORA_WHEN)
def adora(
    max_len: PositiveOrInfinite | None = None,
    lam: NonNegative = 0.1,
    rule: Literal["llm", "vlm"] | Callable[..., Any] = "llm",
    correct_score: Threshold = 0.5,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
) -> Advantage:
    """GRPO's A, times ``lam`` in groups that do not show the wanted trend.

    Args:
      rule: "llm" or "vlm" (`jaxpo.primitives.advantages.length_trend`), or a function batch -> [B] bool, constant in
        a group.
      max_len: of a rule by name: tokens from which a wrong answer counts as truncated; None or infinite: none does."""
    normalized = group_normalized(adv_eps, singleton=singleton)
    options = dict(rule=rule, correct_score=correct_score, max_len=jnp.inf if max_len is None else max_len)

    def trend(b: Rollouts) -> Array:
        return rule(b) if callable(rule) else advantages.length_trend(b.reward, b.lengths, b.group, b.count, **options)

    return Advantage(lambda b, s: normalized.fn(b, s) * jnp.where(trend(b), 1.0, lam), normalized.asks)


Schedule = Literal["constant", "accuracy", "inverse_accuracy", "cosine"]
ACCURACIES = ("accuracy", "inverse_accuracy")
CANON_WHEN = {
    "mu": when(mu_schedule=("constant", "cosine")),
    "mu_schedule": when(mu=NONZERO),
    "mu_period": when(mu_schedule="cosine"),
    "alpha": (when(mu=NONZERO), when(mu_schedule=ACCURACIES)),
}


@register("advantage", source="CANON, arXiv:2509.23962", when=CANON_WHEN)
def canon(
    metric: Literal["entropy", "length"] = "entropy",
    mu: Share = 1.0,
    mu_schedule: Schedule = "constant",
    mu_period: Whole | None = None,
    alpha: NonNegative = 1.0,
    singleton: Singleton = "zero",
) -> Advantage:
    """Each row against the other half (``mu``) and its own half (``1 - mu``) of its group, halves by mean entropy or
    length.

    Args:
      metric: "entropy" (of the rollout) or "length". alpha: damps the long, or the low-entropy, half.
      mu_schedule: "constant"; "accuracy" or "inverse_accuracy": the mean reward of the batch, or 1 minus it;
        "cosine": from ``mu`` to 0 over ``mu_period`` iterations, then again."""
    if mu_schedule == "cosine" and mu_period is None:
        raise ValueError("mu_schedule='cosine' needs mu_period, in iterations")

    def weight(b: Rollouts, s: State) -> Any:
        if mu_schedule == "constant":
            return mu
        if mu_schedule == "cosine":
            return mu * (1 + jnp.cos(jnp.pi * (s.iteration % mu_period) / mu_period)) / 2
        count = promote(b.count)
        mean = ratio_or_zero(jnp.sum(jnp.where(count > 0, promote(b.reward), 0) * count), count.sum())
        return mean if mu_schedule == "accuracy" else 1 - mean

    def fn(b: Rollouts, s: State) -> Array:
        scores = b.lengths
        if metric == "entropy":
            scores = ratio_or_zero(jnp.where(b.mask > 0, promote(b.get("entropy_old")), 0).sum(-1), b.lengths)
        return advantages.half_against_half(
            b.reward, scores, b.group, b.count, mu=weight(b, s), alpha=alpha,
            damp="lower" if metric == "entropy" else "upper", singleton=singleton,
        )  # fmt: skip

    needs = ("reward", "group", *(("entropy_old",) if metric == "entropy" else ()))
    return Advantage(fn, compares(asks_of(*needs), singleton))


@register("advantage", source="HAPO, arXiv:2509.16591")
def hapo(guard: NonNegativeOrInfinite = 5.0, adv_eps: NonNegative = 1e-6, singleton: Singleton = "zero") -> Advantage:
    """The reward standardized over the *tokens* of its group (population std); groups with some |A| >= ``guard`` have
    GRPO's A."""
    normalized = group_normalized(adv_eps, singleton=singleton)

    def fn(b: Rollouts, s: State) -> Array:
        return token_advantages.token_group_normalized(
            b.reward, b.mask, b.group, b.count, normalized.fn(b, s), guard=guard, adv_eps=adv_eps
        )

    return Advantage(fn, compares(GROUPS, singleton))


DCPO_WHEN = {name: when(cap=NONZERO) for name in ("H0", "T_hot", "T_cold", "threshold")}


@register("advantage", source="DCPO, arXiv:2601.12730", when=DCPO_WHEN)
def dcpo_distribution(
    H0: NonNegative = 0.25,  # noqa: N803 (the cards' names)
    cap: NonNegative = 0.1,
    T_hot: Positive = 1.2,  # noqa: N803
    T_cold: Positive = 0.8,  # noqa: N803
    threshold: Threshold = 0.05,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
) -> Advantage:
    """``(1 - w) A + w c rho`` [B, T]: GRPO's A mixed with a positive REINFORCE term on right answers (``c``: reward
    above ``threshold``), importance-weighted towards the policy at another temperature, hot while the entropy is
    below ``H0``.

    ``rho = exp(logp_old^T - logp_old)``, ``a = min(|H0 - H|, cap) / mean(c)``, ``w = a/(1 + a)``; H is the previous
    step's mean of ``-logp``, remembered in the state (0 at first)."""
    normalized = group_normalized(adv_eps, singleton=singleton)

    def fn(b: Rollouts, s: State) -> Array:
        h = s.memory["entropy"]
        count, right = promote(b.count), promote(promote(b.reward) > threshold)
        p = ratio_or_zero(jnp.sum(right * count), count.sum())
        a = ratio_or_zero(jnp.minimum(jnp.abs(H0 - h), cap), p)
        w = a / (1 + a)
        other = jnp.where(h <= H0, promote(b.get("logp_old_hot")), promote(b.get("logp_old_cold")))
        gap = jnp.where(b.mask > 0, other - promote(b.get("logp_old")), 0)
        rho = jnp.exp(jnp.clip(gap, -20, 20))
        return (1 - w) * normalized.fn(b, s)[:, None] + w * right[:, None] * rho

    def metrics(stats: TokenStats, b: Rollouts, s: State) -> Metrics:
        return {"entropy/sampled": Mean.of(-stats.logp, promote(b.mask) * promote(b.count)[:, None])}

    def update(state: State, b: Rollouts, report: Metrics) -> State:
        measured = report["entropy/sampled"]
        old = state.memory["entropy"]
        h = jnp.where(measured.weight > 0, ratio_or_zero(measured.total, measured.weight), old)
        return state.replace(memory={**state.memory, "entropy": h.astype(old.dtype)})

    derived = {
        "old_hot": lambda logits, tokens: log_prob_at(logits, tokens, temperature=T_hot),
        "old_cold": lambda logits, tokens: log_prob_at(logits, tokens, temperature=T_cold),
    }
    asks = asks_of("reward", "group", "logp_old", "logp_old_hot", "logp_old_cold", derived=derived)
    hooks = Hooks(memory={"entropy": jnp.zeros(())}, metrics=metrics, update=update)
    return Advantage(fn, asks, hooks, per="token")
