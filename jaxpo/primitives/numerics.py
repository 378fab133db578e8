"""Float rules that every primitive shares."""

import jax.numpy as jnp
from jax import Array


def promote(x: Array) -> Array:
    """At least float32: bfloat16 is widened, float64 passes untouched, counts and masks get the default float type."""
    x = jnp.asarray(x)
    return x.astype(
        jnp.promote_types(x.dtype, jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.result_type(float)
    )


def ratio_or_zero(numerator: Array, denominator: Array) -> Array:
    """``numerator / denominator``; where the denominator is 0, the value and the gradient are exactly 0 (a mean over
    nothing is 0)."""
    safe = jnp.where(denominator == 0, 1, denominator)
    return jnp.where(denominator == 0, 0, numerator / safe)
