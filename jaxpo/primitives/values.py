"""Losses of a value function against returns."""

import jax.numpy as jnp
from jax import Array, lax

from jaxpo.primitives.numerics import promote


def clipped_square(value: Array, value_old: Array, returns: Array, eps: Array | float | None = 0.2) -> Array:
    """``max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) / 2`` in the shape of ``value`` (PPO's value loss,
    arXiv:1707.06347); ``(V - R)^2 / 2`` if ``eps`` is None. No gradient where the clipped value has the larger
    error; a value exactly at a bound has its own."""
    value, value_old = promote(value), promote(value_old)
    error = jnp.square(value - returns)
    if eps is None:
        return error / 2
    bounded = jnp.square(jnp.clip(value, value_old - eps, value_old + eps) - returns)
    outside = jnp.abs(value - value_old) > eps
    return jnp.where(outside & (bounded > error), lax.stop_gradient(bounded), error) / 2
