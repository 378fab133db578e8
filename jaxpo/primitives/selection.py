"""Select the k smallest of a batch of numbers, and functions that build on it. No gradient, no sort.

A number counts ``weight`` times, so ``k`` is in units of weight and the answer is a *share* of each weight: the copies
of a row that was drawn twice may be chosen one by one. Ties go to the lowest index."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxpo.primitives.grouping import group_sum
from jaxpo.primitives.numerics import promote, ratio_or_zero


def _ordered(x: Array) -> Array:
    """Unsigned integers that sort like the floats."""
    x = promote(x)
    x = jnp.where(x == 0, jnp.zeros_like(x), x)  # -0.0 ties with 0.0
    bits = jnp.finfo(x.dtype).bits
    unsigned = jnp.dtype(f"uint{bits}")
    sign = jnp.array(1 << (bits - 1), unsigned)
    raw = lax.bitcast_convert_type(x, unsigned)
    return jnp.where(raw & sign, ~raw, raw | sign)


def _kth(keys: Array, weight: Array, k: Array) -> Array:
    """The smallest key for which the keys up to it weigh at least ``k`` (> 0). It is found bit by bit, so nothing is
    sorted, and a sharded batch exchanges one number for each bit."""
    bits = jnp.iinfo(keys.dtype).bits

    def try_bit(i: Array, low: Array) -> Array:
        trial = low | (jnp.array(1, keys.dtype) << (bits - 1 - i).astype(keys.dtype))
        return jnp.where(jnp.sum(jnp.where(keys < trial, weight, 0)) < k, trial, low)

    start = jnp.min(keys) & 0  # 0, but it varies over a mesh like the keys
    return lax.fori_loop(0, bits, try_bit, start)


def kth_smallest(x: Array, weight: Array, k: Array) -> Array:
    """The ``k``-th smallest value (1 = the smallest) of ``x`` [...] with multiplicities ``weight``; ``x`` must hold no
    NaN."""
    weight = promote(weight)
    keys = _ordered(x)
    return jnp.min(jnp.where((keys >= _kth(keys, weight, k)) & (weight > 0), promote(x), jnp.inf))


def smallest(x: Array, weight: Array, k: Array) -> Array:
    """[...] how much of each ``weight`` belongs to the ``k`` smallest (all of it if ``k`` exceeds the total weight)."""
    weight, keys = promote(weight), _ordered(x)
    threshold = _kth(keys, weight, k)
    below = jnp.where(keys < threshold, weight, 0)
    tied = jnp.where(keys == threshold, weight, 0).reshape(-1)
    before = (jnp.cumsum(tied) - tied).reshape(x.shape)
    room = jnp.clip(k - below.sum() - before, 0, weight)
    chosen = below + jnp.where(keys == threshold, room, 0)
    return jnp.where(k > 0, chosen, 0)


def largest(x: Array, weight: Array, k: Array) -> Array:
    """[...] how much of each ``weight`` belongs to the ``k`` largest."""
    return smallest(-promote(x), weight, k)


def before_in_group(x: Array, group: Array, count: Array) -> Array:
    """[B] multiplicity of the rows of the group that come before the row when sorted by ``x`` (ties by index)."""
    x, index = promote(x), jnp.arange(x.shape[0])
    earlier = (x[None] < x[:, None]) | ((x[None] == x[:, None]) & (index[None] < index[:, None]))
    return jnp.where(earlier & (group[None] == group[:, None]), promote(count)[None], 0).sum(1)


def max_variance(x: Array, group: Array, count: Array, n: Array) -> Array:
    """[B] how much of each row's count belongs to the subset of its group whose ``x`` varies most (D3S,
    arXiv:2509.22115).

    Such a subset is always the k largest and the n - k smallest values, so every k from 0 to n is tried. Among equal
    values the lowest indices are taken. At most B rows of a group are chosen.

    Args:
      n: [B] size of the subset, the same within a group."""
    x, count = promote(x), promote(count)
    b = x.shape[0]
    same = group[None] == group[:, None]
    mean = ratio_or_zero(group_sum(x * count, group), group_sum(count, group))
    x = jnp.where(count > 0, x - mean, 0)
    low = before_in_group(x, group, count)
    total = group_sum(count, group)
    tied = same & (x[None] == x[:, None])
    tie_count = jnp.where(tied, count[None], 0).sum(1)
    tie_start = jnp.min(jnp.where(tied & (count > 0)[None], low[None], jnp.inf), 1)

    def shares(k: Array) -> tuple[Array, Array]:
        """Units of each row among the n - k smallest, and among the k largest."""
        return jnp.clip(n - k - low, 0, count), jnp.clip(k - (total - low - count), 0, count)

    def variance(k: Array) -> Array:
        units = sum(shares(k))
        first, second = group_sum(units * x, group), group_sum(units * x * x, group)
        return jnp.where(k <= n, ratio_or_zero(second, n) - jnp.square(ratio_or_zero(first, n)), -jnp.inf)

    def better(k: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        value = variance(k.astype(x.dtype))
        return jnp.where(value > best[0], value, best[0]), jnp.where(value > best[0], k.astype(x.dtype), best[1])

    start = 0 * x - jnp.inf, 0 * x
    _, k = lax.fori_loop(0, b + 1, better, start)
    units = sum(shares(k))
    in_tie = jnp.where(tied, units[None], 0).sum(1)  # the subset's share of equal values, given to the first ones
    return jnp.where(count > 0, jnp.clip(in_tie - (low - tie_start), 0, jnp.minimum(count, tie_count)), 0)


def row_uniform(seed: Array, shape: tuple[int, ...] = (), *, stream: int) -> Array:
    """[B, ...] uniforms that depend only on the row's ``seed``, not on its place in the batch, on padding or on x64.

    Args:
      stream: a number for each purpose, so that different purposes get independent draws."""

    def draw(s: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.key(s), stream), shape, jnp.float32)

    return jax.vmap(draw)(seed)
