"""Float rules that every primitive shares."""

import jax.numpy as jnp
from jax import Array, lax


def promote(x: Array) -> Array:
    """At least float32: bfloat16 is widened, float64 passes untouched, counts and masks get the default float type."""
    x = jnp.asarray(x)
    return x.astype(
        jnp.promote_types(x.dtype, jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.result_type(float)
    )


def clamp(x: Array, low: Array | float = -jnp.inf, high: Array | float = jnp.inf) -> Array:
    """``clip(x, low, high)`` whose gradient is that of x strictly between the ends and 0 at them and beyond.

    What a clamp bounds (a log-ratio, the exponent of a KL estimate, a log-prob below 0) no longer moves there.
    `jnp.clip` has half the gradient exactly at its ends. NaN stays NaN."""
    return jnp.where((x > low) & (x < high), x, lax.stop_gradient(jnp.clip(x, low, high)))


def ratio_or_zero(numerator: Array, denominator: Array) -> Array:
    """``numerator / denominator``; where the denominator is 0, the value and the gradient are exactly 0 (a mean over
    nothing is 0)."""
    safe = jnp.where(denominator == 0, 1, denominator)
    return jnp.where(denominator == 0, 0, numerator / safe)
