"""Penalties per token. The *value* and the *gradient* of a KL term are chosen separately."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxpo.primitives.numerics import clamp, promote

Estimator = Literal["k1", "k2", "k3", "abs"]
KL_ESTIMATORS = get_args(Estimator)


def kl_estimate(logp: Array, logp_ref: Array, estimator: str, *, exponent_clip: float = 20.0) -> Array:
    """Estimate of KL(pi || ref) from a token sampled from pi, with ``d = logp - logp_ref`` (Schulman, 2020).

    k1 = d; k2 = d^2/2; k3 = exp(-d) + d - 1 (>= 0); abs = |d|. As a loss, E[grad k1] = 0, E[grad k2] = grad
    KL(pi||ref), E[grad k3] = grad KL(ref||pi). k3 clamps d to ``±exponent_clip`` in both terms (as verl does). If only
    the exponent were clamped, the gradient of the other term would drive the policy away from the reference."""
    d = promote(logp) - promote(logp_ref)
    match estimator:
        case "k1":
            return d
        case "k2":
            return jnp.square(d) / 2
        case "k3":
            # expm1 keeps the small values that exp(-d) - 1 + d would cancel.
            d = clamp(d, -exponent_clip, exponent_clip)
            return jnp.expm1(-d) + d
        case "abs":
            return d * jnp.sign(d)  # jnp.abs has gradient 1 at 0, where this has none
    raise ValueError(f"unknown KL estimator {estimator!r}: known: {', '.join(KL_ESTIMATORS)}")


def kl_penalty(
    logp: Array, logp_ref: Array, value: str = "k3", gradient: str | None = None, ratio: Array | None = None
) -> Array:
    """A KL penalty with the value of one estimator and the gradient of another.

    Args:
      value: the estimator that gives the value.
      gradient: the estimator that gives the gradient; None = ``value``.
      ratio: differentiable importance ratio; ``ratio * k3`` has the exact gradient of KL(pi||ref) off-policy.
    """
    penalty = kl_estimate(logp, logp_ref, value)
    if gradient is not None and gradient != value:
        straight_through = kl_estimate(logp, logp_ref, gradient)
        penalty = straight_through - lax.stop_gradient(straight_through) + lax.stop_gradient(penalty)
    return penalty if ratio is None else ratio * penalty


def ratio_variance(log_ratio: Array, delta: float) -> Array:
    """``(r - 1)^2 - delta`` [B, T]: by how much the variance of the ratio (around its mean 1) exceeds ``delta`` (R2VPO,
    arXiv:2601.03320)."""
    return jnp.square(jnp.exp(log_ratio) - 1) - delta


def proximal(log_ratio: Array) -> Array:
    """``r - 1 - log r`` [B, T], a non-negative sample of ``KL(pi_old || pi)``; its gradient in logp is ``r - 1``."""
    return jnp.expm1(log_ratio) - log_ratio


def toward(logp: Array, target: Array, *, clip: float = 10.0) -> Array:
    """``exp(y - logp) - (y - logp) - 1`` [B, T] with a constant target ``y``; the result is clamped to ``±clip``
    (Lp-Reg, arXiv:2510.03222, as released). 0 where the target is -inf."""
    known = jnp.isfinite(target)
    gap = jnp.where(known, lax.stop_gradient(target) - promote(logp), 0)
    return clamp(jnp.where(known, jnp.expm1(jnp.minimum(gap, 80.0)) - gap, 0), -clip, clip)


def without_noise(logits: Array, kappa: float = 0.02, tau: float | None = None) -> tuple[Array, Array]:
    """The policy restricted to tokens with ``pi > kappa max pi`` (min-p), or with ``pi > tau``, and renormalized: its
    log-probs [N, V], a constant, and the mass [N] that is cut (Lp-Reg, arXiv:2510.03222).

    -inf for a token that is cut; all are cut where none is above ``tau``.

    Args:
      logits: [N, V]. tau: a fixed threshold, instead of ``kappa``."""
    logp = lax.stop_gradient(jax.nn.log_softmax(promote(logits)))
    kept = logp > (logp.max(-1, keepdims=True) + jnp.log(promote(kappa)) if tau is None else jnp.log(promote(tau)))
    cut = jnp.sum(jnp.where(kept, 0, jnp.exp(logp)), -1, keepdims=True)
    # Where little is cut log1p is exact: where nothing is, the proxy is the policy, bit for bit.
    mass = jax.nn.logsumexp(jnp.where(kept, logp, -jnp.inf), -1, keepdims=True)
    mass = jnp.where(cut < 0.5, jnp.log1p(-jnp.minimum(cut, 0.5)), mass)
    return jnp.where(kept, logp - mass, -jnp.inf), cut[..., 0]


def log_proxy_at(
    logits: Array, tokens: Array, *, kappa: float = 0.02, tau: float | None = None, above: bool = False
) -> Array:
    """[N] log-probs of ``tokens`` under the proxy of `without_noise`; with ``above`` only where they exceed the
    policy's, -inf where nothing is cut."""
    log_proxy, cut = without_noise(logits, kappa, tau)
    at = jnp.take_along_axis(log_proxy, tokens[:, None], -1)[:, 0]
    return jnp.where(cut > 0, at, -jnp.inf) if above else at


def forward_kl_to_proxy(
    logits: Array, of: Array | None = None, *, kappa: float = 0.02, tau: float | None = None
) -> Array:
    """[N] ``KL(proxy || pi)`` over the whole vocabulary, with the proxy of `without_noise`; 0 where no token
    survives.

    If the proxy is the policy's own, with ``Z = sum_{kept} pi``, its value is ``-log Z``. Its gradient in the logits is
    ``pi - proxy``.

    Args:
      logits: [N, V]. of: logits [N, V] of the model whose proxy it is; None = of the policy itself."""
    target, _ = without_noise(logits if of is None else of, kappa, tau)
    gap = jnp.where(target > -jnp.inf, target, 0) - jax.nn.log_softmax(promote(logits))
    return jnp.sum(jnp.where(target > -jnp.inf, jnp.exp(target) * gap, 0), -1)


def log_prob_at(logits: Array, tokens: Array, *, temperature: float) -> Array:
    """[N] log-prob of ``tokens`` under ``softmax(logits / temperature)``."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits / temperature), tokens[:, None], -1)[:, 0]


def linear_tailed_expm1(x: Array, c: float = 10.0) -> Array:
    """``exp(x) - 1`` for x below c; above c its tangent at c, ``exp(c) (1 + x - c) - 1``."""
    low = jnp.minimum(x, c)
    return jnp.expm1(low) + jnp.exp(low) * (x - low)


def response_divergence(log_ratio: Array, kind: str, *, c: float = 10.0) -> Array:
    """[B] a response's share of a divergence to the reference (arXiv:2403.03185, as released: differentiated at fixed
    samples). Never negative, and 0 at R = 0.

    With ``R = sum_t (logp - logp_ref)`` and e = `linear_tailed_expm1`: "kl" is ``R + e(-R)``, "chi2" is
    ``e(R) + e(-R)``."""
    e = linear_tailed_expm1(-log_ratio, c)
    return log_ratio + e if kind == "kl" else linear_tailed_expm1(log_ratio, c) + e


def sqrt_above(x: Array, floor: float = 1e-4) -> Array:
    """``sqrt(max(x, floor))``, constant below the floor."""
    return jnp.sqrt(jnp.where(x > floor, x, floor))


OCCUPANCY = ("kl", "chi2", "sqrt_chi2", "tv")


def occupancy_penalty(d: Array, kind: str) -> Array:
    """[B] penalty of states from a discriminator ``d ~ log(mu_pi / mu_base)`` (arXiv:2403.03185).

    Args:
      kind: "kl": ``d``. "chi2": ``x = exp(d) - 1``. "sqrt_chi2": ``x`` divided by the root of its mean without 1 % of
        the values at each end (not divided if that mean is not positive). "tv": ``sign(d)``."""
    match kind:
        case "kl":
            return promote(d)
        case "chi2":
            return jnp.expm1(promote(d))
        case "sqrt_chi2":
            x, cut = jnp.expm1(promote(d)), d.shape[0] // 100
            mean = jnp.sort(x)[cut : d.shape[0] - cut].mean()
            return jnp.where(mean > 0, x * lax.rsqrt(jnp.where(mean > 0, mean, 1)), x)
        case "tv":
            return jnp.sign(promote(d))
    raise ValueError(f"kind must be one of {', '.join(OCCUPANCY)}, not {kind!r}")


def discriminator_loss(d: Array, of_policy: Array) -> Array:
    """[B] ``softplus(-d)`` for the policy's states, ``softplus(d)`` for the base's; the minimum is at
    ``d = log(mu_pi/mu_base)``."""
    return jnp.where(of_policy > 0, jax.nn.softplus(-d), jax.nn.softplus(d))
