"""Losses of a value function against returns."""

import jax.numpy as jnp
from jax import Array

from jaxpo.primitives.numerics import promote


def clipped_square(value: Array, value_old: Array, returns: Array, eps: Array | float | None = 0.2) -> Array:
    """``max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) / 2`` in the shape of ``value`` (PPO's value loss,
    arXiv:1707.06347); ``(V - R)^2 / 2`` if ``eps`` is None."""
    value, value_old = promote(value), promote(value_old)
    error = jnp.square(value - returns)
    if eps is None:
        return error / 2
    clipped = jnp.clip(value, value_old - eps, value_old + eps)
    return jnp.maximum(error, jnp.square(clipped - returns)) / 2
