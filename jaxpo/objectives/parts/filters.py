"""Filters: ``fn(batch, state) -> [B]`` share of each row to keep, before the advantage or, with ``sees_advantage``,
after it."""

from typing import Literal

import jax.numpy as jnp
from jax import Array

from jaxpo.arguments import NonNegative, PositiveShare, Threshold, Whole
from jaxpo.batch import Rollouts
from jaxpo.objectives.grammar.base import State, per_token
from jaxpo.objectives.grammar.parts import Filter, asks_of, reads
from jaxpo.objectives.parts.surrogates import tokens_of
from jaxpo.primitives import mismatch, selection, shaping
from jaxpo.primitives.grouping import group_mean, group_size
from jaxpo.primitives.numerics import promote, ratio_or_zero
from jaxpo.registry import register


@register("filter", id="dapo", source="DAPO, arXiv:2503.14476")
@register("filter", source="DAPO, arXiv:2503.14476")
def mixed_groups() -> Filter:
    """Keep groups whose ``correct`` is neither all 0 nor all 1 (and groups of one row)."""
    fn, asks = reads(shaping.mixed_groups, "correct", "group", "count")
    return Filter(lambda b, s: promote(fn(b, s)), asks)


@register("filter", source="NFT, arXiv:2505.18116")
def solved_sometimes() -> Filter:
    """Keep groups whose mean reward is strictly between 0 and 1."""

    def fn(b: Rollouts, s: State) -> Array:
        rate = group_mean(b.reward, b.group, b.count)
        return promote((rate > 0) & (rate < 1))

    return Filter(fn, asks_of("reward", "group"))


@register("filter", source="DAPO, arXiv:2503.14476")
def not_truncated() -> Filter:
    """Leave out rows that the length limit ended (overlong filtering)."""
    return Filter(lambda b, s: promote(b.get("truncated") == 0), asks_of("truncated"))


@register("filter", source="PODS, arXiv:2504.13818")
def max_variance(keep: PositiveShare = 0.5) -> Filter:
    """Keep the ``max(1, round(keep K))`` responses to each prompt whose rewards vary most."""

    def fn(b: Rollouts, s: State) -> Array:
        n = jnp.maximum(jnp.round(keep * group_size(b.group, b.count)), 1)
        return ratio_or_zero(selection.max_variance(b.reward, b.group, b.count, n), promote(b.count))

    return Filter(fn, asks_of("reward", "group"))


@register("filter")
def random_rows(keep: PositiveShare = 0.5) -> Filter:
    """Keep ``max(1, round(keep K))`` responses to each prompt, drawn by the rows' seeds."""

    def fn(b: Rollouts, s: State) -> Array:
        n = jnp.maximum(jnp.round(keep * group_size(b.group, b.count)), 1)
        before = selection.before_in_group(selection.row_uniform(b.get("seed"), stream=3), b.group, b.count)
        return ratio_or_zero(jnp.clip(n - before, 0, promote(b.count)), promote(b.count))

    return Filter(fn, asks_of("seed", "group"))


@register("filter")
def rejection(
    estimator: mismatch.Estimator = "k1",
    level: Literal["sequence", "geometric"] = "geometric",
    bound: Threshold = 0.1,
    low: Threshold | None = None,
) -> Filter:
    """Leave out rows on which sampler and trainer disagree: keep those whose ``logp_beh`` and ``logp_old`` have a k1,
    k2 or k3 estimate of at most ``bound`` (and at least ``low``), by sum ("sequence") or mean ("geometric") over the
    row."""
    fn, asks = reads(mismatch.kept, estimator=estimator, level=level, bound=bound, low=low)
    return Filter(lambda b, s: promote(fn(b, s)), asks)


# ---- filters that see the advantage (``batch.adv``): [B] of rows or [B, T] of tokens -------------------------------


@register("filter", source="D3S, arXiv:2509.22115 (reconstructed from secondary summaries)", budget={"total": "steps"})
def d3s_rows(
    first: PositiveShare = 0.5, last: PositiveShare = 1.0, total: Whole = 1, level: Literal["cross", "within"] = "cross"
) -> Filter:
    """Keep the rows whose advantages vary most: a share of ``first`` at iteration 0 that goes to ``last`` at ``total
    - 1``.

    Args:
      level: "cross": one choice over the batch; "within": in each group."""

    def fn(b: Rollouts, s: State) -> Array:
        group = b.group if level == "within" else jnp.zeros_like(b.group)
        n = jnp.maximum(jnp.round(scheduled(first, last, total, s) * group_size(group, b.count)), 1)
        return ratio_or_zero(selection.max_variance(b.adv, group, b.count, n), promote(b.count))

    return Filter(fn, asks_of(*(("group",) if level == "within" else ())), per="row", sees_advantage=True)


@register(
    "filter",
    id="d3s",
    source="D3S, arXiv:2509.22115 (reconstructed from secondary summaries)",
    budget={"total": "steps"},
)
def d3s_tokens(first: PositiveShare = 0.2, last: PositiveShare = 1.0, total: Whole = 1) -> Filter:
    """Keep the tokens of largest ``|A| H`` (``entropy_old``) among those that are left: a share that goes from
    ``first`` to ``last``."""

    def fn(b: Rollouts, s: State) -> Array:
        weight = tokens_of(b)
        score = jnp.where(weight > 0, jnp.abs(per_token(b.adv)) * promote(b.get("entropy_old")), 0)
        k = jnp.maximum(jnp.round(scheduled(first, last, total, s) * weight.sum()), 1)
        return ratio_or_zero(selection.largest(score, weight, k), weight)

    return Filter(fn, asks_of("entropy_old"), per="token", sees_advantage=True)


@register("filter", source="Flow-GRPO, arXiv:2505.05470")
def nonzero_advantage(at_least: NonNegative = 1e-6) -> Filter:
    """Leave out rows whose ``|A|`` is at most ``at_least``, at every token."""

    def fn(b: Rollouts, s: State) -> Array:
        return promote(jnp.any(jnp.abs(per_token(b.adv)) > at_least, -1))

    return Filter(fn, per="row", sees_advantage=True)


def scheduled(first: float, last: float, total: int, state: State) -> Array:
    """``(1 - p) first + p last``, ``p`` the share of ``total`` iterations that is over."""
    p = jnp.clip(state.iteration / jnp.maximum(total - 1, 1), 0, 1)
    return (1 - p) * first + p * last
