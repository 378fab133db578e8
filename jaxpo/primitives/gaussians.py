"""Densities of Gaussian steps."""

import jax.numpy as jnp
from jax import Array, lax

from jaxpo.primitives.numerics import promote


def kl(mean: Array, mean_ref: Array, scale: Array) -> Array:
    """``mean_D (mean - mean_ref)^2 / (2 scale^2)`` [...]: the KL per coordinate between two Gaussians with the same
    standard deviation (Flow-GRPO, arXiv:2505.05470); 0 where ``scale`` is 0, which marks a step without noise.

    Args:
      mean: [..., D].
      mean_ref: [..., D], a constant.
      scale: [...] standard deviation."""
    noisy = scale > 0
    gap = jnp.square(promote(mean) - lax.stop_gradient(promote(mean_ref))).mean(-1)
    return jnp.where(noisy, gap / (2 * jnp.square(jnp.where(noisy, promote(scale), 1))), 0)
