"""Divergences of two distributions over the vocabulary, given as log-probs [n, V]; constant in the teacher P, and
differentiable in the student Q."""

from typing import Literal

import jax.numpy as jnp
from jax import Array, nn

from jaxpo.arguments import choice
from jaxpo.primitives.numerics import promote

Divergence = Literal[
    "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_rkl",
    "f_kl", "f_rkl", "f_js", "f_tvd", "f_chi2", "f_hellinger", "f_alpha",
]  # fmt: skip
NAMES = Divergence.__args__
LARGEST_KEPT = -1e-7  # log of the most probability that a support may hold beside its tail


def each(
    log_p: Array,
    log_q: Array,
    divergence: Divergence,
    *,
    beta: float | Array = 0.5,
    alpha: float | Array = 0.1,
    a: float | Array = 0.5,
) -> Array:
    """[..., V] summands of the divergence; those at which both are ``-inf`` are 0.

    forward_kl ``P (log P - log Q)``; reverse_kl ``Q (log Q - log P)``; jsd ``beta KL(P||M) + (1 - beta) KL(Q||M)`` with
    ``M = beta P + (1 - beta) Q``, which at beta 0 and 1 is forward and reverse KL by definition; skew_kl ``KL(P ||
    alpha P + (1 - alpha) Q)``; skew_rkl ``KL(Q || alpha Q + (1 - alpha) P)``; f_* ``Q f(P / Q)`` (GKD,
    arXiv:2306.13649; DistiLLM, arXiv:2402.03898; f-distill, arXiv:2307.15190).
    """
    choice("divergence", divergence, NAMES)
    gone = jnp.isneginf(log_p) & jnp.isneginf(log_q)
    log_p, log_q = (jnp.where(gone, 0.0, promote(x)) for x in (log_p, log_q))
    p, q = jnp.exp(log_p), jnp.exp(log_q)

    def kl(x: Array, log_x: Array, log_y: Array) -> Array:
        return x * (log_x - log_y)

    def mixed(share: float | Array, log_x: Array, log_y: Array) -> Array:
        """log of ``share x + (1 - share) y``."""
        share = jnp.asarray(share, log_x.dtype)
        return jnp.logaddexp(jnp.log(share) + log_x, jnp.log1p(-share) + log_y)

    if divergence in ("jsd", "f_js"):
        w = 0.5 if divergence == "f_js" else beta
        concrete = isinstance(w, int | float)
        if concrete and w in (0, 1):
            out = kl(p, log_p, log_q) if w == 0 else kl(q, log_q, log_p)
        else:
            log_m = mixed(w, log_p, log_q)
            out = w * kl(p, log_p, log_m) + (1 - w) * kl(q, log_q, log_m)
    elif divergence in ("forward_kl", "f_kl"):
        out = kl(p, log_p, log_q)
    elif divergence in ("reverse_kl", "f_rkl"):
        out = kl(q, log_q, log_p)
    elif divergence == "skew_kl":
        out = kl(p, log_p, mixed(alpha, log_p, log_q))
    elif divergence == "skew_rkl":
        out = kl(q, log_q, mixed(alpha, log_q, log_p))
    elif divergence == "f_tvd":
        out = 0.5 * jnp.abs(p - q)
    elif divergence == "f_chi2":
        out = jnp.exp(2 * log_p - log_q) - 2 * p + q
    elif divergence == "f_hellinger":
        out = jnp.square(jnp.exp(log_p / 2) - jnp.exp(log_q / 2))
    else:
        out = (jnp.exp(a * log_p + (1 - a) * log_q) - a * p - (1 - a) * q) / (a * (a - 1))
    return jnp.where(gone, 0.0, out)


def full(log_p: Array, log_q: Array, divergence: Divergence, **numbers: float | Array) -> Array:
    """[n] the divergence over the whole vocabulary."""
    return each(log_p, log_q, divergence, **numbers).sum(-1)


def top(log_x: Array, k: int) -> Array:
    """[n, V] bool: the k most probable tokens, ties to the lower id."""
    n, v = log_x.shape
    order = jnp.argsort(-log_x, -1, stable=True)[:, :k]
    return jnp.zeros((n, v), bool).at[jnp.arange(n)[:, None], order].set(True)


def support_of(log_p: Array, log_q: Array, divergence: Divergence, k: int, beta: float | Array = 0.5) -> Array:
    """[n, V] bool, constant: the teacher's top k for forward divergences, the student's for reverse ones, both for the
    others."""
    plain = beta if isinstance(beta, int | float) else None
    forward = divergence in ("forward_kl", "f_kl") or divergence == "jsd" and plain == 0
    reverse = divergence in ("reverse_kl", "f_rkl") or divergence == "jsd" and plain == 1
    if forward:
        return top(log_p, k)
    return top(log_q, k) if reverse else top(log_p, k) | top(log_q, k)


def on_support(
    log_p: Array, log_q: Array, support: Array, divergence: Divergence, *, tail: bool = True, **numbers: float | Array
) -> Array:
    """[n] the divergence of what lies on ``support`` [n, V]: with the rest of the probability as one more token
    (``tail``), or renormalized.

    The log of the kept probability is at most ``-1e-7``. A support that holds every token has no tail."""
    kept = [nn.logsumexp(jnp.where(support, promote(x), -jnp.inf), -1) for x in (log_p, log_q)]
    inside = [jnp.where(support, promote(x), -jnp.inf) for x in (log_p, log_q)]
    if not tail:
        return full(*[x - z[:, None] for x, z in zip(inside, kept, strict=True)], divergence, **numbers)
    rest = [jnp.log(-jnp.expm1(jnp.minimum(z, LARGEST_KEPT))) for z in kept]
    outside = each(*rest, divergence, **numbers)
    return full(*inside, divergence, **numbers) + jnp.where(support.all(-1), 0.0, outside)
