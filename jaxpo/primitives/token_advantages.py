"""Advantages of single tokens [B, T]: returns-to-go, segments, shared prefixes, entropy. Nothing here carries a
gradient. Positions count a row's masked tokens only, so masks may have holes."""

import jax.numpy as jnp
from jax import Array, lax

from jaxpo.primitives.grouping import group_mean, group_size, group_std, group_sum
from jaxpo.primitives.numerics import promote, ratio_or_zero
from jaxpo.primitives.selection import kth_smallest


def ordinals(mask: Array) -> Array:
    """[B, T] int: the place of each masked token among its row's masked tokens; elsewhere, the place of the last masked
    token before it."""
    return jnp.cumsum(mask > 0, -1) - 1


def last_token(mask: Array) -> Array:
    """[B, T] bool: the row's last masked token."""
    return (mask > 0) & (jnp.cumsum((mask > 0)[:, ::-1], -1)[:, ::-1] == 1)


def next_at(x: Array, at: Array, end: Array) -> Array:
    """[B, T] ``x`` at the nearest *later* position where ``at`` is True; ``end`` [B] if there is none."""
    t = at.shape[1]
    index = jnp.where(at, jnp.arange(t), t)
    after = lax.cummin(jnp.pad(index[:, 1:], ((0, 0), (0, 1)), constant_values=t), axis=1, reverse=True)
    return jnp.where(after < t, jnp.take_along_axis(x, jnp.minimum(after, t - 1), 1), end[:, None])


def previous_at(x: Array, at: Array) -> tuple[Array, Array]:
    """[B, T] ``x`` at the nearest position, this one or earlier, where ``at`` is True; and whether there is one."""
    index = lax.cummax(jnp.where(at, jnp.arange(at.shape[1]), -1), axis=1)
    return jnp.take_along_axis(x, jnp.maximum(index, 0), 1), index >= 0


def returns_to_go(token_reward: Array, mask: Array, gamma: float | Array = 1.0) -> Array:
    """``G_t = sum_{s >= t} gamma^(s-t) rho_s`` over masked positions [B, T]."""
    on = mask > 0
    reward = jnp.where(on, promote(token_reward), 0)
    decay = jnp.where(on, gamma, 1.0).astype(reward.dtype)

    def back(later: Array, here: tuple[Array, Array]) -> tuple[Array, Array]:
        total = here[0] + here[1] * later
        return total, total

    return lax.scan(back, 0 * reward[:, 0], (reward.T, decay.T), reverse=True)[1].T


def token_whitened(x: Array, weight: Array, *, eps: float = 1e-8) -> Array:
    """``(x - mean) / sqrt(var + eps)`` [B, T], with mean and sample variance over tokens of multiplicity ``weight``
    [B, T].

    Exactly 0 if all values are equal, or if there are fewer than two."""
    x, weight = promote(x), promote(weight)
    n = weight.sum()
    mean = ratio_or_zero(jnp.sum(jnp.where(weight > 0, x, 0) * weight), n)
    square = jnp.where(weight > 0, jnp.square(x - mean), 0)
    variance = ratio_or_zero(jnp.sum(square * weight), jnp.maximum(n - 1, 0))
    constant = jnp.max(jnp.where(weight > 0, x, -jnp.inf)) <= jnp.min(jnp.where(weight > 0, x, jnp.inf))
    return lax.stop_gradient(jnp.where(constant | (n < 2), 0, (x - mean) * lax.rsqrt(variance + eps)))


def segment_advantage(
    reward: Array, mc_value: Array, logp_old: Array, mask: Array, *, interval: int = 5, threshold: float = 0.9
) -> Array:
    """Monte-Carlo advantages of segments [B, T] (SPO-chain, arXiv:2505.23564).

    Tokens with ``p = exp(logp_old) < threshold`` are low; every ``interval``-th of them, from the first, is a cutpoint.
    A segment runs from a cutpoint to the next. Its advantage is ``V(next) - V(own)``, and ``reward - V(own)`` for the
    last segment. Tokens before the first cutpoint and tokens with ``p > threshold`` get 0.

    Args:
      mc_value: [B, T] value of the prefix *before* each token, read at cutpoints only (`cutpoints`).
    """
    cuts = cutpoints(logp_old, mask, interval=interval, threshold=threshold)
    value = promote(mc_value)
    here, inside = previous_at(value, cuts)
    gain = next_at(value, cuts, promote(reward)) - here
    sure = jnp.exp(promote(logp_old)) > threshold
    return lax.stop_gradient(jnp.where(inside & ~sure & (mask > 0), gain, 0))


def cutpoints(logp_old: Array, mask: Array, *, interval: int = 5, threshold: float = 0.9) -> Array:
    """[B, T] bool: every ``interval``-th token with ``exp(logp_old) < threshold``, beginning with the first."""
    low = (jnp.exp(promote(logp_old)) < threshold) & (mask > 0)
    return low & (ordinals(low) % interval == 0)


def _shared(tokens: Array, place: Array, on: Array, group: Array, positive: Array, negative: Array) -> Array:
    """[B, T] bool: some positive and some negative row of the group have this same token at this place.

    Rows are sorted by group, and each is compared with the row d places away, for d = 1, 2, ... up to the largest
    group.
    """
    b, t = tokens.shape
    at = jnp.full((b, t), -1, tokens.dtype).at[jnp.arange(b)[:, None], jnp.where(on, place, t)].set(tokens, mode="drop")
    order = jnp.argsort(group, stable=True)
    ids, at, positive, negative = (x[order] for x in (group, at, positive, negative))
    index = jnp.arange(b)

    def pairs(d: Array, forward: bool) -> Array:
        """[B] bool: there is a row ``d`` places before (after), and it is in the same group."""
        there = index >= d if forward else index < b - d
        return there & (jnp.roll(ids, d if forward else -d) == ids)

    def compare(d: Array, flags: tuple[Array, Array]) -> tuple[Array, Array]:
        for forward in (True, False):
            shift = d if forward else -d
            same = (at == jnp.roll(at, shift, 0)) & pairs(d, forward)[:, None]
            flags = tuple(
                f | (same & jnp.roll(x, shift)[:, None]) for f, x in zip(flags, (positive, negative), strict=True)
            )
        return flags

    start = tuple(jnp.broadcast_to(x[:, None], (b, t)) & (at >= 0) for x in (positive, negative))
    _, (some_positive, some_negative) = lax.while_loop(
        lambda c: jnp.any(pairs(c[0], True)), lambda c: (c[0] + 1, compare(*c)), (jnp.ones((), index.dtype), start)
    )
    both = (some_positive & some_negative)[jnp.argsort(order)]
    return jnp.take_along_axis(both, jnp.clip(place, 0, t - 1), 1) & on


def shared_runs(tokens: Array, mask: Array, group: Array, adv: Array) -> tuple[Array, Array]:
    """(forward, backward), [B, T] bool each: the tokens in the row's forward run and in its backward run (GTPO,
    arXiv:2508.03772).

    A (place, token) is in conflict if some row of the group with A > 0 and some row with A < 0 have it. The forward run
    is the longest prefix of conflicts. The backward run is the longest suffix, with places counted from each row's
    end."""
    on = mask > 0
    forward = ordinals(mask)
    backward = on.sum(-1, keepdims=True) - 1 - forward
    positive, negative = adv > 0, adv < 0
    ahead = _shared(tokens, forward, on, group, positive, negative)
    behind = _shared(tokens, backward, on, group, positive, negative)
    prefix = jnp.cumprod(jnp.where(on, ahead, True), -1).astype(bool) & on
    suffix = lax.cumprod(jnp.where(on, behind, True).astype(jnp.int32), axis=1, reverse=True).astype(bool) & on
    return prefix, suffix


def conflict_weight(
    tokens: Array, mask: Array, group: Array, adv: Array, *, w_pos: float = 2.0, normalize: bool = True
) -> Array:
    """``lambda_t / n_i`` [B, T] of GTPO: each run multiplies its tokens by ``w_pos`` (A > 0) or 0 (A < 0), and
    ``n_i`` is the length of the longer run (at least 1; 1 with ``normalize=False``). Rows with A = 0 have weight 1."""
    prefix, suffix = shared_runs(tokens, mask, group, adv)
    factor = jnp.where(adv > 0, w_pos, jnp.where(adv < 0, 0.0, 1.0))[:, None]
    weight = jnp.where(prefix, factor, 1.0) * jnp.where(suffix, factor, 1.0)
    if not normalize:
        return weight
    longest = jnp.maximum(jnp.maximum(prefix.sum(-1), suffix.sum(-1)), 1).astype(weight.dtype)
    return weight / jnp.where(adv != 0, longest, 1)[:, None]


def token_group_normalized(
    reward: Array,
    mask: Array,
    group: Array,
    count: Array,
    fallback: Array,
    *,
    guard: float = 5.0,
    adv_eps: float = 1e-6,
) -> Array:
    """[B] ``(reward - mean) / (std + adv_eps)`` with mean and population std over all *tokens* of the group (HAPO,
    arXiv:2509.16591). A group with some |A| >= ``guard`` gets ``fallback`` [B] instead, and so does a single row."""
    tokens = promote((mask > 0).sum(-1)) * promote(count)
    mean = group_mean(reward, group, tokens)
    std = group_std(reward, group, tokens, 0)
    adv = jnp.where(std > 0, (promote(reward) - mean) / (std + adv_eps), 0)
    too_large = group_sum(jnp.where(tokens > 0, jnp.abs(adv) >= guard, False).astype(adv.dtype), group) > 0
    alone = group_size(group, count) == 1
    return lax.stop_gradient(jnp.where(too_large | alone | (jnp.asarray(guard) <= 0), fallback, adv))


def entropy_signal(
    entropy: Array, weight: Array, *, rho: float = 0.8, official: bool = False
) -> tuple[Array, dict[str, Array]]:
    """HAPO's ``h`` [B, T], and the four numbers that define it.

    ``l = log max(H, 1e-8)``; ``q`` is its rho-quantile (nearest index) over tokens of multiplicity ``weight``; ``s`` is
    the RMS distance to q; ``z = (l - q)/s``. Above q ``h = z / max z``, below it ``h = z / |min z|`` (``official``:
    divided by ``min z``, which makes it positive too)."""
    level = jnp.log(jnp.maximum(promote(entropy), 1e-8))
    weight = promote(weight)
    n = weight.sum()
    q = kth_smallest(level, weight, jnp.round(rho * (n - 1)) + 1)
    q = jnp.where(n > 0, q, 0)
    s = jnp.sqrt(ratio_or_zero(jnp.sum(jnp.where(weight > 0, jnp.square(level - q), 0) * weight), n))
    z = ratio_or_zero(level - q, s)
    high = jnp.maximum(jnp.max(jnp.where(weight > 0, z, 0)), 1e-8)
    low = jnp.maximum(jnp.max(jnp.where(weight > 0, -z, 0)), 1e-8)
    numbers = dict(q=q, s=s, high=high, low=low)
    h = entropy_position(entropy, numbers, official=official)
    return lax.stop_gradient(jnp.where(weight > 0, h, 0)), lax.stop_gradient(numbers)


def entropy_position(entropy: Array, numbers: dict[str, Array], *, official: bool = False) -> Array:
    """``h`` of any entropies, from the numbers of an earlier `entropy_signal`."""
    z = ratio_or_zero(jnp.log(jnp.maximum(promote(entropy), 1e-8)) - numbers["q"], numbers["s"])
    return jnp.where(z > 0, z / numbers["high"], (-z if official else z) / numbers["low"])
