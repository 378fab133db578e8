"""Statistics of rows that share a group id. Groups need not be contiguous, equal in size, or numbered from 0.

``count`` [B] is the multiplicity of a row: a row with count w counts w times, a row with count 0 not at all.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxpo.primitives.numerics import promote, ratio_or_zero


def segments(group: Array) -> Array:
    """Group ids [B] renumbered to 0..n-1 (at most B), usable as segment ids under jit."""
    return jnp.unique(group, return_inverse=True, size=group.shape[0])[1].reshape(-1)


def group_sum(x: Array, group: Array) -> Array:
    """[B] sum of ``x`` over the row's group, at every row."""
    ids = segments(group)
    return jax.ops.segment_sum(x, ids, num_segments=group.shape[0])[ids]


def group_size(group: Array, count: Array) -> Array:
    """[B] total multiplicity of the row's group."""
    return group_sum(promote(count), group)


def group_mean(x: Array, group: Array, count: Array) -> Array:
    """[B] mean of ``x`` over the row's group; 0 for a group of multiplicity 0."""
    return ratio_or_zero(group_sum(jnp.where(count > 0, promote(x), 0) * count, group), group_size(group, count))


def group_constant(x: Array, group: Array, count: Array) -> Array:
    """[B] bool: all counted rows of the group have exactly the same ``x``. It compares maximum and minimum, so rounding
    plays no role."""
    ids, x = segments(group), promote(x)
    high = jax.ops.segment_max(jnp.where(count > 0, x, -jnp.inf), ids, num_segments=group.shape[0])[ids]
    low = jax.ops.segment_min(jnp.where(count > 0, x, jnp.inf), ids, num_segments=group.shape[0])[ids]
    return high <= low


def weighted_std(x: Array, count: Array, ddof: int) -> Array:
    """Standard deviation of ``x`` [B] over all counted rows; 0 if there are at most ``ddof`` rows, or all values are
    equal."""
    x, n = promote(x), promote(count).sum()
    mean = ratio_or_zero(jnp.sum(jnp.where(count > 0, x, 0) * count), n)
    square = jnp.where(count > 0, jnp.square(x - mean), 0)
    constant = jnp.max(jnp.where(count > 0, x, -jnp.inf)) <= jnp.min(jnp.where(count > 0, x, jnp.inf))
    return jnp.where(constant, 0, jnp.sqrt(ratio_or_zero(jnp.sum(square * count), jnp.maximum(n - ddof, 0))))


def group_std(x: Array, group: Array, count: Array, ddof: int) -> Array:
    """[B] standard deviation of ``x`` over the row's group; exactly 0 for constant groups and for ``ddof`` rows or
    fewer."""
    mean = group_mean(x, group, count)
    square = jnp.where(count > 0, jnp.square(promote(x) - mean), 0)
    degrees = jnp.maximum(group_size(group, count) - ddof, 0)
    return jnp.where(
        group_constant(x, group, count), 0, jnp.sqrt(ratio_or_zero(group_sum(square * count, group), degrees))
    )
