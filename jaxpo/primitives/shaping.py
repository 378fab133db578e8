"""Reward shaping and filters. They return [B] without gradient."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxpo.arguments import positive
from jaxpo.primitives.grouping import group_constant, group_size, weighted_std
from jaxpo.primitives.numerics import promote, ratio_or_zero


def less_drift(reward: Array, logp_old: Array, logp_ref: Array, mask: Array, *, coef: float | Array) -> Array:
    """``reward - coef sum_t (logp_old - logp_ref)`` [B]: subtract a KL penalty (the k1 estimate) from the reward (RLOO,
    arXiv:2402.14740)."""
    drift = jnp.where(mask > 0, promote(logp_old) - promote(logp_ref), 0)
    return reward - coef * drift.sum(-1)


def overlong_penalty(length: Array, *, max_len: int, buffer: int, penalty: float = 1.0) -> Array:
    """Soft penalty of long answers (DAPO, arXiv:2503.14476, eq. 13) [B].

    0 up to ``max_len - buffer`` tokens, then a line down to ``-penalty`` at ``max_len``, and ``-penalty`` beyond.
    """
    positive("buffer", buffer)
    start = positive("max_len", max_len) - buffer
    if start < 0:
        raise ValueError(f"buffer {buffer} is longer than max_len {max_len}")
    return penalty * jnp.clip((start - promote(length)) / buffer, -1, 0)


def mixed_groups(outcome: Array, group: Array, count: Array) -> Array:
    """[B] bool: the row's group has more than one outcome, or is a single row (DAPO dynamic sampling keeps these)."""
    return ~group_constant(outcome, group, count) | (group_size(group, count) == 1)


def standardized(x: Array, count: Array) -> Array:
    """[B, M] columns of mean 0 and standard deviation 1 (ddof 0) over the counted rows; 0 in a constant column."""

    def column(x: Array) -> Array:
        n = promote(count).sum()
        mean = ratio_or_zero(jnp.sum(jnp.where(count > 0, x, 0) * count), n)
        return ratio_or_zero(x - mean, weighted_std(x, count, 0))

    return jax.vmap(column, 1, 1)(promote(x))


def relevance(
    rel_query: Array, rel_answer: Array, open_ended: Array, num_words: Array, num_tri: Array, uniq_tri: Array
) -> Array:
    """[B] regularized relevance reward (R^3, arXiv:2402.03469): ``rel_query words/100 rep`` for an open-ended question,
    ``rel_answer rep`` for another. ``rep`` is the share of distinct trigrams, 1 if there are no trigrams."""
    repetition = jnp.where(num_tri > 0, ratio_or_zero(promote(uniq_tri), promote(num_tri)), 1)
    return jnp.where(open_ended > 0, rel_query * num_words / 100, rel_answer) * repetition


def followup_likelihood(pos_ll: Array, neg_ll: Array) -> Array:
    """[B] ``mean_c (pos_ll - neg_ll)`` over sub-categories [B, C] of a user's likely next words (FLR,
    arXiv:2409.13948; the aggregation is assumed)."""
    return (promote(pos_ll) - promote(neg_ll)).mean(-1)
