"""Reward shaping and filters: [B] in, [B] out, no gradient."""

import jax.numpy as jnp
from jax import Array

from jaxpo.primitives.aggregation import positive
from jaxpo.primitives.grouping import group_constant, group_size
from jaxpo.primitives.numerics import promote


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
