"""Variants: the changed examples that contracts compare. Variants of one shape are evaluated in one pass.

They are made in NumPy, which compiles nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpo.batch import Rollouts, TokenStats, concatenate, pad, take
from jaxpo.objectives import Objective
from jaxpo.objectives.grammar.checks import numbers_of
from jaxpo.testing.examples import allowed, bigram

Given = tuple[TokenStats, Rollouts, Any]  # arguments of `direct`: statistics, batch, state of the objective
TOKEN_FIELDS = ("logp_old", "logp_beh", "entropy_old", "value_old", "per_token")
EXTRA_ROWS = 12  # rows to add: filler, or rows of count 0


class Example(Protocol):
    """The parts of `jaxpo.testing.cases.Case` that variants are made from; see its docstrings."""

    @property
    def objective(self) -> Objective: ...

    @property
    def params(self) -> Mapping[str, Array]: ...
    @property
    def arrays(self) -> tuple[TokenStats, Rollouts]: ...
    @property
    def stepped(self) -> tuple[Any, Any]: ...
    @property
    def unit(self) -> int: ...
    @property
    def units(self) -> int: ...
    def rows(self, units: Any) -> np.ndarray: ...


def variants(case: Example) -> dict[str, Given]:
    """Every variant that has the example's shape, by name."""
    stats, batch = case.arrays
    begin = jax.tree.map(np.asarray, case.objective.init())
    found = {"as it is": (stats, batch)}
    found |= {f"hostile: {what}": given for what, *given in hostile(case)}
    found["permuted"] = chosen(stats, batch, permutation(case))
    found |= dict(zip(("count 2", "written twice"), doubled(case), strict=True))
    found |= {what: (stats, batch) for what, _, batch in bad_numbers(case)}
    left_out = replaced(batch, "count", batch.count * ~np.isin(np.arange(batch.rows), case.rows([1])))
    found |= {"left out": (stats, left_out), "left out, with NaN": (stats, with_nan(case, left_out))}
    found["rounded"] = as_dtype(bfloat16(case.arrays), np.float32)
    found["replica"] = replica(case)
    given = {what: (stats, batch.replace(shared_prompt=1), begin) for what, (stats, batch) in found.items()}
    later = jax.tree.map(np.asarray, case.stepped[1])
    times = {"": begin} | ({"later": later} if same_form(begin, later) else {})
    for when, state in times.items():
        given[when or "as it is"] = (stats, batch.replace(shared_prompt=1), state)
        for name in case.objective.asks.needs:
            less = replaced(batch, name, np.zeros_like(batch.get(name))).replace(shared_prompt=1)
            given[f"{when} without {name}".strip()] = (stats, less, state)
    return given


def grown_variants(case: Example) -> dict[str, Given]:
    """The example in a larger shape: with filler rows, and with rows of count 0 that hold values."""
    stats, batch = case.arrays
    more = max(2 * case.unit, EXTRA_ROWS - EXTRA_ROWS % case.unit)
    rows = case.rows([0, 1])  # they have tokens, and their rewards differ from their groups'
    ghosts = take(batch, rows)
    reward = None if ghosts.reward is None else 3 * ghosts.reward + 1
    ghosts = ghosts.replace(count=np.zeros(rows.size, np.float32), reward=reward)
    padded, haunted = grow(batch, batch.rows + more), grow(concatenate([batch, ghosts]), batch.rows + more)
    found = {
        "padded": (pad_stats(stats, padded, np.nan), padded),
        "count 0": (pad_stats(stats, haunted, -1.0), haunted),
    }
    begin = case.objective.init()
    given = {what: (stats, batch.replace(shared_prompt=1), begin) for what, (stats, batch) in found.items()}
    return jax.tree.map(np.asarray, given)


def hostile(case: Example) -> Iterator[tuple[str, TokenStats, Rollouts]]:
    """Yield the extreme inputs that an objective must survive, by name."""
    stats, batch = case.arrays
    ones, index = np.ones(batch.rows, np.float32), np.arange(batch.rows)
    by_turns = np.where((index[:, None] + np.arange(batch.width)) % 2 == 0, 40.0, -40.0)
    for what, shift in (("+40", 40.0), ("-40", -40.0), ("±40 by turns", by_turns)):
        yield f"log-ratios {what}", stats.replace(logp=np.asarray(stats.logp + shift, stats.logp.dtype)), batch
    group_number = np.unique(batch.group, return_inverse=True)[1].reshape(-1).astype(np.float32)
    no_tokens, first_token, unit_empty = np.zeros_like(batch.mask), np.zeros_like(batch.mask), batch.mask.copy()
    first_token[:, 0], unit_empty[: case.unit] = 1, 0
    changes = {
        "no token in a unit": {"mask": unit_empty},
        "no token at all": {"mask": no_tokens},
        "one token a row": {"mask": first_token},
        "no row counts": {"count": 0 * ones},
        "groups of one unit": {"group": index // case.unit},
        "one group": {"group": 0 * index},
        "groups without variance": {"reward": allowed(case.objective, group_number)},
        "equal rewards": {"reward": allowed(case.objective, ones / 3)},
        "all correct": {"correct": ones},
        "none correct": {"correct": 0 * ones},
        "all truncated": {"truncated": ones},
    }
    for what, fields in changes.items():
        if all(getattr(batch, name) is not None for name in fields):
            new = {name: np.asarray(x, getattr(batch, name).dtype) for name, x in fields.items()}
            yield what, stats, batch.replace(**new)
    for value in (np.nan, np.inf, -np.inf):
        yield f"{value} of the policy at masked positions", where_masked(stats, batch.mask, value), batch
        fields = {name: where_masked(getattr(batch, name), batch.mask, value) for name in TOKEN_FIELDS}
        yield f"{value} of the batch at masked positions", stats, batch.replace(**fields)


def bad_numbers(case: Example) -> Iterator[tuple[str, int, Rollouts]]:
    """Yield the example with one number of a row that is not finite: what it is, the row, and the batch."""
    batch, row = case.arrays[1], case.unit  # the first row of the second unit
    for name, x in numbers_of(batch, case.objective.asks.needs):
        for value in (np.nan, np.inf, -np.inf):
            bad = x.copy()
            bad[row] = value
            yield f"{name} {value}", row, replaced(batch, name, bad)


def with_nan(case: Example, batch: Rollouts) -> Rollouts:
    """The batch with NaN for every number of the rows of the second unit."""
    for name, x in numbers_of(batch, case.objective.asks.needs):
        bad = x.copy()
        bad[case.rows([1])] = np.nan
        batch = replaced(batch, name, bad)
    return batch


def permutation(case: Example) -> np.ndarray:
    """A random order of the rows that keeps units whole but not groups."""
    return case.rows(np.random.default_rng(2).permutation(case.units))


def doubled(case: Example) -> tuple[tuple[TokenStats, Rollouts], tuple[TokenStats, Rollouts]]:
    """The first unit twice and the second not at all: once by ``count``, once written out."""
    (stats, batch), r = case.arrays, case.unit
    count = batch.count.copy()
    count[:r], count[r : 2 * r] = 2, 0
    rows = case.rows([0, 0, *range(2, case.units)])
    return (stats, batch.replace(count=count)), chosen(stats, batch, rows)


def replica(case: Example) -> tuple[TokenStats, Rollouts]:
    """Another batch, and its statistics under the policy with other parameters."""
    batch = take(case.arrays[1], case.rows(np.roll(np.arange(case.units), 1)))
    if batch.reward is not None:
        batch = batch.replace(reward=batch.reward * np.float32(0.5 if case.objective.asks.rewards else 2))
    params = jax.tree.map(lambda x: 1.1 * x, case.params)
    stats = bigram(
        case.objective, case.objective.asks.wants | case.objective.asks.peeks, params, jax.tree.map(jnp.asarray, batch)
    )
    return jax.tree.map(np.asarray, stats), batch


def chosen(stats: TokenStats, batch: Rollouts, rows: np.ndarray) -> tuple[TokenStats, Rollouts]:
    """The given rows of statistics and batch."""
    return jax.tree.map(lambda x: x[rows], stats), take(batch, rows)


# ---- how they are made ----------------------------------------------------------------------------------------------


def is_float(x: Array) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def as_dtype(tree: Any, dtype: Any) -> Any:
    """Every float array in another dtype."""
    return jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, tree)


def bfloat16(tree: Any) -> Any:
    return as_dtype(tree, jnp.bfloat16)


def form(state: Any) -> Any:
    """The form of a state, which a compiled program fixes: structure, shapes and dtypes."""
    return jax.tree.structure(state), [(np.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(state)]


def same_form(a: Any, b: Any) -> bool:
    return form(a) == form(b)


def replaced(batch: Rollouts, name: str, value: Array | None) -> Rollouts:
    """The batch with ``value`` in the field of this name; None removes the field."""
    for group, key in (("per_row", name), ("per_token", name)):
        held = dict(getattr(batch, group))
        if key in held and name not in Rollouts.__dataclass_fields__:
            held.pop(key) if value is None else held.update({key: value})
            return batch.replace(**{group: held})
    return batch.replace(**{name: value})


def grow(batch: Rollouts, rows: int) -> Rollouts:
    """Pad to ``rows`` rows, and P and T by fixed amounts, so that all objectives share a shape."""
    return pad(batch, rows=rows, width=batch.width + 3, prompt_width=batch.prompt_width + 2)


def pad_stats(stats: TokenStats, batch: Rollouts, value: float) -> TokenStats:
    """Pad statistics to the shape of a grown batch, with ``value`` on all added entries."""
    b, t = stats.logp.shape

    def grow(x: np.ndarray) -> np.ndarray:
        widths = [(0, batch.rows - b), *[(0, 0)] * (x.ndim - 1)]
        if x.shape[:2] == (b, t):
            widths[1] = (0, batch.width - t)
        return np.pad(x, widths, constant_values=value)

    return jax.tree.map(grow, stats)


def where_masked(tree: Any, mask: np.ndarray, value: float) -> Any:
    """Put ``value`` at the masked positions of every [B, T, ...] float array."""

    def fill(x: np.ndarray) -> np.ndarray:
        if not is_float(x) or x.shape[:2] != mask.shape:
            return x
        return np.where((mask > 0).reshape(*mask.shape, *[1] * (x.ndim - 2)), x, np.asarray(value, x.dtype))

    return jax.tree.map(fill, tree)


def stacked(trees: Sequence[Any]) -> Any:
    """Stack trees of one form along a new first axis."""
    return jax.tree.map(lambda *x: np.stack(x), *trees)
