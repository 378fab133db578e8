"""Checks of the numbers in a batch."""

from collections.abc import Collection

import numpy as np
from jax import Array

from jaxpo.batch import Rollouts, readable

ANY = (-np.inf, np.inf)


def check_rewards(
    allowed: tuple[float, float] | None, batch: Rollouts, needs: Collection[str] = ("reward", "rewards_multi")
) -> None:
    """Raise ``ValueError`` for a reward of a counted row that is not finite, or outside the range that an objective is
    defined for. Rewards that cannot be read here pass: the training loop looks at them before.

    Args:
      needs: fields that the objective reads: the range is that of ``reward``, of ``rewards_multi``, or of both."""
    why = "the range this objective is defined for: scale the rewards, or say the range if the objective takes one"
    for name, reward in (("reward", batch.reward), ("rewards_multi", batch.per_row.get("rewards_multi"))):
        if reward is not None:
            check_range("reward", reward, (allowed or ANY) if name in needs else ANY, batch, why)


def check_range(name: str, x: Array, allowed: tuple[float, float], batch: Rollouts, why: str) -> None:
    """Raise ``ValueError`` for a number of a counted row that is not finite or outside a range, naming the row and the
    number. Rows of count 0 are not looked at; arrays that are traced or spread over processes pass.

    Args:
      x: [B, ...].
      why: what the range is, for the message."""
    if not (readable(x) and readable(batch.count)):
        return
    numbers = np.asarray(x, np.float64)
    counted = np.ones(len(numbers), bool) if batch.count is None else np.asarray(batch.count) > 0
    rows = counted.ndim  # a race's batches have an axis of seeds before that of rows
    low, high = allowed
    inside = np.isfinite(numbers) & (numbers >= low) & (numbers <= high)
    bad = np.argwhere(~inside & counted.reshape(*counted.shape, *[1] * (numbers.ndim - rows)))
    if len(bad):
        value, row = numbers[tuple(bad[0])], bad[0][rows - 1]
        if not np.isfinite(value):
            raise ValueError(f"the {name} of row {row} is {value:g}: it must be a finite number")
        raise ValueError(f"a {name} of {value:g} is outside [{low:g}, {high:g}], {why}; it is in row {row}")
