"""Preference losses: links of a margin, targets of a log-ratio, odds and truth tables, games, preference scores.

Arrays are [N], one number for each pair, or [B], one for each answer. Log-probs are sums over an answer's tokens unless
a name says otherwise. ``z`` is a margin, positive if the chosen answer is ahead. Nothing is averaged here."""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxpo.primitives.numerics import clamp, promote, ratio_or_zero

# ---- links: margin -> loss ----------------------------------------------------------------------------------------


def logistic(z: Array, eps: Array | float = 0.0) -> Array:
    """``-(1 - eps) log sig(z) - eps log sig(-z)``: the cross-entropy for a label that is wrong with probability
    ``eps``, or for a soft label ``1 - eps``."""
    return -(1 - eps) * jax.nn.log_sigmoid(z) - eps * jax.nn.log_sigmoid(-z)


def soft_logistic(z: Array, gap: Array) -> Array:
    """``-t log sig(z) - (1 - t) log sig(-z)`` with the target ``t = sig(gap)``; the minimum is at ``z = gap``."""
    return logistic(z, jax.nn.sigmoid(-gap))


def denoised_logistic(z: Array, eps: Array | float) -> Array:
    """``(-(1 - eps) log sig(z) + eps log sig(-z)) / (1 - 2 eps)``: an unbiased estimate of the clean logistic loss
    from labels flipped with probability ``eps`` < 1/2; unbounded below (rDPO, arXiv:2403.00409)."""
    return (-(1 - eps) * jax.nn.log_sigmoid(z) + eps * jax.nn.log_sigmoid(-z)) / (1 - 2 * eps)


def hinge(z: Array, delta: Array | float = 1.0) -> Array:
    """``max(0, delta - z)``, without gradient at the kink."""
    return jnp.where(z < delta, delta - z, 0)


def squared(z: Array, target: Array | float) -> Array:
    """``(z - target)^2``."""
    return jnp.square(z - target)


def soft_squared(h: Array, p: Array, tau: Array | float) -> Array:
    """``p (h - 1/(2 tau))^2 + (1 - p) (-h - 1/(2 tau))^2``: IPO averaged over both orders of a soft label ``p``."""
    return p * squared(h, 1 / (2 * tau)) + (1 - p) * squared(-h, 1 / (2 * tau))


def soft_expanded(h: Array, h0: Array, p: Array, tau: Array | float) -> Array:
    """``p (-h0 + tau h^2) + (1 - p) (h0 + tau h^2)`` (online IPO, arXiv:2403.08635). Its gradient is tau times that of
    `soft_squared`; ``h0`` is the margin without the reference."""
    return (1 - 2 * p) * h0 + tau * jnp.square(h)


def kahneman_tversky(
    drift: Array, anchor: Array, label: Array, *, beta: Array | float, lam_D: Array | float, lam_U: Array | float
) -> Array:  # noqa: N803 (the card's names)
    """``lam_D (1 - sig(beta (D - z0)))`` for a desirable answer, ``lam_U (1 - sig(beta (z0 - D)))`` for an undesirable
    one [B], with ``D = drift`` and ``z0 = anchor`` (KTO, arXiv:2402.01306)."""
    z = beta * (drift - anchor)
    return jnp.where(label > 0, lam_D * jax.nn.sigmoid(-z), lam_U * jax.nn.sigmoid(z))


# ---- probabilities of answers -------------------------------------------------------------------------------------

HIGHEST = -1e-9  # a log-prob is kept below this before log(1 - p) is taken


def log1mexp(a: Array) -> Array:
    """``log(1 - exp(a))`` for ``a < 0``, by the form that is accurate on each side of -log 2."""
    near = a > -math.log(2)
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, a, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, a))))


def log_odds(a: Array) -> Array:
    """``a - log(1 - exp(a))`` of a log-probability ``a``, clamped to at most -1e-9 (ORPO, arXiv:2403.07691)."""
    a = clamp(promote(a), high=HIGHEST)
    return a - log1mexp(a)


WORLDS = ("TT", "TF", "FT", "FF")  # validity of (chosen, rejected)
PROGRAMS = {
    "ce": "TT TF / FT FF",
    "ceunl": "TF / TT FT FF",
    "cpo": "TT TF / TT FT",
    "orpo": "TF / FT",
    "uncpo": "TT TF FF / FT",
    "ccpo": "TT TF / FT",
    "cfunl": "TF FF / FT",
    "qfunl": "TF FF / FT FF",
    "funl": "TF FF / TT FT",
    "l5": "TT TF FF / TT FT FF",
}


def worlds_of(program: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(top, bottom) sets of worlds of a program: a name of ``PROGRAMS``, or two sets such as ``"TF FF / FT"``.

    Raises:
      ValueError: an unknown name or world, or an empty set."""
    sets = [tuple(side.split()) for side in PROGRAMS.get(program, program).split("/")]
    if len(sets) != 2 or not all(sets) or not set(sets[0] + sets[1]) <= set(WORLDS):
        known = ", ".join(PROGRAMS)
        raise ValueError(
            f"unknown program {program!r}: write sets of worlds, 'TT TF / FT', or one of these; known: {known}"
        )
    return sets[0], sets[1]


def log_model_count_ratio(a_w: Array, a_l: Array, program: str) -> Array:
    """``rho = log(sum_top / sum_bottom)`` over the weights of a program's worlds (arXiv:2412.17696). The weight of a
    world is the product of ``p`` (T) or ``1 - p`` (F) of both answers. Log-probs are clamped to at most -1e-9."""
    a_w, a_l = (clamp(promote(a), high=HIGHEST) for a in (a_w, a_l))
    w, l = ({"T": a, "F": log1mexp(a)} for a in (a_w, a_l))  # noqa: E741
    top, bottom = ([w[world[0]] + l[world[1]] for world in side] for side in worlds_of(program))
    return jax.nn.logsumexp(jnp.stack(top), 0) - jax.nn.logsumexp(jnp.stack(bottom), 0)


# ---- several samples of a prompt ----------------------------------------------------------------------------------


def leave_one_out_mean(x: Array) -> Array:
    """[N, K] mean of the other entries of the row; 0 if there are none."""
    k = x.shape[-1]
    return ratio_or_zero(x.sum(-1, keepdims=True) - x, jnp.asarray(k - 1, promote(x).dtype))


def contrastive_share(
    drift: Array, reward: Array, mean_drift: Array, mean_reward: Array, k: Array, beta: Array | float
) -> Array:
    """[B] k times a sample's share of its prompt's sum over pairs, ``(1/(k-1)) sum_{i<j} ((beta/2) (d_i - d_j)^2 -
    (r_i - r_j)(d_i - d_j))``, so that the mean over the k samples is that sum; 0 for k = 1 (CoPG, arXiv:2406.19185).

    The sum over pairs is a sum over deviations from the mean. The gradient through the mean cancels, so the mean is
    held constant."""
    d = drift - lax.stop_gradient(mean_drift)
    return ratio_or_zero(jnp.square(k), k - 1) * (beta / 2 * jnp.square(d) - (reward - mean_reward) * d)


# ---- preference models --------------------------------------------------------------------------------------------


def unit_length(v: Array, eps: float = 1e-12) -> Array:
    """``v / ||v||`` along the last axis, finite at 0."""
    return v * lax.rsqrt(jnp.maximum(jnp.square(v).sum(-1, keepdims=True), eps))


def skew_score(v: Array, u: Array, scale: Array) -> Array:
    """[N] score of ``v`` over ``u`` [N, 2k]: ``sum_l scale_l (v_{2l} u_{2l+1} - v_{2l+1} u_{2l})``, antisymmetric
    (general preference model, arXiv:2410.02197)."""
    return jnp.sum(scale * (v[..., ::2] * u[..., 1::2] - v[..., 1::2] * u[..., ::2]), -1)


def binary_cross_entropy(logit: Array, label: Array) -> Array:
    """``-label log sig(logit) - (1 - label) log sig(-logit)``."""
    return logistic(logit, 1 - label)


def categorical_kl(target: Array, logits: Array) -> Array:
    """[N] ``KL(target || softmax(logits))`` of probabilities ``target`` [N, M]."""
    entropy = jnp.sum(jnp.where(target > 0, target * jnp.log(jnp.where(target > 0, target, 1)), 0), -1)
    return entropy - jnp.sum(target * jax.nn.log_softmax(logits), -1)


# ---- iterates and mixtures ----------------------------------------------------------------------------------------


def geometric_mixture(logits: Array, logits_ref: Array, beta: Array | float) -> Array:
    """[..., V] log-probs of ``pi^(1-beta) ref^beta``, normalized token by token (Nash-MD, arXiv:2312.00886)."""
    mixed = (1 - beta) * jax.nn.log_softmax(logits) + beta * jax.nn.log_softmax(logits_ref)
    return jax.nn.log_softmax(mixed)


def blend(new: object, old: object, b: Array | float) -> object:
    """``(1 - b) new + b old`` for every leaf: an average of weights (SALSA's soup), or a running average (Nash-EMA)."""
    return jax.tree.map(lambda x, y: (1 - b) * x + b * y, new, old)


def extrapolate(new: object, prev: object, alpha: Array | float) -> object:
    """``new + alpha (new - prev)`` for every leaf of weights or logits: Nesterov's step between iterations
    (arXiv:2410.06293; reconstructed from the paper's text, constants assumed)."""
    return jax.tree.map(lambda x, y: x + alpha * (x - y), new, prev)
