"""Advantages: ``fn(batch, state) -> [B] or [B, T]``."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxpo.batch import Rollouts, TokenStats
from jaxpo.metrics import Mean, Metrics
from jaxpo.objectives.grammar.base import State, is_off
from jaxpo.objectives.grammar.parts import Part
from jaxpo.primitives import advantages, aggregation, selection, token_advantages
from jaxpo.primitives.advantages import choice
from jaxpo.primitives.numerics import promote, ratio_or_zero
from jaxpo.primitives.regularizers import log_prob_at
from jaxpo.registry import register

REWARD = frozenset({"reward"})
GROUPS = frozenset({"reward", "group"})


@register("advantage", source="Williams 1992")
def reward(baseline: str = "none") -> Part:
    """``A_i = reward_i - m``, m = 0 (``none``) or the mean of the counted rewards (``batch_mean``)."""
    choice("baseline", baseline, ("none", "batch_mean"))
    if baseline == "none":
        return Part(lambda b, s: b.reward, REWARD)
    return Part(lambda b, s: advantages.batch_centered(b.reward, b.count), REWARD)


@register("advantage", id="grpo", source="DeepSeekMath, arXiv:2402.03300")
@register("advantage", source="DeepSeekMath, arXiv:2402.03300")
def group_normalized(adv_eps: float = 1e-6, scale: str = "group", ddof: int = 1, singleton: str = "zero") -> Part:
    """``A_i = (reward_i - group mean) / (std + adv_eps)``; see `jaxpo.primitives.advantages.group_normalized`.

    Args:
      scale: the std of the "group", of the whole "batch", or "none". ddof: 1 = sample std, 0 = population std.
      singleton: a group of one row gets "zero", or "raw" = its reward."""
    choice("scale", scale, ("group", "batch", "none"))
    choice("singleton", singleton, ("zero", "raw"))
    return Part(
        lambda b, s: advantages.group_normalized(
            b.reward, b.group, b.count, scale=scale, adv_eps=adv_eps, ddof=ddof, singleton=singleton
        ),
        GROUPS,
    )


@register("advantage", source="arXiv:2508.08221")
def lite_ppo(adv_eps: float = 1e-6, singleton: str = "zero") -> Part:
    """``A_i = (reward_i - group mean) / (std of all rewards of the batch + adv_eps)``."""
    return group_normalized(adv_eps, "batch", singleton=singleton)


@register("advantage", id="rloo", source="RLOO, arXiv:2402.14740")
@register("advantage", source="RLOO, arXiv:2402.14740")
def leave_one_out(singleton: str = "zero", normalize: bool = False) -> Part:
    """``A_i = K/(K-1) (reward_i - group mean)``, then optionally standardised over the batch (``adv_eps`` 1e-4)."""
    choice("singleton", singleton, ("zero", "raw"))

    def fn(b: Rollouts, s: State) -> Array:
        adv = advantages.leave_one_out(b.reward, b.group, b.count, singleton=singleton)
        return advantages.batch_standardized(adv, b.count) if normalize else adv

    return Part(fn, GROUPS)


@register("advantage", source="REINFORCE++, arXiv:2501.03262")
def reinforce_pp(gamma: float = 1.0, kl_coef: float = 0.01, baseline: bool = False, singleton: str = "zero") -> Part:
    """Returns-to-go of ``-kl_coef (logp_old - logp_ref)`` per token and the reward at the last token, whitened over all
    tokens of the batch.

    Args:
      gamma: discount per token. kl_coef: a Python 0 removes the need for ``logp_ref``.
      baseline: subtract the group mean from the reward first (``singleton`` says what a group of one row gets).
    """
    if not baseline and singleton != "zero":
        raise ValueError("singleton has no effect without baseline=True")
    choice("singleton", singleton, ("zero", "raw"))

    def fn(b: Rollouts, s: State) -> Array:
        reward = promote(b.reward)
        if baseline:
            reward = advantages.group_centered(b.reward, b.group, b.count, singleton=singleton)
        token_reward = jnp.where(token_advantages.last_token(b.mask), reward[:, None], 0)
        if not is_off(kl_coef):
            drift = promote(b.get("logp_old")) - promote(b.get("logp_ref"))
            token_reward = token_reward - kl_coef * jnp.where(b.mask > 0, drift, 0)
        returns = token_advantages.returns_to_go(token_reward, b.mask, gamma)
        return token_advantages.token_whitened(returns, promote(b.mask) * promote(b.count)[:, None])

    needs = REWARD | (frozenset({"group"}) if baseline else frozenset())
    return Part(fn, needs if is_off(kl_coef) else needs | {"logp_old", "logp_ref"}, per="token")


@register("advantage", source="REC, arXiv:2509.24203")
def rec(normalize: bool = False, drop: str = "none", singleton: str = "zero") -> Part:
    """``reward - group mean``, over the population std + 1e-6 with ``normalize``.

    Args:
      drop: "balance" removes, at random by the row's seed, the negatives that outnumber the positives of a group; mean
        and std are those of the rest, and the removed have A = 0 (they stay in the denominators).
    """
    choice("drop", drop, ("none", "balance"))

    def fn(b: Rollouts, s: State) -> Array:
        count = promote(b.count)
        if drop == "balance":
            priority = selection.row_uniform(b.get("seed"), stream=1)
            kept = advantages.drop_excess_negatives(b.reward, b.group, b.count, priority)
            count = count * kept
        scale = "group" if normalize else "none"
        adv = advantages.group_normalized(b.reward, b.group, count, scale=scale, ddof=0, singleton=singleton)
        return jnp.where(count > 0, adv, 0)

    choice("singleton", singleton, ("zero", "raw"))
    return Part(fn, GROUPS | {"seed"} if drop == "balance" else GROUPS)


@register("advantage", source="Kimi k1.5, arXiv:2501.12599")
def opmd(baseline: str = "mean", tau: float = 1.0, singleton: str = "zero") -> Part:
    """``reward - b_g``, ``b_g`` the group mean or ``tau log mean exp(reward / tau)`` ("logavgexp")."""
    choice("baseline", baseline, ("mean", "logavgexp"))
    choice("singleton", singleton, ("zero", "raw"))
    if baseline == "mean":
        return group_normalized(scale="none", singleton=singleton)

    def fn(b: Rollouts, s: State) -> Array:
        adv = promote(b.reward) - advantages.log_average_exp(b.reward, b.group, b.count, tau=tau)
        return jnp.where(advantages.group_size(b.group, b.count) == 1, b.reward, adv) if singleton == "raw" else adv

    return Part(fn, GROUPS)


@register("advantage", source="Asymmetric REINFORCE, arXiv:2506.20520")
def asymre(shift: float = -0.1, singleton: str = "zero") -> Part:
    """``reward - (group mean + shift)``: with a negative shift every sampled token is pushed up a little, also in
    solved groups; filtering those out would remove the push."""
    choice("singleton", singleton, ("zero", "raw"))
    return Part(lambda b, s: advantages.group_centered(b.reward, b.group, b.count, singleton=singleton) - shift, GROUPS)


@register("advantage", source="BNPO, arXiv:2506.02864")
def bnpo(min: float = 0.0, max: float = 1.0, components: bool = False, singleton: str = "zero") -> Part:
    """Centred rewards over the density of a Beta distribution fitted to the success rates of the batch.

    Args:
      min, max: range of the rewards. components: average the advantages of ``rewards_multi`` [B, R] instead.
    """
    choice("singleton", singleton, ("zero", "raw"))
    if isinstance(min, int | float) and isinstance(max, int | float) and not min < max:
        raise ValueError(f"max {max} must be above min {min}")

    def one(reward: Array, b: Rollouts) -> Array:
        return advantages.beta_normalized(reward, b.group, b.count, min=min, max=max, singleton=singleton)

    def fn(b: Rollouts, s: State) -> Array:
        if not components:
            return one(b.reward, b)
        rewards = b.get("rewards_multi")
        return jnp.mean(jnp.stack([one(rewards[:, r], b) for r in range(rewards.shape[1])]), 0)

    needs = frozenset({"rewards_multi", "group"}) if components else GROUPS
    concrete = isinstance(min, int | float) and isinstance(max, int | float)
    return Part(fn, needs, rewards=(min, max) if concrete else None)


@register("advantage", source="GTPO, arXiv:2508.03772; code of winstonsmith1897/GTPO")
def gtpo(
    entropy_threshold: float = 0.7,
    entropy_scale: float = 0.1,
    w_pos: float = 2.0,
    conflict_norm: str = "max",
    adv_eps: float = 1e-4,
    singleton: str = "zero",
) -> Part:
    """GRPO's A, less ``entropy_scale H_i`` (H_i the row's mean entropy under the current policy), 0 where ``H_i``
    exceeds the threshold; tokens of prefixes and suffixes that answers of both signs share are spared in failed
    answers and count ``w_pos`` times in the others.

    Args:
      conflict_norm: "max" divides a row by its longer run, as the released code does; "none" does not.
    """
    choice("conflict_norm", conflict_norm, ("max", "none"))
    normalized = group_normalized(adv_eps, singleton=singleton)

    def prepare(b: Rollouts, s: State) -> Rollouts:
        weight = token_advantages.conflict_weight(
            b.completions, b.mask, b.group, jnp.where(b.count > 0, normalized.fn(b, s), 0), w_pos=w_pos,
            normalize=conflict_norm == "max",
        )  # fmt: skip
        return b.with_token(conflict_weight=weight)

    def current(adv: Array, stats: TokenStats, b: Rollouts, s: State) -> Array:
        on = promote(b.mask > 0)
        h = ratio_or_zero(jnp.sum(stats.entropy * on, -1), on.sum(-1))
        damped = jnp.where(h <= entropy_threshold, adv - entropy_scale * h, 0)
        return damped[:, None] * b.per_token["conflict_weight"]

    wants = frozenset({"entropy"})
    return Part(normalized.fn, GROUPS | {"tokens"}, wants, per="token", prepare=prepare, current=current)


@register("advantage", source="SPO (Tencent), arXiv:2509.13232")
def spo_single_stream(adv_eps: float = 1e-8) -> Part:
    """``reward - v`` standardised over the batch, ``v`` the prompt's tracked value before the step (``tracker_value``
    [B])."""

    def fn(b: Rollouts, s: State) -> Array:
        adv = promote(b.reward) - promote(b.get("tracker_value"))
        return advantages.batch_standardized(adv, b.count, adv_eps=adv_eps)

    return Part(fn, REWARD | {"tracker_value"}, rewards=(0.0, 1.0))


@register("advantage", source="SPO (segments), arXiv:2505.23564")
def spo_segment(form: str = "chain", interval: int = 5, threshold: float = 0.9) -> Part:
    """Monte-Carlo advantages of segments, whitened over the tokens of probability below ``threshold``; the others leave
    the loss.

    Args:
      form: "chain": values of prefixes ``mc_value`` [B, T] at cutpoints, every ``interval``-th token of low
        probability; "tree": one advantage a row, ``edge_adv`` [B], of an edge of the tree."""
    choice("form", form, ("chain", "tree"))
    if form == "tree" and interval != 5:
        raise ValueError("interval has no effect with form='tree'")

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

    needs = {"logp_old", "reward", "mc_value"} if form == "chain" else {"logp_old", "edge_adv"}
    return Part(fn, frozenset(needs), per="token", tokens=low)


@register("advantage", source="A-GRAE, arXiv:2602.05548")
def a_grae(alpha: float = 1.0, easy_form: str = "paper", adv_eps: float = 1e-6, singleton: str = "zero") -> Part:
    """GRPO's A re-weighted towards hard questions early and easy ones late, positive advantages damped until the mean
    success rate reaches ``alpha``."""
    choice("easy_form", easy_form, ("paper", "official"))
    normalized = group_normalized(adv_eps, singleton=singleton)

    def fn(b: Rollouts, s: State) -> Array:
        return advantages.asymmetric(normalized.fn(b, s), b.reward, b.group, b.count, alpha=alpha, easy_form=easy_form)

    return Part(fn, GROUPS, rewards=(0.0, 1.0))


@register("advantage", source="ADORA, arXiv:2602.10019", budget={"max_len": 1.0})
def adora(
    max_len: float,
    lam: float = 0.1,
    rule: Any = "llm",
    correct_score: float = 0.5,
    adv_eps: float = 1e-6,
    singleton: str = "zero",
) -> Part:
    """GRPO's A, times ``lam`` in groups that do not show the wanted trend.

    Args:
      rule: "llm" or "vlm" (`jaxpo.primitives.advantages.length_trend`), or a function batch -> [B] bool, constant in
        a group."""
    normalized = group_normalized(adv_eps, singleton=singleton)
    if not callable(rule):
        choice("rule", rule, ("llm", "vlm"))

    def fn(b: Rollouts, s: State) -> Array:
        trend = rule(b) if callable(rule) else advantages.length_trend(
            b.reward, b.lengths, b.group, b.count, rule=rule, correct_score=correct_score, max_len=max_len
        )  # fmt: skip
        return normalized.fn(b, s) * jnp.where(trend, 1.0, lam)

    return Part(fn, GROUPS)


@register("advantage", source="CANON, arXiv:2509.23962")
def canon(
    metric: str = "entropy",
    mu: float = 1.0,
    mu_schedule: str = "constant",
    mu_period: int | None = None,
    alpha: float = 1.0,
    singleton: str = "zero",
) -> Part:
    """Each row against the other half (``mu``) and its own half (``1 - mu``) of its group, halves by mean entropy or
    length.

    Args:
      metric: "entropy" (of the rollout) or "length". alpha: damps the long, or the low-entropy, half.
      mu_schedule: "constant"; "accuracy" or "inverse_accuracy": the mean reward of the batch, or 1 minus it;
        "cosine": from ``mu`` to 0 over ``mu_period`` iterations, then again."""
    choice("metric", metric, ("entropy", "length"))
    choice("mu_schedule", mu_schedule, ("constant", "accuracy", "inverse_accuracy", "cosine"))
    choice("singleton", singleton, ("zero", "raw"))
    if mu_schedule.endswith("accuracy") and mu != 1.0:
        raise ValueError(f"mu has no effect with mu_schedule={mu_schedule!r}")
    if (mu_period is not None) != (mu_schedule == "cosine"):
        raise ValueError("mu_period belongs to mu_schedule='cosine', which needs it")

    def weight(b: Rollouts, s: State) -> Any:
        if mu_schedule == "constant":
            return mu
        if mu_schedule == "cosine":
            aggregation.positive("mu_period", mu_period)
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

    return Part(fn, GROUPS | {"entropy_old"} if metric == "entropy" else GROUPS)


@register("advantage", source="HAPO, arXiv:2509.16591")
def hapo(guard: float = 5.0, adv_eps: float = 1e-6, singleton: str = "zero") -> Part:
    """The reward standardised over the *tokens* of its group (population std); groups with some |A| >= ``guard`` have
    GRPO's A."""
    normalized = group_normalized(adv_eps, singleton=singleton)

    def fn(b: Rollouts, s: State) -> Array:
        return token_advantages.token_group_normalized(
            b.reward, b.mask, b.group, b.count, normalized.fn(b, s), guard=guard, adv_eps=adv_eps
        )

    return Part(fn, GROUPS)


@register("advantage", source="DCPO, arXiv:2601.12730")
def dcpo_distribution(
    H0: float = 0.25,  # noqa: N803 (the cards' names)
    cap: float = 0.1,
    T_hot: float = 1.2,  # noqa: N803
    T_cold: float = 0.8,  # noqa: N803
    threshold: float = 0.05,
    adv_eps: float = 1e-6,
    singleton: str = "zero",
) -> Part:
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
        h = jnp.where(measured.weight > 0, ratio_or_zero(measured.total, measured.weight), state.memory["entropy"])
        return state.replace(memory={**state.memory, "entropy": h})

    return Part(
        fn,
        GROUPS | {"logp_old", "logp_old_hot", "logp_old_cold"},
        per="token",
        memory={"entropy": jnp.float32(0)},
        metrics=metrics,
        update=update,
        derived={
            "old_hot": lambda logits, tokens: log_prob_at(logits, tokens, temperature=T_hot),
            "old_cold": lambda logits, tokens: log_prob_at(logits, tokens, temperature=T_cold),
        },
    )
