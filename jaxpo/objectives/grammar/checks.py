"""Checks of the numbers of rows: rewards, and what data, judges and protocols say of an answer.

A number of a counted row must be finite. Where it can be read, an error names the row; where it cannot (a compiled
function), the row's count becomes NaN, and with it every weight and the loss: it is never dropped and never 0. Rows of
count 0 may hold anything.
"""

from collections.abc import Collection, Iterator

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpo.batch import Rollouts, readable
from jaxpo.fields import FIELDS, OF_UNIT, SHARES
from jaxpo.primitives.numerics import promote

ANY = (-np.inf, np.inf)
REWARD = "the range this objective is defined for: scale the rewards, or say the range if the objective takes one"


def numbers_of(batch: Rollouts, needs: Collection[str]) -> Iterator[tuple[str, Array]]:
    """The numbers of rows [B] or [B, M] that must be finite, by name: rewards, and the ``needs`` that are there."""
    for name in dict.fromkeys(("reward", "rewards_multi", *sorted(needs))):
        field, there = FIELDS.get(name), name in batch.fields()
        of_rows = name in batch.per_row if field is None else field.axes in ("row", "vector")
        if there and of_rows and name != "count" and jnp.issubdtype(batch.get(name).dtype, jnp.floating):
            yield name, batch.get(name)


def looked_at(name: str, batch: Rollouts) -> Array | bool:
    """[B] bool: the rows of which a number is read: all, or the first of each unit if it is one of a whole unit."""
    if name in OF_UNIT and len(batch.layout) > 1:
        return np.arange(batch.mask.shape[-2]) % len(batch.layout) == 0
    return True


def check_numbers(
    needs: Collection[str], rewards: tuple[float, float] | None, batch: Rollouts, where: str = ""
) -> None:
    """Raise ``ValueError`` for a number of a counted row that is not finite, a reward outside the range that an
    objective is defined for, or a probability outside [0, 1]. What cannot be read here passes (`marked` deals with it).

    Args:
      needs: fields that the objective reads: the range ``rewards`` is that of ``reward``, of ``rewards_multi``, or of
        both.
      where: what comes before the message."""
    for name, x in numbers_of(batch, needs):
        allowed, why = ANY, ""
        if name in ("reward", "rewards_multi") and name in needs:
            allowed, why = rewards or ANY, REWARD
        elif name in SHARES:
            allowed, why = (0, 1), "it is a probability or a label"
        label = "reward" if name == "rewards_multi" else name
        check_range(label, x, allowed, batch, why, where=where, rows=looked_at(name, batch))


def check_rewards(allowed: tuple[float, float] | None, batch: Rollouts) -> None:
    """`check_numbers` of rewards alone."""
    check_numbers(("reward", "rewards_multi"), allowed, batch)


def check_range(
    name: str,
    x: Array,
    allowed: tuple[float, float],
    batch: Rollouts,
    why: str,
    *,
    where: str = "",
    rows: Array | bool = True,
) -> None:
    """Raise ``ValueError`` for a number of a counted row that is not finite or outside a range, naming the row and the
    number. Rows of count 0 are not looked at; arrays that are traced or spread over processes pass.

    Args:
      x: [B, ...].
      why: what the range is, for the message. where: what comes before it. rows: [B] those that are looked at.
    """
    if not (readable(x) and readable(batch.count)):
        return
    numbers = np.asarray(x, np.float64)
    counted = np.ones(len(numbers), bool) if batch.count is None else np.asarray(batch.count) > 0
    counted = counted & rows
    axis = counted.ndim  # a race's batches have an axis of seeds before that of rows
    low, high = allowed
    inside = np.isfinite(numbers) & (numbers >= low) & (numbers <= high)
    bad = np.argwhere(~inside & counted.reshape(*counted.shape, *[1] * (numbers.ndim - axis)))
    if len(bad):
        value, row = numbers[tuple(bad[0])], bad[0][axis - 1]
        if not np.isfinite(value):
            raise ValueError(f"{where}the {name} of row {row} is {value:g}: it must be a finite number")
        raise ValueError(f"{where}a {name} of {value:g} is outside [{low:g}, {high:g}], {why}; it is in row {row}")


def marked(batch: Rollouts, needs: Collection[str]) -> Rollouts:
    """The batch with count NaN on counted rows of which a number is not finite, and 0 for every number of a row that
    does not count."""
    count, clean = promote(batch.count), {}
    for name, x in numbers_of(batch, needs):
        over_row = tuple(range(1, x.ndim))
        bad = ~jnp.isfinite(x).all(over_row) & looked_at(name, batch)
        clean[name] = jnp.where((count > 0).reshape(-1, *[1] * (x.ndim - 1)), x, 0)
        count = jnp.where((count > 0) & bad, jnp.nan, count)
    of_rows = {name: clean.pop(name) for name in [*clean] if name in batch.per_row}
    return batch.replace(count=count, **clean).with_row(**of_rows)


def marked_after(batch: Rollouts, given: Rollouts) -> Rollouts:
    """The prepared batch with count NaN on the rows that counted in the ``given`` one and whose reward, after shaping,
    or advantage is not finite, and on those that were marked: also on those that a filter left out for that."""
    bad = jnp.isnan(given.count)
    for x in (batch.reward, batch.adv):
        if x is not None:
            wrong = ~jnp.isfinite(x)
            bad |= wrong if x.ndim == 1 else (wrong & (batch.mask > 0)).any(-1)
    return batch.replace(count=jnp.where((given.count != 0) & bad, jnp.nan, promote(batch.count)))


def check_prepared(batch: Rollouts, given: Rollouts, where: str = "") -> None:
    """Raise ``ValueError`` if ``prepare`` marked a row (count NaN), naming the row, its reward as it was given and
    after shaping. Of a group whose advantages are all lost, it is the row whose own reward is not finite."""
    if batch.count is None or not readable(batch.count):
        return
    bad = np.isnan(np.asarray(batch.count))
    if not bad.any():
        return
    rewards = {"reward": given.reward, "reward after shaping": batch.reward}
    rewards = {what: np.asarray(x) for what, x in rewards.items() if x is not None and readable(x)}
    own = bad & np.any([~np.isfinite(x) for x in rewards.values()], 0) if rewards else bad
    at = tuple(np.argwhere(own if own.any() else bad)[0])
    found = ", ".join(f"{what} {x[at]:g}" for what, x in rewards.items()) or "no reward"
    raise ValueError(f"{where}row {at[-1]} has a number or an advantage that is not finite ({found})")
