"""Cases: an objective with a small example batch, two ways to evaluate it, and the comparison of outcomes."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, PartitionSpec

from jaxpo import registry
from jaxpo.batch import Rollouts, TokenStats, complete
from jaxpo.learning.step import accumulate, score
from jaxpo.metrics import results
from jaxpo.objectives import Objective, evaluate
from jaxpo.testing.examples import WIDTH, bigram, example, parameters
from jaxpo.testing.variants import Given, bfloat16, grown_variants, is_float, stacked, variants

Subject = str | Objective | Callable[..., Objective]
# Contracts compile a lot and compute little: quick compilation halves their time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
quick_jit = partial(jax.jit, compiler_options=QUICK)


class NotChecked(Exception):
    """A contract does not apply to this case; the message says why."""


class Outcome(NamedTuple):
    """The result of one evaluation.

    loss: a scalar.
    grads: a tree of gradients.
    metrics: metrics by name.
    """

    loss: Array
    grads: Any
    metrics: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Case:
    """An objective and an example batch, with results that several contracts use.

    name: the objective's name.
    objective: the objective.
    batch: the example batch.
    factory: the function that built the objective, if it is known.
    hyperparameters: arguments of that function.
    source: its paper, if it is registered.

    Variants of one shape share one compiled program. A single evaluation runs op by op: an operation on arrays of one
    shape is compiled once for all objectives.
    """

    name: str
    objective: Objective
    batch: Rollouts
    factory: Callable[..., Objective] | None = None
    hyperparameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source: str | None = None

    @cached_property
    def params(self) -> dict[str, Array]:
        """Parameters of the policy `bigram`."""
        return parameters()

    @cached_property
    def stats(self) -> TokenStats:
        """The statistics of the batch under `bigram`, as plain arrays."""
        return bigram(self.objective, self.objective.asks.wants | self.objective.asks.peeks, self.params, self.batch)

    @cached_property
    def arrays(self) -> tuple[TokenStats, Rollouts]:
        """Statistics and batch in NumPy, to make variants from."""
        return jax.tree.map(np.asarray, (self.stats, self.batch))

    @cached_property
    def outcomes(self) -> dict[str, Outcome]:
        """`direct` of every variant that has the example's shape: one compiled program serves most contracts."""
        return together(self.objective, variants(self), jax.devices()[: replicas()])

    @property
    def base(self) -> Outcome:
        """`direct` of the example as it is."""
        return self.outcomes["as it is"]

    @cached_property
    def grown(self) -> dict[str, Outcome]:
        """`direct` of the variants in a larger shape."""
        return together(self.objective, grown_variants(self), jax.devices()[:1])

    @cached_property
    def narrow(self) -> Outcome:
        """`direct` of the example in bfloat16."""
        return direct(self.objective, *jax.tree.map(jnp.asarray, bfloat16(self.arrays)))

    @cached_property
    def eager(self) -> Outcome:
        """`direct` of the example as it is, op by op."""
        return direct(self.objective, self.stats, self.batch)

    @cached_property
    def weighed(self) -> tuple[Rollouts, Any]:
        """The batch with its weights, and the state: ready for the loss."""
        return weighed(self.objective, self.params, self.batch)

    @cached_property
    def accumulated(self) -> tuple[Array, Any, Any]:
        """Loss, gradient and report of `weighed`, op by op."""
        return of_slice(self.objective, self.params, *self.weighed)

    @property
    def trained(self) -> Outcome:
        """`train` of the example as it is, op by op."""
        value, grads, report = self.accumulated
        return Outcome(value, grads, results(report))

    @cached_property
    def stepped(self) -> tuple[Any, Any]:
        """The objective's state after ``prepare``, and after the first optimizer step."""
        batch, state = self.weighed
        return state, self.objective.update(state, batch, self.accumulated[2])

    @property
    def unit(self) -> int:
        """The number of rows in one unit of the objective's layout."""
        return max(len(self.objective.unit.layout), 1)

    @property
    def units(self) -> int:
        return self.batch.rows // self.unit

    def rows(self, units: Any) -> np.ndarray:
        """Indices of the rows of the given units."""
        return (np.asarray(units)[:, None] * self.unit + np.arange(self.unit)).reshape(-1)


def case(objective: Subject, batch: Rollouts | None = None, /, **hyperparameters: Any) -> Case:
    """Make the case of a registered name, of a function that builds an objective, or of an `Objective`.

    Args:
      objective: the name, function or objective.
      batch: rows to check it on, instead of `example`: tokens from 0 to 6, a multiple of 8 units, no ties.
      **hyperparameters: arguments of the function. Those that a run takes from its generation budget are taken from
        the width of the example.

    Raises:
      ValueError: unknown name or hyperparameter; or hyperparameters given with a finished objective.
    """
    if isinstance(objective, Objective):
        if hyperparameters:
            raise ValueError(
                f"{', '.join(hyperparameters)}: this objective is built already; give its function or its name"
            )
        return Case("objective", objective, example(objective) if batch is None else complete(batch))
    rows = [registry.entry(name) for name in ([objective] if isinstance(objective, str) else registry.names())]
    row = next((r for r in rows if objective in (r.id, r.factory)), None)
    name, factory = (row.id, row.factory) if row else (objective.__name__, objective)
    if row:
        hyperparameters = {**row.of_run(WIDTH, 10, hyperparameters), **hyperparameters}
    registry.check_arguments(f"objective {name!r}", hyperparameters, inspect.signature(factory).parameters)
    built = factory(**hyperparameters)
    batch = example(built) if batch is None else complete(batch)
    return Case(name, built, batch, factory, hyperparameters, row.source if row else None)


# ---- the two ways to evaluate --------------------------------------------------------------------------------------


def direct(objective: Objective, stats: TokenStats, batch: Rollouts, state: Any = None) -> Outcome:
    """Evaluate on plain arrays; ``grads`` is (gradient of the statistics, gradient of every float of the batch)."""
    floats = jax.tree.map(lambda x: x if is_float(x) else None, batch)

    def loss(stats: TokenStats, floats: Rollouts) -> tuple[Array, dict[str, Array]]:
        whole = jax.tree.map(lambda x, y: y if x is None else x, floats, batch, is_leaf=lambda x: x is None)
        value, report = evaluate(objective, lambda _: stats, whole, state)
        return value, results(report)

    (value, report), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(stats, floats)
    return Outcome(value, grads, report)


def replicas() -> int:
    """The number of devices that variants are spread over."""
    return max(1, min(8, jax.device_count()) // 2)


def together(objective: Objective, given: Mapping[str, Given], devices: Sequence[jax.Device]) -> dict[str, Outcome]:
    """Run `direct` on every variant in one compiled call, by vmap on each device."""
    mesh = jax.make_mesh((len(devices),), ("replica",), axis_types=(AxisType.Auto,), devices=devices)
    spec = PartitionSpec("replica")
    apart = quick_jit(jax.shard_map(jax.vmap(partial(direct, objective)), mesh=mesh, in_specs=spec, out_specs=spec))
    rows = list(given.values())
    rows += rows[:1] * (-len(rows) % len(devices))
    out = jax.tree.map(np.asarray, apart(*stacked(rows)))
    return {name: jax.tree.map(lambda x, i=i: x[i], out) for i, name in enumerate(given)}


def weighed(
    objective: Objective, params: dict[str, Array], batch: Rollouts, microbatches: int = 1
) -> tuple[Rollouts, Any]:
    """Prepare and weigh the batch, peeking at `bigram` if the objective asks for it; also return the state."""
    batch, state = objective.prepare(batch, objective.init())
    peek = None
    if objective.asks.peeks:
        peek = score(partial(bigram, objective, objective.asks.peeks), params, batch, microbatches=microbatches)
    return objective.weigh(batch, state, peek), state


def of_slice(
    objective: Objective, params: dict[str, Array], batch: Rollouts, state: Any, microbatches: int = 1
) -> tuple[Array, Any, Any]:
    """Compute loss, gradient and report of the rows of a weighed batch."""
    apply = partial(bigram, objective, objective.asks.wants)
    return accumulate(objective, apply, params, batch, state, microbatches=microbatches)


def train(objective: Objective, params: dict[str, Array], batch: Rollouts, microbatches: int = 1) -> Outcome:
    """Compute the same as an optimizer step with the policy `bigram`; ``grads`` is the gradient of its parameters."""
    value, grads, report = of_slice(
        objective, params, *weighed(objective, params, batch, microbatches), microbatches=microbatches
    )
    return Outcome(value, grads, results(report))


def leaves_of(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(x, np.float64) for path, x in leaves}


def same(what: str, got: Any, expected: Any, tolerance: float = 1e-6) -> str:
    """Compare two trees leaf by leaf; return a note with the largest difference.

    A difference is relative to the largest entry of its leaf if that is above 1. The ``AssertionError`` names the first
    leaf that differs by more than ``tolerance``, at its worst entry.
    """
    got, expected = leaves_of(got), leaves_of(expected)
    odd = sorted(set(got) ^ set(expected))
    assert not odd, f"{what}: {odd[0]} is in one of the two only"
    worst = 0.0
    for path, b in expected.items():
        a = got[path]
        assert a.shape == b.shape, f"{what}: {path} has shape {a.shape} instead of {b.shape}"
        scale = max(1.0, float(np.max(np.abs(b), initial=0)))
        gap = np.abs(a - b) / scale
        where = np.unravel_index(np.argmax(np.where(np.isnan(gap), np.inf, gap)), gap.shape) if gap.size else ()
        gap = float(gap[where]) if gap.size else 0.0
        at = f"[{', '.join(map(str, where))}]" if where else ""
        assert gap <= tolerance, f"{what}: {path}{at} is {a[where]:.9g} instead of {b[where]:.9g}"
        worst = max(worst, gap)
    return f"{what}: largest difference {worst:.1e}"


def not_finite(what: str, tree: Any) -> list[str]:
    """One line for each leaf that is not finite."""
    bad = {path: x for path, x in leaves_of(tree).items() if not np.all(np.isfinite(x))}
    return [f"{what}: {path} holds {np.asarray(x)[~np.isfinite(x)].reshape(-1)[0]}" for path, x in bad.items()]
