"""float32 against float64: inputs of magnitudes that runs have, and the largest error on each."""

import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxpo.batch import Rollouts, TokenStats
from jaxpo.objectives import Objective, evaluate
from jaxpo.registry import entry
from jaxpo.testing.examples import WIDTH, bigram, example, parameters
from jaxpo.testing.variants import as_dtype

LONG = 512  # tokens of a long answer
OFFSET = 30.0  # rewards of a reward model, far from 0 beside their spread
TRAINS = {"gtpo": {"entropy_threshold": math.inf}}  # the long inputs have more entropy than it trains on
Build = Callable[[int], Objective]  # of the generation budget


def build_of(name: str) -> Build:
    """A registered objective by its generation budget; with its defaults, but for settings with which the inputs train
    nothing."""
    row, changed = entry(name), TRAINS.get(name, {})
    return lambda width: row.factory(**row.of_run(width, 10, changed), **changed)


def inputs(build: Build) -> Iterator[tuple[str, Objective, TokenStats, Rollouts]]:
    """Yield the inputs by name, in float32 (NumPy): "wild", the short rows of the contracts, with probabilities near 0
    and 1; "long" answers of up to 512 tokens, near the old policy; "binary", the same with rewards of two values;
    "offset", with rewards around 30, where the objective allows any."""

    def given(objective: Objective, batch: Rollouts, spread: float) -> tuple[Objective, TokenStats, Rollouts]:
        stats = bigram(objective, objective.asks.wants | objective.asks.peeks, parameters(spread), batch)
        return objective, *jax.tree.map(np.asarray, (stats, batch))

    short, long = build(WIDTH), build(LONG)
    yield "wild", *given(short, example(short), 1.0)
    spread = 0.6
    batch = example(long, LONG, spread)
    yield "long", *given(long, batch, spread)
    if "reward" not in long.asks.needs:
        return
    low, high = long.asks.rewards or (0.0, 1.0)
    binary = jnp.where(batch.reward > jnp.median(batch.reward), high, low)
    yield "binary", *given(long, batch.replace(reward=binary), spread)
    if long.asks.rewards is None:
        yield "offset", *given(long, batch.replace(reward=batch.reward + OFFSET), spread)


def error(build: Build, width: int, objective: Objective, stats: TokenStats, batch: Rollouts) -> float:
    """The largest error of loss and gradient in float32, relative to the loss (or 1) and to the largest entry of the
    gradient.

    Args:
      build: builds the same objective in float64."""

    def run(objective: Objective, given: tuple[TokenStats, Rollouts]) -> tuple[np.ndarray, list[np.ndarray]]:
        stats, batch = jax.tree.map(jnp.asarray, given)
        loss, grad = jax.value_and_grad(lambda stats: evaluate(objective, lambda _: stats, batch)[0])(stats)
        return np.asarray(loss), [np.asarray(x) for x in jax.tree.leaves(grad)]

    rounded = run(objective, (stats, batch))
    with jax.enable_x64(True):
        exact = run(build(width), as_dtype((stats, batch), np.float64))
    return apart(rounded, exact)


def apart(rounded: tuple[np.ndarray, list[np.ndarray]], exact: tuple[np.ndarray, list[np.ndarray]]) -> float:
    """The error of (loss, gradients) in float32; infinite if something is not finite.

    Raises:
      AssertionError: the exact loss is no float64."""
    (loss, grads), (true, slopes) = rounded, exact
    assert true.dtype == np.float64, f"the loss of float64 inputs is {true.dtype}"
    gaps = [abs(float(loss) - float(true)) / max(1.0, abs(float(true)))]
    gaps += [np.abs(x - y).max() / (np.abs(y).max() or 1.0) for x, y in zip(grads, slopes, strict=True)]
    return float(np.max(gaps)) if np.isfinite(gaps).all() else np.inf


def errors(build: Build) -> dict[str, float]:
    """The largest error on each of the `inputs`."""
    return {
        what: error(build, WIDTH if what == "wild" else LONG, objective, stats, batch)
        for what, objective, stats, batch in inputs(build)
    }
