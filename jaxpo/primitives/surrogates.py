"""Surrogate losses per token (or per row). Their gradient is a paper's policy gradient."""

import jax.numpy as jnp
from jax import Array, lax

from jaxpo.primitives.numerics import promote, ratio_or_zero
from jaxpo.primitives.ratios import sequence_mean_log_ratio


def log_prob(logp: Array, adv: Array) -> Array:
    """``-A logp`` (REINFORCE, Williams 1992)."""
    return -adv * promote(logp)


def clipped(ratio: Array, adv: Array, low: Array | float, high: Array | float, dual: float | None = None) -> Array:
    """``-min(r A, clip(r, low, high) A)`` (PPO, arXiv:1707.06347, eq. 7).

    A ratio exactly at a bound, or at ``dual``, still has its gradient: `is_clipped` says which have none.

    Args:
      ratio, adv: [B, T] or [B].
      low, high: bounds of the ratio (not of ratio - 1), scalars or one for each token.
      dual: c > 1; where A < 0 the objective does not fall below ``c A`` (dual clip, arXiv:1912.09729). None = off.
    """
    bounded = jnp.where(adv > 0, high, low)
    loss = -jnp.where(is_clipped(ratio, adv, low, high), bounded, ratio) * adv
    return loss if dual is None else jnp.where((adv < 0) & (ratio > dual), -dual * adv, loss)


def is_clipped(ratio: Array, adv: Array, low: Array | float, high: Array | float, dual: float | None = None) -> Array:
    """Bool: `clipped` cuts the token's gradient."""
    cut = ((adv > 0) & (ratio > high)) | ((adv < 0) & (ratio < low))
    return cut if dual is None else cut | ((adv < 0) & (ratio > dual))


def linear(ratio: Array, adv: Array) -> Array:
    """``-r A``: the unclipped ratio surrogate."""
    return -ratio * adv


def capped(ratio: Array, adv: Array, cap: Array | float) -> Array:
    """``-min(r, cap) A``: no gradient above the cap, for either sign of A (Lp-Reg, arXiv:2510.03222)."""
    return -jnp.where(ratio > cap, cap, ratio) * adv


def detached_weight(weight: Array, adv: Array, logp: Array) -> Array:
    """``-sg(weight A) logp``: REINFORCE with a constant weight (CISPO, arXiv:2506.13585, eq. 4; REC, arXiv:2509.24203).

    The value contains raw log-probs, so values of different runs cannot be compared. Only tokens with weight 0 lose
    their gradient.
    """
    return -lax.stop_gradient(weight * adv) * promote(logp)


def clipped_weight(ratio: Array, adv: Array, logp: Array, low: Array | float, high: Array | float) -> Array:
    """``-sg(clip(r, low, high) A) logp`` (CISPO, arXiv:2506.13585, eq. 4)."""
    return detached_weight(jnp.clip(ratio, low, high), adv, logp)


def shaped_probability(logp: Array, adv: Array, gamma: Array | float | None = 0.1) -> Array:
    """``-f(p) A``, ``p = exp(logp)``, ``f(p) = p / (p + gamma)``, or ``f(p) = p`` if gamma is None (LUFFY,
    arXiv:2504.14945). Its gradient in logp is ``-A p gamma / (p + gamma)^2``."""
    p = jnp.exp(promote(logp))
    return -adv * (p if gamma is None else p / (p + gamma))


CLIP_MODES = ("none", "one-side", "two-side", "ring")


def clip_mask(
    ratio: Array,
    adv: Array,
    mode: str,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    ring_low: float = 0.6,
    ring_high: float = 2.0,
) -> Array:
    """Bool: the tokens that a mask of REC keeps (arXiv:2509.24203).

    "none": all tokens.
    "two-side": ``1 - eps_low <= r <= 1 + eps_high``.
    "one-side": ``(A >= 0 and r <= 1 + eps_high) or (A <= 0 and r >= 1 - eps_low)``; PPO keeps the gradient of these.
    "ring": two-side, or ``(A >= 0 and r <= 1 - ring_low) or (A <= 0 and r >= 1 + ring_high)``; the latter are far off,
    and their gradient leads back."""
    low, high = ratio >= 1 - eps_low, ratio <= 1 + eps_high
    match mode:
        case "none":
            return jnp.ones(ratio.shape, bool)
        case "two-side":
            return low & high
        case "one-side":
            return ((adv >= 0) & high) | ((adv <= 0) & low)
        case "ring":
            return (low & high) | ((adv >= 0) & (ratio <= 1 - ring_low)) | ((adv <= 0) & (ratio >= 1 + ring_high))
    raise ValueError(f"unknown clip mode {mode!r}: known: {', '.join(CLIP_MODES)}")


def hazard(log_ratio: Array, *, k_pos: float, lam_pos: float, k_neg: float, lam_neg: float) -> Array:
    """``zeta = (softplus(psi)/lam_pos)^k_pos + (softplus(-psi)/lam_neg)^k_neg`` for a bounded log-ratio psi: the
    cumulative Weibull hazard of a drift up or down (MHPO, arXiv:2603.16929). No gradient."""
    psi = lax.stop_gradient(log_ratio)
    return (jnp.logaddexp(psi, 0) / lam_pos) ** k_pos + (jnp.logaddexp(-psi, 0) / lam_neg) ** k_neg


def squared_residual(log_ratio: Array, adv: Array, tau: float) -> Array:
    """``(A - tau Delta)^2`` with the log-ratio ``Delta`` of a whole row: the squared residual of mirror descent's
    optimality condition (Kimi k1.5, arXiv:2501.12599)."""
    return jnp.square(adv - tau * log_ratio)


def covariance(logp: Array, adv: Array, weight: Array) -> Array:
    """``(A - mean A)(logp - mean logp)`` [B, T], with means over tokens weighted by ``weight`` (arXiv:2505.22617, eq.
    10). No gradient."""
    logp, weight, n = promote(logp), promote(weight), jnp.maximum(promote(weight).sum(), 1)

    def centered(x: Array) -> Array:
        x = jnp.broadcast_to(x, weight.shape)
        constant = jnp.max(jnp.where(weight > 0, x, -jnp.inf)) <= jnp.min(jnp.where(weight > 0, x, jnp.inf))
        return jnp.where(constant, 0, x - jnp.sum(jnp.where(weight > 0, x, 0) * weight) / n)

    return lax.stop_gradient(jnp.where(weight > 0, centered(adv) * centered(logp), 0))


def balanced_bounds(
    ratio: Array,
    adv: Array,
    weight: Array,
    *,
    target: float,
    low: tuple[float, float, float],
    high: tuple[float, float, float],
    low_first: bool,
    share: bool,
) -> tuple[Array, Array]:
    """BAPO's clip bounds (arXiv:2510.18927): they are raised step by step until positives carry enough weight.

    ``P(ch) = sum_{A >= 0} weight min(r, ch) A`` and ``N(cl) = sum_{A < 0} weight max(r, cl) |A|``; the search stops
    when ``P/(N + 1e-8)`` (with ``share``: ``P/(P+N)``) reaches ``target``. Without negatives the bounds do not move.

    Args:
      low, high: (start, maximum, step) of the two bounds.
      low_first: raise the low bound first, then the high one; False = the other way round.
      share: the paper's form, which takes no step beyond the maximum. False = the released code's form, which cuts the
        last step at the maximum.

    Returns:
      scalars (low bound, high bound).
    """
    positive, negative = jnp.where(adv >= 0, weight * adv, 0), jnp.where(adv < 0, -weight * adv, 0)

    def steps(bound: tuple[float, float, float]) -> Array:
        start, top, step = bound
        n = (jnp.asarray(top, ratio.dtype) - start) / step
        return (jnp.floor(n + 1e-4) if share else jnp.ceil(n - 1e-4)).astype(jnp.int32)

    def bounds(i: Array) -> tuple[Array, Array]:
        first, second = (low, high) if low_first else (high, low)
        n = jnp.minimum(i, steps(first)), jnp.maximum(i - steps(first), 0)
        at = [jnp.minimum(b[0] + k * b[2], b[1]).astype(ratio.dtype) for b, k in zip((first, second), n, strict=True)]
        return (at[0], at[1]) if low_first else (at[1], at[0])

    def enough(i: Array) -> Array:
        cl, ch = bounds(i)
        p, n = jnp.sum(positive * jnp.minimum(ratio, ch)), jnp.sum(negative * jnp.maximum(ratio, cl))
        reached = ratio_or_zero(p, n + p) >= target if share else p / (n + 1e-8) >= target
        return jnp.where(n > 0, reached, True)

    last = steps(low) + steps(high)
    i = lax.while_loop(lambda i: (i < last) & ~enough(i), lambda i: i + 1, jnp.zeros((), jnp.int32))
    return tuple(lax.stop_gradient(b) for b in bounds(i))


def estimator_weight(
    logp: Array,
    logp_old: Array,
    mask: Array,
    adv: Array,
    *,
    method: str,
    eps: float | Array = 0.2,
    bound: float | Array = 20.0,
) -> Array:
    """[B, T] weight ``stable A pi / pi_den`` of the unified policy-gradient estimator (arXiv:2509.04419): the gradient
    of a loss is ``-w grad logp``.

    "ppo", "grpo": ``r A`` where ``r <= 1 + eps`` (A >= 0) or ``r >= 1 - eps`` (A < 0), else 0; "gspo": the same with
    the row's ratio ``exp(mean_t (logp - logp_old))``; "cispo": ``A clip(r, 1 - eps, 1 + eps)``. Where the log-ratio
    leaves ``[-bound, bound]`` the weight is 0, but for "cispo".
    """
    x = jnp.where(mask > 0, promote(logp) - promote(logp_old), 0)
    if method == "gspo":
        x = jnp.broadcast_to(sequence_mean_log_ratio(logp, logp_old, mask, log_ratio_clip=jnp.inf)[:, None], x.shape)
    r = jnp.exp(jnp.clip(x, -bound, bound))
    if method == "cispo":
        return adv * jnp.clip(r, 1 - eps, 1 + eps)
    stable = jnp.where(adv >= 0, r <= 1 + eps, r >= 1 - eps) & (jnp.abs(x) < bound)
    return jnp.where(stable, r * adv, 0)
