"""The naive form, for tests and for reading: the losses as in the formulas, with JAX's own derivative."""

import jax.numpy as jnp
from jax import Array, lax

from jaxpo.kernels.policy_surrogate.core import KL_CLIP, Settings, Sums, Tokens


def clamp(x: Array, bound: float) -> Array:
    """``clip(x, -bound, bound)``, with no gradient at the ends and beyond."""
    return jnp.where(jnp.abs(x) < bound, x, lax.stop_gradient(jnp.clip(x, -bound, bound)))


def policy_surrogate(settings: Settings, x: Tokens) -> Sums:
    """`Sums`, differentiable in logp. Masked positions must be finite."""
    bound = settings.log_ratio_clip
    r = jnp.exp(clamp(x.logp - x.logp_old, bound))
    bounded = jnp.clip(r, x.low, x.high)
    cut = jnp.zeros_like(r, bool)
    if settings.form == "clipped":
        cut = ((x.adv > 0) & (r > x.high)) | ((x.adv < 0) & (r < x.low))
        loss = -jnp.where(cut, lax.stop_gradient(bounded), r) * x.adv
        if settings.dual is not None:
            too_far = (x.adv < 0) & (r > settings.dual)
            loss, cut = jnp.where(too_far, -settings.dual * x.adv, loss), cut | too_far
    else:
        loss = -lax.stop_gradient(bounded * x.adv) * x.logp

    def total(weight: Array, value: Array) -> Array:
        return jnp.sum(jnp.broadcast_to(weight * value, x.logp.shape))

    def k3(d: Array) -> Array:
        d = clamp(d, KL_CLIP)
        return jnp.expm1(-d) + d

    kl = kl_ref = None
    if settings.kl is not None:
        d = x.logp - x.logp_ref
        kl = total(x.kl_weight, {"k1": d, "k2": d * d / 2, "k3": k3(d)}[settings.kl])
        kl_ref = total(x.count, lax.stop_gradient(k3(d)))
    r, kl_old = lax.stop_gradient((r, k3(x.logp - x.logp_old)))
    counted = (total(x.count, y) for y in (jnp.ones_like(r), cut, r, r * x.adv, kl_old))
    return Sums(total(x.weight, loss), kl, *counted, kl_ref)
