"""A value of every prompt that is kept across batches (SPO single-stream, arXiv:2509.13232): a Beta posterior that
forgets."""

import jax.numpy as jnp
from jax import Array, lax

from jaxpo.primitives.numerics import promote


def tracker_init(successes: Array, samples: float | Array, *, rho_min: float = 0.875) -> tuple[Array, Array]:
    """``alpha = N0 (s + 0.5)/(n0 + 1)``, ``beta = N0 (n0 - s + 0.5)/(n0 + 1)``, ``N0 = 1/(1 - rho_min)``, from ``s``
    successes among ``n0`` offline samples; ``n0 = 0``: 0.5 each."""
    successes, samples = promote(successes), promote(samples)
    size = jnp.where(samples > 0, 1 / (1 - rho_min), 1.0)
    return size * (successes + 0.5) / (samples + 1), size * (samples - successes + 0.5) / (samples + 1)


def forgetting(drift: Array, *, d_half: float = 0.06, rho_min: float = 0.875, rho_max: float = 0.96) -> Array:
    """``rho = clip(2^(-D/d_half), rho_min, rho_max)``: the further the policy has moved (the drift ``D``), the less of
    the past is kept."""
    return jnp.clip(jnp.exp2(-promote(drift) / d_half), rho_min, rho_max)


def tracker_update(alpha: Array, beta: Array, reward: Array, rho: Array) -> tuple[Array, Array]:
    """``alpha <- rho alpha + reward``, ``beta <- rho beta + 1 - reward``. The value ``alpha/(alpha + beta)`` moves by
    ``eta (reward - v)`` with ``eta = 1/(rho (alpha + beta) + 1)``."""
    return rho * alpha + reward, rho * beta + 1 - reward


def tracker_value(alpha: Array, beta: Array) -> Array:
    """``v = alpha / (alpha + beta)``."""
    return lax.stop_gradient(alpha / (alpha + beta))


def prompt_weights(value: Array, *, floor: float = 0.05) -> Array:
    """Sampling weights ``sqrt(v (1 - v)) + floor`` of prompts (not normalized); largest at 1/2, never 0."""
    return jnp.sqrt(jnp.maximum(value * (1 - value), 0)) + floor
