"""Rows of NumPy batches: stack them, replace them, complete them a batch at a time."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxpo.batch import Rollouts, take
from jaxpo.parallel.distributed import to_host
from jaxpo.policy.stats import hidden_field


def with_rows(table: np.ndarray, at: np.ndarray | int, rows: np.ndarray | int) -> np.ndarray:
    """A copy of the table whose rows at ``at`` are replaced."""
    out = table.copy()
    out[at] = rows
    return out


def stacked(parts: Sequence[Rollouts]) -> Rollouts:
    """Stack the rows of NumPy batches of one structure and any sizes. On the host, where no shape is compiled."""
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def side_by_side(parts: Sequence[Rollouts], sizes: Sequence[int], key: Array) -> Rollouts:
    """The rows of NumPy batches of the same prompts, each prompt's rows one after the other: ``sizes[0]`` of the first
    batch, ``sizes[1]`` of the second, and so on. A prompt is a group, and rows get new seeds."""
    starts = np.cumsum([0, *(part.rows for part in parts)])
    places = [start + np.arange(part.rows).reshape(-1, n) for start, part, n in zip(starts, parts, sizes, strict=False)]
    order = np.concatenate(places, 1)
    whole = stacked([part.replace(shared_prompt=1) for part in parts])
    out = take(whole, order.reshape(-1), shared_prompt=sum(sizes))
    return out.replace(
        group=np.repeat(np.arange(len(order), dtype=np.int32), sum(sizes)),
        seed=np.asarray(jax.random.bits(key, (out.rows,))),
        count=np.ones(out.rows, np.float32),
    )


def widened(batch: Rollouts, more: int) -> Rollouts:
    """The NumPy batch with ``more`` columns of padding before the prompts."""
    return batch.replace(tokens=np.pad(batch.tokens, ((0, 0), (more, 0))))


def in_batches(
    complete: Callable[..., Rollouts],
    size: int,
    responses: int,
    tokens: np.ndarray,
    length: np.ndarray,
    budget: np.ndarray,
) -> Rollouts:
    """Complete n rows, ``responses`` times each, by calls of ``complete(i, tokens, length, budget)`` on ``size`` rows.
    The last batch is filled up with rows of budget 0, which are cut off again."""
    parts = []
    for i, start in enumerate(range(0, len(tokens), size)):
        kept = min(size, len(tokens) - start)
        rows = start + np.minimum(np.arange(size), kept - 1)
        left = np.where(np.arange(size) < kept, budget[rows], 0).astype(np.int32)
        out = to_host(complete(i, tokens[rows], length[rows], left))
        parts.append(take(out, np.arange(kept * responses), shared_prompt=responses))
    return stacked(parts)


def labelled(out: Rollouts, indices: np.ndarray, seeds: Any) -> Rollouts:
    """Add the fields that the loop knows to generated rows: the prompts' ``indices`` [n], seeds [n K], role, count."""
    return out.replace(
        prompt=np.repeat(indices, out.shared_prompt).astype(np.int32),
        seed=seeds,
        role=np.zeros(out.rows, np.int32),
        count=np.ones(out.rows, np.float32),
    )


def in_a_column(reward: Any, needs: Collection[str]) -> dict[str, Any]:
    """The rewards [B] as the only one of several, [B, 1] with weight 1, for an objective that needs ``rewards_multi``;
    {} for others."""
    if "rewards_multi" not in needs:
        return {}
    return dict(rewards_multi=reward[:, None], reward_weights=reward[:, None] * 0 + 1)


def as_scored(batch: Rollouts) -> Rollouts:
    """Only the fields that a policy reads, so that every scoring pass is the same compiled function. The policy reads
    hidden states of another model where it is compared with it."""
    return Rollouts(
        tokens=batch.tokens,
        mask=batch.mask,
        prompt_length=batch.prompt_length,
        per_token={name: x for name, x in batch.per_token.items() if name.startswith(hidden_field(""))},
        shared_prompt=batch.shared_prompt,
    )
