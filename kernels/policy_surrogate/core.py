"""Shared by the implementations: the arrays, and the arithmetic of one token with its derivative."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

FORMS = ("clipped", "detached")
KL = ("k1", "k2", "k3")
KL_CLIP = 20.0  # k3 takes no larger differences, so that its exponential stays finite


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Settings:
    """The static options of `policy_surrogate`.

    form: one of `FORMS`.
    dual: bound c > 1 of the dual clip, or None.
    log_ratio_clip: bound of log-ratios.
    kl: one of `KL`, or None.
    interpret: run Pallas kernels interpreted.
    """

    form: str
    dual: float | None
    log_ratio_clip: float
    kl: str | None
    interpret: bool = False


class Tokens(NamedTuple):
    """The arrays of a call: [B, T] each, or with an axis of size 1 that is broadcast; float32 at least."""

    logp: Any
    logp_old: Any
    adv: Any
    weight: Any
    count: Any
    low: Any
    high: Any
    logp_ref: Any = None
    kl_weight: Any = None


class Sums(NamedTuple):
    """Sums over all tokens, [] each.

    policy: the loss, weighted by ``weight``.
    kl: the KL penalty, weighted by ``kl_weight``; None without one.
    tokens: the sum of ``count``, which weighs the following sums too.
    clipped: tokens that lose their gradient.
    ratio: ``r``.
    surrogate: ``r A``.
    kl_old: k3 of logp_old.
    kl_ref: k3 of logp_ref; None without a KL penalty.
    """

    policy: Any
    kl: Any
    tokens: Any
    clipped: Any
    ratio: Any
    surrogate: Any
    kl_old: Any
    kl_ref: Any


def named(settings: Settings) -> list[str]:
    """The fields of `Sums` that are not None, in order."""
    return [name for name in Sums._fields if settings.kl or name not in ("kl", "kl_ref")]


class Outcome(NamedTuple):
    """The result of one pass.

    sums: the sums.
    dpolicy: [B, T] d policy/d logp.
    dkl: [B, T] d kl/d logp; None without a KL penalty.
    """

    sums: Sums
    dpolicy: Any
    dkl: Any


# (settings, tokens) -> Outcome
Implementation = Callable[[Settings, Tokens], Outcome]


def expm1(x: Array) -> Array:
    """``exp(x) - 1`` without cancellation, from operations that TPUs have. Exact to a few ulp for |x| <= 20."""
    t = jnp.tanh(x / 2)
    return jnp.where(jnp.abs(x) < 1, 2 * t / (1 - t), jnp.exp(x) - 1)


def token(settings: Settings, x: Tokens, expm1: Callable[[Array], Array] = expm1) -> tuple[Sums, Array, Array | None]:
    """The terms of `Sums` [B, T], and the derivatives of policy and kl in logp.

    With ``r = exp(clip(logp - logp_old, -C, C))``: "clipped" is ``-min(r A, clip(r, low, high) A)``, and with ``dual``
    at most ``-dual A`` where A < 0; "detached" is ``-sg(clip(r, low, high) A) logp``. Where weight, kl_weight and count
    are all 0 the results are 0, whatever the other arrays hold.
    """
    live = (x.weight != 0) | (x.count != 0)
    live = live if x.kl_weight is None else live | (x.kl_weight != 0)
    x = Tokens(*(None if y is None else jnp.where(live, y, 0) for y in x))
    difference, adv = x.logp - x.logp_old, x.adv
    r = jnp.exp(jnp.clip(difference, -settings.log_ratio_clip, settings.log_ratio_clip))
    bounded = jnp.clip(r, x.low, x.high)
    if settings.form == "clipped":
        cut = ((adv > 0) & (r > x.high)) | ((adv < 0) & (r < x.low))
        loss = -jnp.minimum(r * adv, bounded * adv)
        if settings.dual is not None:
            cut = cut | ((adv < 0) & (r > settings.dual))
            loss = jnp.where(adv < 0, jnp.minimum(loss, -settings.dual * adv), loss)
        moves = jnp.logical_not(cut) & (jnp.abs(difference) < settings.log_ratio_clip)
        slope = jnp.where(moves, -r * adv, 0)
    else:
        cut, slope = jnp.zeros_like(live), -bounded * adv
        loss = slope * x.logp
    kl = dkl = kl_ref = None
    if settings.kl is not None:
        value, slope_kl = kl_and_slope(settings.kl, x.logp - x.logp_ref, expm1)
        kl, dkl = x.kl_weight * value, x.kl_weight * slope_kl
        kl_ref = x.count * kl_and_slope("k3", x.logp - x.logp_ref, expm1)[0]
    kl_old = x.count * kl_and_slope("k3", difference, expm1)[0]
    clipped, ratio = jnp.where(cut, x.count, 0), x.count * r
    return Sums(x.weight * loss, kl, x.count, clipped, ratio, ratio * adv, kl_old, kl_ref), x.weight * slope, dkl


def kl_and_slope(estimator: str, d: Array, expm1: Callable[[Array], Array]) -> tuple[Array, Array]:
    """k1 = d, k2 = d^2/2 or k3 = exp(-d) + d - 1 (d clipped to ±20) of ``d = logp - logp_ref``, and its derivative."""
    if estimator == "k1":
        return d, jnp.ones_like(d)
    if estimator == "k2":
        return d * d / 2, d
    inside = jnp.clip(d, -KL_CLIP, KL_CLIP)
    e = expm1(-inside)
    return e + inside, jnp.where(jnp.abs(d) < KL_CLIP, -e, 0)
