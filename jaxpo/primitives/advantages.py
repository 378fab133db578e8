"""Advantages: turn rewards [B] into constant weights of a row's tokens. Nothing here carries a gradient."""

from typing import Literal

import jax.numpy as jnp
from jax import Array, lax
from jax.ops import segment_max
from jax.scipy.special import gammaln, xlog1py, xlogy

from jaxpo.arguments import choice
from jaxpo.primitives.grouping import (
    group_constant,
    group_mean,
    group_size,
    group_std,
    group_sum,
    segments,
    weighted_std,
)
from jaxpo.primitives.numerics import promote, ratio_or_zero
from jaxpo.primitives.selection import before_in_group

Singleton = Literal["zero", "raw"]
Scale = Literal["group", "batch", "none"]


def batch_centered(reward: Array, count: Array) -> Array:
    """``A_i = reward_i - mean over the counted rows`` [B] (REINFORCE with a batch baseline); exactly 0 if all rewards
    are equal."""
    return group_centered(reward, jnp.zeros(reward.shape[0], jnp.int32), count)


def group_centered(reward: Array, group: Array, count: Array, *, singleton: Singleton = "zero") -> Array:
    """``A_i = reward_i - mean of its group`` [B]; exactly 0 in a constant group.

    Args:
      singleton: what a group of one row gets: "zero" (consistent with centring) or "raw" (the reward itself, as verl
        does)."""
    choice("singleton", singleton, ("zero", "raw"))
    reward = promote(reward)
    centered = jnp.where(group_constant(reward, group, count), 0, reward - group_mean(reward, group, count))
    if singleton == "raw":
        centered = jnp.where(group_size(group, count) == 1, reward, centered)
    return lax.stop_gradient(centered)


def group_normalized(
    reward: Array,
    group: Array,
    count: Array,
    *,
    scale: Scale = "group",
    adv_eps: float = 1e-6,
    ddof: int = 1,
    singleton: Singleton = "zero",
) -> Array:
    """``A_i = (reward_i - group mean) / (std + adv_eps)`` [B]  (GRPO, arXiv:2402.03300, eq. 3 outcome supervision).

    Args:
      scale: the std of the row's "group", of the whole "batch" (Lite PPO), or "none" (Dr. GRPO).
      ddof: 1 = sample std, 0 = population std.
      singleton: "zero", or "raw" = the undivided reward of a group of one row."""
    choice("scale", scale, ("group", "batch", "none"))
    centered = group_centered(reward, group, count, singleton=singleton)
    if scale == "none":
        return centered
    std = group_std(reward, group, count, ddof) if scale == "group" else weighted_std(reward, count, ddof)
    scaled = ratio_or_zero(centered, std + adv_eps)
    return lax.stop_gradient(jnp.where(group_size(group, count) == 1, centered, scaled))


def leave_one_out(reward: Array, group: Array, count: Array, *, singleton: Singleton = "zero") -> Array:
    """``A_i = reward_i - mean of the *other* rows of its group = K/(K-1) (reward_i - group mean)`` [B]  (RLOO,
    arXiv:2402.14740)."""
    size = group_size(group, count)
    centered = group_centered(reward, group, count, singleton=singleton)
    return lax.stop_gradient(jnp.where(size > 1, centered * ratio_or_zero(size, size - 1), centered))


def batch_standardized(adv: Array, count: Array, *, adv_eps: float = 1e-4, ddof: int = 1) -> Array:
    """``(A - mean) / (std + adv_eps)`` over the counted rows of the batch [B]; 0 if all are equal."""
    std = weighted_std(adv, count, ddof)
    return lax.stop_gradient(jnp.where(std == 0, 0, ratio_or_zero(batch_centered(adv, count), std + adv_eps)))


def decoupled(
    rewards_multi: Array,
    reward_weights: Array,
    group: Array,
    count: Array,
    *,
    adv_eps: float = 1e-4,
    whiten: bool = True,
) -> Array:
    """``A_i = sum_k w_ik (r_ik - group mean of r_k) / (group std of r_k + adv_eps)`` [B], standardized over the batch
    (GDPO, arXiv:2601.05242).

    Args:
      rewards_multi: [B, R] the rewards.
      reward_weights: [B, R] their weights; a reward of weight 0 plays no part in its row, and not in the means either.
      whiten: standardize the sum over the batch."""

    def one(reward: Array, weight: Array) -> Array:
        given = count * (weight != 0)
        return jnp.where(given > 0, weight * group_normalized(reward, group, given, adv_eps=adv_eps), 0)

    total = sum(one(rewards_multi[:, k], reward_weights[:, k]) for k in range(rewards_multi.shape[1]))
    return batch_standardized(total, count, adv_eps=adv_eps) if whiten else lax.stop_gradient(total)


def log_average_exp(reward: Array, group: Array, count: Array, *, tau: float = 1.0) -> Array:
    """``tau log mean_j exp(reward_j / tau)`` over the row's group [B] (Kimi k1.5, arXiv:2501.12599).

    It approaches the mean as tau grows, and is exactly the reward in a constant group."""
    reward = promote(reward)
    ids = segments(group)
    top = segment_max(jnp.where(count > 0, reward, -jnp.inf), ids, num_segments=ids.shape[0])[ids]
    top = jnp.where(jnp.isfinite(top), top, 0)
    average = group_mean(jnp.exp(jnp.minimum(reward - top, 0) / tau), group, count)
    out = top + tau * jnp.log(jnp.where(average > 0, average, 1))
    return lax.stop_gradient(jnp.where(group_constant(reward, group, count), reward, out))


def beta_normalized(
    reward: Array, group: Array, count: Array, *, min: float = 0.0, max: float = 1.0, singleton: Singleton = "zero"
) -> Array:
    """``A = w_g (u - p_g)`` [B] with ``w_g = min(1 / BetaPDF(p_g; alpha, beta), 1e6)`` (BNPO, arXiv:2506.02864).

    ``u = (reward - min)/(max - min)``, and ``p_g`` is its group mean. ``m`` and ``v`` are the mean and the sample
    variance of p over groups, each group once. ``c = m(1-m)/max(v, 1e-8) - 1``; ``alpha = max(1 + c m/3, 1)``,
    ``beta = max(1 + c(1-m)/3, 1)``. With a single group w = 1."""
    u = (promote(reward) - min) / (max - min)
    p = jnp.clip(group_mean(u, group, count), 0, 1)
    each = once(group, count)
    groups = each.sum()
    m = ratio_or_zero(jnp.sum(each * p), groups)
    v = ratio_or_zero(jnp.sum(each * jnp.square(p - m)), jnp.maximum(groups - 1, 0))
    c = m * (1 - m) / jnp.maximum(v, 1e-8) - 1
    c = jnp.where(groups > 1, c, 0)
    alpha, beta = jnp.maximum(1 + c * m / 3, 1), jnp.maximum(1 + c * (1 - m) / 3, 1)
    w = jnp.exp(jnp.minimum(-beta_log_density(p, alpha - 1, beta - 1), jnp.log(1e6)))
    adv = w * group_centered(u, group, count)
    if singleton == "raw":
        adv = jnp.where(group_size(group, count) == 1, promote(reward), adv)
    return lax.stop_gradient(adv)


def beta_log_density(p: Array, a: Array, b: Array) -> Array:
    """Log of the Beta density ``p^a (1 - p)^b / B(a + 1, b + 1)``, exact to rounding however peaked it is.

    ``= log(n + 1) + s(n) - s(a) - s(b) - n KL(mode || p)``, ``n = a + b``, ``mode = a / n``, ``s(x) = log x! - x log
    x + x``: no term grows with n, where ``log B`` is a difference of numbers of the size of ``n log n``.

    Args:
      p: in [0, 1]. a, b: at least 0; 0 = flat on that side."""
    n = a + b
    mode = ratio_or_zero(a, n)
    below = _log_ratio(a, p, mode, p - mode) + _log_ratio(b, 1 - p, 1 - mode, mode - p)  # - n KL(mode || p)
    return jnp.log1p(n) + _stirling(n) - _stirling(a) - _stirling(b) + below


def _log_ratio(k: Array, x: Array, y: Array, apart: Array) -> Array:
    """``k log(x / y)``, 0 for k = 0; near 1 by ``log1p`` of the exact difference ``apart = x - y``, as two of a Beta
    nearly cancel there."""
    y = jnp.where(y > 0, y, 1)
    return jnp.where(jnp.abs(apart) < y / 2, xlog1py(k, jnp.maximum(apart / y, -0.5)), xlogy(k, x / y))


def _stirling(x: Array) -> Array:
    """``log x! - x log x + x``: ``log(2 pi x) / 2`` and a series for large x."""
    large = jnp.maximum(x, 10.0)
    tail = 1 / (12 * large) - 1 / (360 * large**3) + 1 / (1260 * large**5) - 1 / (1680 * large**7)
    small = jnp.minimum(x, 10.0)
    exact = gammaln(small + 1) - xlogy(small, small) + small
    return jnp.where(x > 10, 0.5 * jnp.log(2 * jnp.pi * large) + tail, exact)


def asymmetric(
    adv: Array, reward: Array, group: Array, count: Array, *, alpha: float = 1.0, easy_form: str = "paper"
) -> Array:
    """A-GRAE's re-weighting of GRPO advantages [B] (arXiv:2602.05548).

    ``A1 = omega/2 A/sqrt(p) + (1-omega)/2 A/sqrt(1-p)`` for ``0 < p < 1`` (p the group mean, omega the mean of the
    group means), else A; then ``A1 min(1, omega/alpha)`` where ``A1 > 0``.

    Args:
      easy_form: "official" divides the easy term by ``1 - sqrt(p) + 1e-6``, as the released code does.
    """
    choice("easy_form", easy_form, ("paper", "official"))
    p = group_mean(reward, group, count)
    each = once(group, count)
    omega = ratio_or_zero(jnp.sum(each * p), each.sum())
    inside = (p > 0) & (p < 1)
    q = jnp.where(inside, p, 0.5)
    easy = jnp.sqrt(1 - q) if easy_form == "paper" else 1 - jnp.sqrt(q) + 1e-6
    weighted = omega / 2 * adv / jnp.sqrt(q) + (1 - omega) / 2 * adv / easy
    weighted = jnp.where(inside, weighted, adv)
    return lax.stop_gradient(jnp.where(weighted > 0, weighted * jnp.minimum(1, omega / alpha), weighted))


def length_trend(
    reward: Array,
    length: Array,
    group: Array,
    count: Array,
    *,
    rule: str = "llm",
    correct_score: float = 0.5,
    max_len: float,
) -> Array:
    """[B] bool: the longest correct answer of the row's group is longer than the mean length of its incorrect answers
    that were not truncated, ``length < max_len`` (ADORA, arXiv:2602.10019).

    Args:
      rule: what happens in a group without such answers. "llm": the maximum over no correct answer and the mean over no
        incorrect answer are -inf. "vlm": without a correct answer the result is True; the mean over no incorrect answer
        is +inf."""
    choice("rule", rule, ("llm", "vlm"))
    ids, length, counted = segments(group), promote(length), count > 0
    correct = counted & (reward > correct_score)
    wrong = counted & (reward <= correct_score) & (length < max_len)
    longest = segment_max(jnp.where(correct, length, -jnp.inf), ids, num_segments=ids.shape[0])[ids]
    n_wrong = group_sum(jnp.where(wrong, promote(count), 0), group)
    mean = ratio_or_zero(group_sum(jnp.where(wrong, length * count, 0), group), n_wrong)
    if rule == "llm":
        return longest > jnp.where(n_wrong > 0, mean, -jnp.inf)
    return (longest == -jnp.inf) | (longest > jnp.where(n_wrong > 0, mean, jnp.inf))


def half_against_half(
    reward: Array,
    metric: Array,
    group: Array,
    count: Array,
    *,
    mu: float | Array = 1.0,
    alpha: float = 1.0,
    damp: Literal["upper", "lower"] = "lower",
    singleton: Singleton = "zero",
) -> Array:
    """CANON's advantage [B] (arXiv:2509.23962): ``A = mu (reward - mean of the other half) + (1 - mu) (reward - mean of
    the own half)``. The lower half of a group is the ``K//2`` rows with the lowest ``metric``.

    In the first bracket ``alpha`` multiplies the reward or mean of the half that ``damp`` names. Ties of the metric go
    by row order. The copies of a row that was drawn several times may fall into both halves; the row then gets the mean
    of its copies' advantages.
    """
    reward, count = promote(reward), promote(count)
    before, size = before_in_group(metric, group, count), group_size(group, count)
    n_low = jnp.floor(size / 2)
    low = jnp.clip(n_low - before, 0, count)  # copies in the lower half
    up = count - low
    m_low = ratio_or_zero(group_sum(low * jnp.where(count > 0, reward, 0), group), n_low)
    m_up = ratio_or_zero(group_sum(up * jnp.where(count > 0, reward, 0), group), size - n_low)
    if damp == "upper":
        inter_low, inter_up = reward - alpha * m_up, alpha * reward - m_low
    else:
        inter_low, inter_up = alpha * reward - m_up, reward - alpha * m_low
    of_low = mu * inter_low + (1 - mu) * (reward - m_low)
    of_up = mu * inter_up + (1 - mu) * (reward - m_up)
    adv = ratio_or_zero(low * of_low + up * of_up, count)
    return lax.stop_gradient(jnp.where(size == 1, reward if singleton == "raw" else 0, adv))


def drop_excess_negatives(reward: Array, group: Array, count: Array, priority: Array) -> Array:
    """[B] bool: the rows that RED-Drop keeps (arXiv:2509.24203). If a group has more negatives (reward below its mean)
    than positives, the negatives with the smallest ``priority`` are dropped until the numbers are equal."""
    negative = ~group_constant(reward, group, count) & (promote(reward) < group_mean(reward, group, count))
    n_negative = group_sum(jnp.where(negative, promote(count), 0), group)
    excess = n_negative - (group_size(group, count) - n_negative)
    before = before_in_group(jnp.where(negative, promote(priority), jnp.inf), group, count)
    return ~(negative & (before < excess))


def once(group: Array, count: Array) -> Array:
    """[B] weights that sum to 1 over the counted rows of each group: a sum over rows becomes a sum over groups."""
    return ratio_or_zero(promote(count), group_size(group, count))
