"""Guidance: how much of a solution a prompt shows, how hinted answers are weighed, and which answers are repaired."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxpo.primitives.advantages import Singleton, group_normalized
from jaxpo.primitives.grouping import group_mean, group_size, group_sum
from jaxpo.primitives.numerics import promote, ratio_or_zero


def hint_length(length: Array, ratio: Array | float) -> np.ndarray:
    """``round(ratio * length)`` [n] characters or tokens of solutions of ``length`` [n]; halves go to the even number
    (GHPO, arXiv:2507.10628; ADHint, arXiv:2512.13095)."""
    return np.round(np.asarray(ratio, np.float64) * np.asarray(length)).astype(np.int32)


def first_solvable_stage(accuracy: Array, group: Array, count: Array) -> Array:
    """[B] the first stage that is not too hard for the row's prompt, else the last one (GHPO, arXiv:2507.10628).

    A stage is too hard for a prompt if all its answers have an accuracy of at most 0.

    Args:
      accuracy: [B, S] accuracy reward of each row in each stage.
    """
    solved = jnp.stack([group_sum((promote(x) > 0) * count, group) > 0 for x in jnp.asarray(accuracy).T], 1)
    return jnp.where(solved.any(1), jnp.argmax(solved, 1), solved.shape[1] - 1)


def hint_ratio(
    reward: Array,
    group: Array,
    hinted: Array,
    count: Array,
    *,
    w_min: float = 0.1,
    w_max: float = 0.9,
    noise: Array | float = 0.0,
) -> Array:
    """[B] share of the demonstration that the prompt's hinted rows begin with: ``clip((w_max - w_min) (1 - m) + w_min +
    noise, 0, 1)``, m the mean reward of its rows without a hint (ADHint, arXiv:2512.13095; reconstructed from a
    secondary text).

    Args:
      reward: [B] in [0, 1].
      hinted: [B] whether the row began with a hint. A prompt whose rows all did gets ``w_max``.
      noise: a number, or one for each row that is the same in all rows of a prompt.
    """
    naive = count * ~jnp.asarray(hinted, bool)
    difficulty = jnp.where(group_size(group, naive) > 0, 1 - group_mean(reward, group, naive), 1.0)
    return jnp.clip((w_max - w_min) * difficulty + w_min + noise, 0, 1)


def hinted_advantage(
    reward: Array, group: Array, hinted: Array, count: Array, *, adv_eps: float = 1e-6, singleton: Singleton = "zero"
) -> Array:
    """[B] GRPO's advantage over rows with and without a hint, times ``1 + gap`` where it is positive without a hint or
    negative with one (ADHint, arXiv:2512.13095; the form is assumed).

    ``gap = max(0, mean reward with a hint - mean reward without)`` of the prompt; 0 if it has rows of one kind only.
    """
    hinted = jnp.asarray(hinted, bool)
    adv = group_normalized(reward, group, count, adv_eps=adv_eps, singleton=singleton)
    kinds = count * hinted, count * ~hinted
    both = (group_size(group, kinds[0]) > 0) & (group_size(group, kinds[1]) > 0)
    gap = group_mean(reward, group, kinds[0]) - group_mean(reward, group, kinds[1])
    gap = jnp.where(both, jnp.maximum(gap, 0), 0)
    stronger = jnp.where(hinted, adv < 0, adv > 0)
    return lax.stop_gradient(jnp.where(stronger, adv * (1 + gap), adv))


def hint_weight(adv: Array, hint_mask: Array, entropy: Array, mask: Array) -> Array:
    """[B, T] weight of each token: 1 off the hint; on the hint 0 in rows of negative advantage, else ``min(h, m) /
    max(h, m)``, h the token's entropy and m the mean entropy of the row's other tokens; 1 if both are 0 (ADHint,
    arXiv:2512.13095; the form is assumed).

    Args:
      adv: [B].
      hint_mask, entropy, mask: [B, T]; ``mask`` is 1 on the hint, too.
    """
    on, h = promote(mask) > 0, promote(entropy)
    hint = on & (jnp.asarray(hint_mask) > 0)
    rest = promote(on & ~hint)
    m = ratio_or_zero(jnp.where(rest > 0, h, 0).sum(-1), rest.sum(-1))[:, None]
    alike = jnp.where(jnp.maximum(h, m) > 0, ratio_or_zero(jnp.minimum(h, m), jnp.maximum(h, m)), 1.0)
    return lax.stop_gradient(jnp.where(hint, jnp.where(adv[:, None] < 0, 0.0, alike), 1.0))


def first_error(score: Array, steps: Array, *, threshold: float = 0.5) -> np.ndarray:
    """[n] the first step whose score is below the threshold; ``steps`` [n] of rows in which none is (SCOPE,
    arXiv:2602.24110; the threshold is assumed).

    Args:
      score: [n, S] of each step. steps: [n] number of steps; what lies behind is not read.
    """
    within = np.arange(np.shape(score)[1]) < np.asarray(steps)[:, None]
    wrong = within & (np.asarray(score) < threshold)
    return np.where(wrong.any(1), wrong.argmax(1), steps).astype(np.int32)


def pick_refinement(score: Array, there: Array | None = None) -> np.ndarray:
    """[G] the first refinement whose score is exactly 1, else the first of the highest score (Critique-GRPO,
    arXiv:2506.03106).

    Args:
      score: [G, K]. there: [G, K] which refinements exist; None = all. -1 where a prompt has none.
    """
    score = np.asarray(score, np.float64)
    there = np.ones(score.shape, bool) if there is None else np.asarray(there, bool)
    right = there & (score == 1)
    best = np.where(there, score, -np.inf).argmax(1)
    return np.where(there.any(1), np.where(right.any(1), right.argmax(1), best), -1).astype(np.int32)
