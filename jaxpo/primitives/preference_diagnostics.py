"""Diagnostics of preference training: how well pairs are ranked, and where a loss moves probability."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxpo.primitives.numerics import promote, ratio_or_zero


def ranking_accuracy(logp_w: Array, logp_l: Array) -> Array:
    """[N] ``1{logp_w > logp_l}`` of sums over the answer, or of means for the length-normalized form
    (arXiv:2405.19534)."""
    return promote(logp_w > logp_l)


def reward_accuracy(log_ratio_w: Array, log_ratio_l: Array) -> Array:
    """[N] ``1{D_w > D_l}``: the policy classifies the pair right."""
    return promote(log_ratio_w > log_ratio_l)


def idealized_accuracy(ref_w: Array, ref_l: Array, pref_prob: Array, beta: Array | float) -> Array:
    """[N] ``1{ref_w - ref_l + logit(pref_prob)/beta > 0}``: the optimum of DPO would rank the pair right.

    Args:
      pref_prob: [N] share of annotators who prefer w (0.75 if there are only labels), kept in [1e-9, 1 - 1e-9]."""
    p = jnp.clip(promote(pref_prob), 1e-9, 1 - 1e-9)
    return promote(ref_w - ref_l + (jnp.log(p) - jnp.log1p(-p)) / beta > 0)


def difficulty(ref_w: Array, ref_l: Array) -> Array:
    """[N] ``c = ref_l - ref_w``: by how much the reference prefers the wrong answer."""
    return promote(ref_l) - promote(ref_w)


def loss_to_rank_right(ref_w: Array, ref_l: Array, beta: Array | float) -> Array:
    """[N] ``-log sig(beta c)``: a pair is ranked right iff its DPO loss is below this."""
    return -jax.nn.log_sigmoid(beta * difficulty(ref_w, ref_l))


def forward_kl_gradient(logits: Array, target_logits: Array) -> Array:
    """[..., V] gradient of ``KL(q || p)`` in the logits of p: ``p - q``, which covers modes (SFT, best-of-N)."""
    return jax.nn.softmax(logits) - jax.nn.softmax(target_logits)


def reverse_kl_gradient(logits: Array, target_logits: Array) -> Array:
    """[..., V] gradient of ``KL(p || q)`` in the logits of p: ``p (c - E_p c)``, ``c = log p/q``, which seeks modes
    (on-policy RL, and losses with a negative gradient)."""
    p, c = jax.nn.softmax(logits), jax.nn.log_softmax(logits) - jax.nn.log_softmax(target_logits)
    return p * (c - jnp.sum(p * c, -1, keepdims=True))


# ---- calibration: how well stated probabilities match the outcomes ------------------------------------------------


def confident(p: Array, outcome: Array) -> tuple[Array, Array]:
    """(confidence, right), [N] each: ``max(p, 1 - p)``, and the probability that the preferred side is right; 1/2 where
    p is 1/2.

    Args:
      p: [N] stated probabilities that the first answer wins.
      outcome: [N] share of judges who say that it wins, in [0, 1] (1 for a label)."""
    p, outcome = promote(p), promote(outcome)
    right = jnp.where(p > 0.5, outcome, 1 - outcome)
    return jnp.maximum(p, 1 - p), jnp.where(p == 0.5, 0.5, right)


def reliability(confidence: Array, right: Array, bins: int = 10, low: float = 0.5) -> tuple[Array, Array, Array]:
    """Mean confidence, accuracy and share of pairs, [bins] each, in equal bins of confidence [N] from ``low`` to 1; 0
    in empty bins."""
    place = jnp.clip(jnp.floor((confidence - low) / (1 - low) * bins), 0, bins - 1)
    of_bin = promote(place[:, None] == jnp.arange(bins))
    count = of_bin.sum(0)
    means = [ratio_or_zero((x[:, None] * of_bin).sum(0), count) for x in (confidence, right)]
    return *means, count / max(len(place), 1)


def expected_calibration_error(confidence: Array, right: Array, bins: int = 10, low: float = 0.5) -> Array:
    """``sum_bins share |accuracy - mean confidence|`` (Guo et al., arXiv:1706.04599)."""
    stated, accuracy, share = reliability(confidence, right, bins, low)
    return jnp.sum(share * jnp.abs(accuracy - stated))
