"""Penalties per token. For a KL term the *value* and the *gradient* are chosen apart: they are not the same
question."""

import jax.numpy as jnp
from jax import Array, lax

from jaxpo.primitives.numerics import promote

KL_ESTIMATORS = ("k1", "k2", "k3", "abs")


def kl_estimate(logp: Array, logp_ref: Array, estimator: str, *, exponent_clip: float = 20.0) -> Array:
    """Estimate of KL(pi || ref) from a token sampled from pi, with ``d = logp - logp_ref`` (Schulman, 2020).

    k1 = d; k2 = d^2/2; k3 = exp(-d) + d - 1 (>= 0); abs = |d|. As a loss, E[grad k1] = 0, E[grad k2] = grad
    KL(pi||ref),
    E[grad k3] = grad KL(ref||pi). k3 clamps d to ``±exponent_clip`` as a whole (as verl does): were only the exponent
    clamped, the
    rest would have a gradient that drives the policy away from the reference.
    """
    d = promote(logp) - promote(logp_ref)
    match estimator:
        case "k1":
            return d
        case "k2":
            return jnp.square(d) / 2
        case "k3":
            # expm1 keeps the small values that exp(-d) - 1 + d would cancel.
            d = jnp.clip(d, -exponent_clip, exponent_clip)
            return jnp.expm1(-d) + d
        case "abs":
            return jnp.abs(d)
    raise ValueError(f"unknown KL estimator {estimator!r}: known: {', '.join(KL_ESTIMATORS)}")


def kl_penalty(
    logp: Array, logp_ref: Array, value: str = "k3", gradient: str | None = None, ratio: Array | None = None
) -> Array:
    """A KL penalty whose value is the estimator ``value`` and whose gradient is that of ``gradient`` (default: the
    same).

    Args:
      ratio: differentiable importance ratio; ``ratio * k3`` has the exact gradient of KL(pi||ref) off-policy.
    """
    penalty = kl_estimate(logp, logp_ref, value)
    if gradient is not None and gradient != value:
        straight_through = kl_estimate(logp, logp_ref, gradient)
        penalty = straight_through - lax.stop_gradient(straight_through) + lax.stop_gradient(penalty)
    return penalty if ratio is None else ratio * penalty
