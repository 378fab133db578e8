"""Rows of NumPy batches: put together, replaced, and completed a batch at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxpo.batch import Rollouts, take
from jaxpo.parallel.distributed import to_host
from jaxpo.policy.stats import hidden_field


def with_rows(table: np.ndarray, at: np.ndarray | int, rows: np.ndarray | int) -> np.ndarray:
    """A copy of the table with other rows at ``at``."""
    out = table.copy()
    out[at] = rows
    return out


def stacked(parts: Sequence[Rollouts]) -> Rollouts:
    """The rows of NumPy batches of one structure, however many each has: on the host, where no shape is compiled."""
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def in_batches(
    complete: Callable[..., Rollouts],
    size: int,
    responses: int,
    tokens: np.ndarray,
    length: np.ndarray,
    budget: np.ndarray,
) -> Rollouts:
    """``responses`` completions of each of n rows, by ``complete(i, tokens, length, budget)`` of ``size`` rows at a
    time: the last batch is filled up with rows of budget 0, and cut."""
    parts = []
    for i, start in enumerate(range(0, len(tokens), size)):
        kept = min(size, len(tokens) - start)
        rows = start + np.minimum(np.arange(size), kept - 1)
        left = np.where(np.arange(size) < kept, budget[rows], 0).astype(np.int32)
        out = to_host(complete(i, tokens[rows], length[rows], left))
        parts.append(take(out, np.arange(kept * responses), shared_prompt=responses))
    return stacked(parts)


def labelled(out: Rollouts, indices: np.ndarray, seeds: Any) -> Rollouts:
    """Generated rows with what the loop knows of them: the prompts' ``indices`` [n] and a seed each [n K]."""
    return out.replace(
        prompt=np.repeat(indices, out.shared_prompt).astype(np.int32),
        seed=seeds,
        role=np.zeros(out.rows, np.int32),
        count=np.ones(out.rows, np.float32),
    )


def as_scored(batch: Rollouts) -> Rollouts:
    """What a policy reads of a batch, and nothing else: every scoring pass is one compiled function. Hidden states of
    another model are read where the policy is compared with it."""
    return Rollouts(
        tokens=batch.tokens,
        mask=batch.mask,
        prompt_length=batch.prompt_length,
        per_token={name: x for name, x in batch.per_token.items() if name.startswith(hidden_field(""))},
        shared_prompt=batch.shared_prompt,
    )
