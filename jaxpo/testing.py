"""The contracts that every objective keeps, each a function of its own: `check` runs them all.

>>> jaxpo.testing.check("grpo", eps_high=0.28)     # a registered objective
>>> jaxpo.testing.check(my_objective)              # an `Objective`, or a function that builds one

A contract takes a `Case` (an objective with a small example batch), raises ``AssertionError`` with the numbers when it
is broken, and returns one line on what it compared. ``padding_invariance(case("grpo"))`` runs a single one.
"""

import dataclasses
import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpo import registry
from jaxpo.batch import MissingField, Rollouts, TokenStats, complete, concatenate, pad, role_id, take
from jaxpo.metrics import results
from jaxpo.objectives import Objective, evaluate
from jaxpo.objectives.base import standard_metrics
from jaxpo.training.checkpoint import Checkpoints
from jaxpo.training.step import accumulate, score

Subject = str | Objective | Callable[..., Objective]
VOCABULARY, PROMPT, WIDTH, GROUP = 7, 3, 6, 4
TOKEN_FIELDS = ("logp_old", "logp_beh", "entropy_old", "value_old", "slots", "token_extras")
# Contracts compile much and compute little: quick compilation halves their time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
_jit = partial(jax.jit, compiler_options=QUICK)


class NotChecked(Exception):
    """A contract does not apply to this case; the message says why."""


class Outcome(NamedTuple):
    """What one evaluation gives: a scalar, gradients (a tree), metrics by name."""

    loss: Array
    grads: Any
    metrics: dict[str, Array]


class Report(NamedTuple):
    """What `check` did: contract -> what was compared, and contract -> why it does not apply."""

    objective: str
    checked: dict[str, str]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.objective}: {len(self.checked)} contracts kept"]
        lines += [f"  {name}: {note}" for name, note in self.checked.items()]
        return "\n".join(lines + [f"  {name}: not checked, {why}" for name, why in self.skipped.items()])


@dataclasses.dataclass(frozen=True)
class Case:
    """An objective, how it was built if that is known, and an example batch. Contracts share its compiled functions."""

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
        """What `bigram` says of the batch, as plain arrays."""
        return _jit(partial(bigram, self.objective, self.objective.wants | self.objective.peeks))(
            self.params, self.batch
        )

    @cached_property
    def direct(self) -> Callable[[TokenStats, Rollouts], Outcome]:
        """Jitted `direct` of the objective."""
        return _jit(partial(direct, self.objective))

    @cached_property
    def base(self) -> Outcome:
        """`direct` on the example as it is."""
        return self.direct(self.stats, self.batch)

    @cached_property
    def train(self) -> Callable[[dict[str, Array], Rollouts], Outcome]:
        """Jitted `train` of the objective."""
        return _jit(partial(train, self.objective))

    @cached_property
    def trained(self) -> Outcome:
        """`train` on the example as it is."""
        return self.train(self.params, self.batch)

    @property
    def unit(self) -> int:
        """Rows that make one unit of the objective's layout."""
        return max(len(self.objective.layout), 1)

    @property
    def units(self) -> int:
        return self.batch.rows // self.unit

    def rows(self, units: Any) -> np.ndarray:
        """Indices of the rows of the given units."""
        return (np.asarray(units)[:, None] * self.unit + np.arange(self.unit)).reshape(-1)


# ---- cases --------------------------------------------------------------------------------------------------------


def case(objective: Subject, batch: Rollouts | None = None, /, **hyperparameters: Any) -> Case:
    """The case of a registered name, of a function that builds an objective, or of an `Objective`.

    Args:
      batch: rows to check it on, instead of `example`. With tokens from 0 to 6, a multiple of 8 units, and no ties.
      hyperparameters: of a name or function. Those that a run takes from its generation budget are taken from the
        width of the example.

    Raises:
      ValueError: unknown name or hyperparameter; hyperparameters beside a finished objective.
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
        budget = {key: 10 if share == "steps" else share * WIDTH for key, share in row.budget.items()}
        hyperparameters = {**budget, **hyperparameters}
    registry.check_arguments(f"objective {name!r}", hyperparameters, inspect.signature(factory).parameters)
    built = factory(**hyperparameters)
    batch = example(built) if batch is None else complete(batch)
    return Case(name, built, batch, factory, hyperparameters, row.source if row else None)


def example(objective: Objective) -> Rollouts:
    """A small batch with every field the objective may read: groups of 4 (or units), holes in the mask, no ties.

    Raises:
      ValueError: the objective needs a field that is no field of `Rollouts`; bring a batch that has it.
    """
    rng, unit = np.random.default_rng(0), max(len(objective.layout), 1)
    b = 8 * unit * max(1, 16 // (8 * unit))
    lengths = np.resize([WIDTH, 3, 5, 1, 4, 6, 2], b)
    mask = (np.arange(WIDTH) < lengths[:, None]).astype(np.float32)
    mask[::3, 1] = 0  # a hole: a token that the policy did not write

    def logp() -> np.ndarray:
        return rng.normal(-2, 0.5, (b, WIDTH)).astype(np.float32)

    extras = {
        "rewards_multi": rng.uniform(size=(b, 3)),
        "tracker_value": rng.uniform(size=b),
        "edge_adv": rng.normal(size=b),
        "mc_value": rng.uniform(size=(b, WIDTH)),
    }
    known = {"logp", *Rollouts.__dataclass_fields__, *extras}
    strange = sorted(n for n in objective.needs if n not in known and not n.startswith("logp_"))
    if strange:
        raise ValueError(f"no example of {strange[0]!r}, which this objective needs: give check a batch that has it")
    group = np.arange(b, dtype=np.int32) // (GROUP if unit == 1 else unit)
    roles = [role_id(r) for r in objective.layout or ("own",)]
    batch = Rollouts(
        tokens=rng.integers(0, VOCABULARY, (b, PROMPT + WIDTH)).astype(np.int32),
        mask=mask,
        prompt_length=rng.integers(1, PROMPT + 1, b).astype(np.int32),
        count=np.ones(b, np.float32),
        group=97 - 5 * group,
        role=np.resize(roles, b).astype(np.int32),
        prompt=group,
        seed=rng.integers(0, 2**32, b, dtype=np.uint32),
        reward=_allowed(objective, rng.normal(size=b).astype(np.float32)),
        correct=np.resize([0, 1, 1, 0], b).astype(np.float32),
        truncated=(lengths == WIDTH).astype(np.float32),
        entropy_old=rng.uniform(0, 1, (b, WIDTH)).astype(np.float32),
        value_old=logp(),
        layout=objective.layout,
    )
    # The first row, which `count_is_multiplicity` doubles, is at the end of its group's order.
    batch.entropy_old[:] *= np.resize([0.1, 1, 0.4, 0.7], b)[:, None]
    batch = jax.tree.map(jnp.asarray, batch)
    slots = {n.removeprefix("logp_") for n in objective.needs if n.startswith("logp_")} - {"old", "beh"}
    said = bigram(objective, frozenset({"logp"}), parameters(), batch).logp

    def near(x: Array, scale: float) -> Array:
        return x + jnp.asarray(rng.normal(0, scale, x.shape), jnp.float32)

    old = near(said, 0.3)  # some ratios are clipped and some are not
    asked = {n: jnp.asarray(x, jnp.float32) for n, x in extras.items() if n in objective.needs}
    per_token = {n: x for n, x in asked.items() if x.shape == batch.mask.shape}
    return complete(
        batch.replace(
            logp_old=old,
            logp_beh=near(old, 0.01),
            extras={n: x for n, x in asked.items() if n not in per_token},
            token_extras={"logp_sampler": near(old, 0.01), **per_token},
            slots={name: near(said, 0.5) for name in sorted(slots | {"ref"})},
        )
    )


def parameters() -> dict[str, Array]:
    """Parameters of the policy `bigram`."""
    rng = np.random.default_rng(1)
    shapes = {"table": (VOCABULARY, VOCABULARY), "head": (VOCABULARY,)}
    scale = {"table": 6, "head": 1}  # some tokens are all but certain and some all but impossible
    return {name: jnp.asarray(scale[name] * rng.normal(size=x), jnp.float32) for name, x in shapes.items()}


def _allowed(objective: Objective, reward: Array) -> Array:
    """The rewards, squeezed in their order into the range that the objective is defined for."""
    if objective.rewards is None:
        return reward
    low, high = objective.rewards
    return low + (high - low) / (1 + np.exp(-np.asarray(reward)))


def bigram(objective: Objective, wants: frozenset[str], params: dict[str, Array], batch: Rollouts) -> TokenStats:
    """A policy of two small tables: logits of a token given the one before it. Gives the statistics in ``wants``, also
    those that the objective derives from logits."""
    before = batch.tokens[:, batch.prompt_width - 1 : -1]
    logits = params["table"][before]
    logps = jax.nn.log_softmax(logits)
    value = params["head"][before]
    said = {
        "logp": jnp.take_along_axis(logps, batch.completions[..., None], -1)[..., 0],
        "logits": logits,
        "value": value,
        "entropy": -jnp.sum(jnp.exp(logps) * logps, -1),
        "score": jnp.sum(value * (batch.mask > 0), -1),
        "embed": jnp.sum(logits * (batch.mask > 0)[..., None], 1),
    }
    flat = logits.reshape(-1, VOCABULARY), batch.completions.reshape(-1)
    derived = {n: f(*flat).reshape(batch.mask.shape) for n, f in objective.derived.items() if n in wants}
    return TokenStats(**{name: said[name] for name in wants - set(derived)}, derived=derived)


# ---- the two ways to evaluate --------------------------------------------------------------------------------------


def direct(objective: Objective, stats: TokenStats, batch: Rollouts, state: Any = None) -> Outcome:
    """`evaluate` of plain arrays; ``grads`` is (gradient into them, gradient into every float of the batch)."""
    floats = jax.tree.map(lambda x: x if _is_float(x) else None, batch)

    def loss(stats: TokenStats, floats: Rollouts) -> tuple[Array, dict[str, Array]]:
        whole = jax.tree.map(lambda x, y: y if x is None else x, floats, batch, is_leaf=lambda x: x is None)
        value, report = evaluate(objective, lambda _: stats, whole, state)
        return value, results(report)

    (value, report), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(stats, floats)
    return Outcome(value, grads, report)


def train(objective: Objective, params: dict[str, Array], batch: Rollouts, microbatches: int = 1) -> Outcome:
    """What an optimizer step computes with the policy `bigram`; ``grads`` is the gradient of its parameters."""
    batch, state = objective.prepare(batch, objective.init())
    peek = None
    if objective.peeks:
        peek = score(partial(bigram, objective, objective.peeks), params, batch, microbatches=microbatches)
    batch = objective.weigh(batch, state, peek)
    apply = partial(bigram, objective, objective.wants)
    value, grads, report = accumulate(objective, apply, params, batch, state, microbatches=microbatches)
    return Outcome(value, grads, results(report))


def _is_float(x: Array) -> bool:
    return jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)


def _leaves(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(x, np.float64) for path, x in leaves}


def same(what: str, got: Any, expected: Any, tolerance: float = 1e-6) -> str:
    """Compare two trees leaf by leaf; the error names the worst leaf, the note tells the largest difference.

    Differences are taken relative to the largest entry of the leaf where that is above 1.
    """
    got, expected = _leaves(got), _leaves(expected)
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


def _finite(what: str, tree: Any) -> list[str]:
    """One line for each leaf that is not finite."""
    bad = {path: x for path, x in _leaves(tree).items() if not np.all(np.isfinite(x))}
    return [f"{what}: {path} holds {np.asarray(x)[~np.isfinite(x)].reshape(-1)[0]}" for path, x in bad.items()]


def _grown(batch: Rollouts, rows: int) -> Rollouts:
    """Padded by fixed amounts in width, so that two contracts share one compilation."""
    return pad(batch, rows=rows, width=batch.width + 3, prompt_width=batch.prompt_width + 2)


def _pad_stats(stats: TokenStats, batch: Rollouts, value: float) -> TokenStats:
    """The statistics of a grown batch: ``value`` on everything that was added."""
    b, t = stats.logp.shape

    def grow(x: Array) -> Array:
        widths = [(0, batch.rows - b), *[(0, 0)] * (x.ndim - 1)]
        if x.shape[:2] == (b, t):
            widths[1] = (0, batch.width - t)
        return jnp.pad(x, widths, constant_values=value)

    return jax.tree.map(grow, stats)


def _where_masked(tree: Any, mask: Array, value: float) -> Any:
    """``value`` at the masked positions of every [B, T, ...] float array."""

    def fill(x: Array) -> Array:
        if not _is_float(x) or x.shape[:2] != mask.shape:
            return x
        return jnp.where((mask > 0).reshape(*mask.shape, *[1] * (x.ndim - 2)), x, value)

    return jax.tree.map(fill, tree)


# ---- contracts ----------------------------------------------------------------------------------------------------


def finite_on_hostile_input(case: Case) -> str:
    """Loss, gradient and metrics are finite whatever is thrown at them."""
    bad, n = [], 0
    for what, stats, batch in _hostile(case):
        bad, n = bad + _finite(what, case.direct(stats, batch)), n + 1
    assert not bad, "; ".join(bad)
    return f"{n} hostile inputs"


def _hostile(case: Case) -> Iterator[tuple[str, TokenStats, Rollouts]]:
    stats, batch = case.stats, case.batch
    ones, index = jnp.ones(batch.rows, jnp.float32), jnp.arange(batch.rows)
    by_turns = jnp.where((index[:, None] + jnp.arange(batch.width)) % 2 == 0, 40.0, -40.0)
    for what, shift in (("+40", 40.0), ("-40", -40.0), ("±40 by turns", by_turns)):
        yield f"log-ratios {what}", stats.replace(logp=stats.logp + shift), batch
    group_number = jnp.unique(batch.group, return_inverse=True)[1].reshape(-1).astype(jnp.float32)
    changes = {
        "no token in a unit": {"mask": batch.mask.at[: case.unit].set(0)},
        "no token at all": {"mask": jnp.zeros_like(batch.mask)},
        "one token a row": {"mask": jnp.zeros_like(batch.mask).at[:, 0].set(1)},
        "no row counts": {"count": 0 * ones},
        "groups of one unit": {"group": (index // case.unit).astype(batch.group.dtype)},
        "one group": {"group": jnp.zeros_like(batch.group)},
        "groups without variance": {"reward": _allowed(case.objective, group_number)},
        "equal rewards": {"reward": _allowed(case.objective, ones / 3)},
        "all correct": {"correct": ones},
        "none correct": {"correct": 0 * ones},
        "all truncated": {"truncated": ones},
    }
    for what, fields in changes.items():
        if all(getattr(batch, name) is not None for name in fields):
            yield what, stats, batch.replace(**fields)
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        yield f"{value} of the policy at masked positions", _where_masked(stats, batch.mask, value), batch
        fields = {name: _where_masked(getattr(batch, name), batch.mask, value) for name in TOKEN_FIELDS}
        yield f"{value} of the batch at masked positions", stats, batch.replace(**fields)
    yield "bfloat16", *_bfloat16(case)


def padding_invariance(case: Case) -> str:
    """More padding of T and P and more filler rows change neither loss, gradient nor metrics."""
    b, t = case.batch.mask.shape
    grown = _grown(case.batch, b + 2 * case.unit)
    out = case.direct(_pad_stats(case.stats, grown, jnp.nan), grown)
    note = same("padded", _cropped(out, case), _cropped(case.base, case))
    added = jax.tree.map(lambda x: x.at[:b, :t].set(0) if x.ndim > 1 else x.at[:b].set(0), out.grads[0])
    same("gradient into padding", added, jax.tree.map(jnp.zeros_like, added), 0)
    return note


def _cropped(out: Outcome, case: Case) -> Outcome:
    """Only the gradient into the statistics, on the rows and tokens of the case's own batch."""
    b, t = case.batch.mask.shape
    own = jax.tree.map(lambda x, s: x[:b, :t] if s.shape[:2] == (b, t) else x[:b], out.grads[0], case.stats)
    return out._replace(grads=own)


def permutation_equivariance(case: Case) -> str:
    """Rows in another order (units whole, groups apart): the same loss and metrics, the gradient in that order."""
    rows = case.rows(np.random.default_rng(2).permutation(case.units))
    out = case.direct(jax.tree.map(lambda x: x[rows], case.stats), take(case.batch, rows))
    expected = case.base._replace(grads=jax.tree.map(lambda x: x[rows], case.base.grads[0]))
    return same("permuted", out._replace(grads=out.grads[0]), expected)


def count_is_multiplicity(case: Case) -> str:
    """A row of count 2 is the row written twice; rows of count 0 are rows that are not there, whatever they hold."""
    first, second, r = case.rows([0]), case.rows([1]), case.unit
    by_count = case.batch.replace(count=case.batch.count.at[: 2 * r].set(jnp.repeat(jnp.array([2.0, 0.0]), r)))
    order = np.concatenate([first, first, np.arange(2 * r, case.batch.rows)])
    written, stats = take(case.batch, order), jax.tree.map(lambda x: x[order], case.stats)
    a, b = case.direct(case.stats, by_count), case.direct(stats, written)
    together = jax.tree.map(lambda g: g.at[first].add(g[second]).at[second].set(0), b.grads[0])
    note = same("count 2", a._replace(grads=a.grads[0]), b._replace(grads=together))
    ghosts = take(case.batch, np.concatenate([first, second]))  # they have tokens, and other rewards than their groups
    ghosts = ghosts.replace(count=jnp.zeros(2 * r), reward=None if ghosts.reward is None else 3 * ghosts.reward + 1)
    grown = _grown(concatenate([case.batch, ghosts]), case.batch.rows + 2 * r)
    out = case.direct(_pad_stats(case.stats, grown, -1.0), grown)
    return f"{note}; {same('count 0', _cropped(out, case), _cropped(case.base, case))}"


def microbatch_invariance(case: Case) -> str:
    """One slice, two, as many as units (groups, if it looks at groups): the same loss, gradient and metrics."""
    batch, largest = case.batch, case.units
    if case.objective.coupling == "group":
        if batch.shared_prompt == 1:
            batch = batch.replace(shared_prompt=GROUP if case.unit == 1 else case.unit)
        largest = batch.rows // batch.shared_prompt
    notes = []
    for n in sorted({2, largest} - {1}):
        out = _jit(partial(train, case.objective, microbatches=n))(case.params, batch)
        notes.append(same(f"{n} slices", out, case.trained))
    return "; ".join(notes)


def evaluate_agrees_with_training(case: Case) -> str:
    """`evaluate` in a notebook and the training step compute the same loss and metrics."""
    return same("evaluated", case.base._replace(grads=()), case.trained._replace(grads=()))


def _mesh(case: Case, most: int = 8) -> jax.sharding.Mesh:
    devices = min(most, jax.device_count())
    if devices < 2 or case.units % devices:
        raise NotChecked(f"{jax.device_count()} device(s) and {case.units} units")
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def mesh_invariance(case: Case) -> str:
    """The batch on one device and sharded over 8: the same loss, gradient and metrics."""
    mesh = _mesh(case)
    batch = jax.device_put(case.batch, NamedSharding(mesh, PartitionSpec("data")))
    params = jax.device_put(case.params, NamedSharding(mesh, PartitionSpec()))
    return same(f"{mesh.size} devices", _jit(partial(train, case.objective))(params, batch), case.trained)


def independent_replicas(case: Case) -> str:
    """Replicas with their own parameters and batches, by vmap on each of several devices: each as it would be alone."""
    devices = max(1, min(8, jax.device_count()) // 2)
    n, f = 2 * devices, partial(train, case.objective)
    params = [jax.tree.map(lambda x, i=i: x * (1 + i / 10), case.params) for i in range(n)]
    batches = [take(case.batch, case.rows(np.roll(np.arange(case.units), i))) for i in range(n)]
    factor = [1 / (i + 1) if case.objective.rewards else i + 1 for i in range(n)]
    batches = [b if b.reward is None else b.replace(reward=b.reward * x) for b, x in zip(batches, factor, strict=True)]
    expected = _stack([case.train(p, b) for p, b in zip(params, batches, strict=True)])
    mesh = jax.make_mesh((devices,), ("replica",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    spec = PartitionSpec("replica")
    apart = _jit(jax.shard_map(jax.vmap(f), mesh=mesh, in_specs=(spec, spec), out_specs=spec))
    return same(f"vmap over 2 on each of {devices} device(s)", apart(_stack(params), _stack(batches)), expected)


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def gradient_only_into_the_policy(case: Case) -> str:
    """The derivative with respect to every float of the batch is exactly 0."""
    into = {path: x for path, x in _leaves(case.base.grads[1]).items()}
    bad = [f"{path[1:]} gets a gradient of {np.abs(x).max():.3g}" for path, x in into.items() if np.any(x != 0)]
    assert not bad, "; ".join(bad)
    return f"{len(into)} fields"


def masked_positions_get_no_gradient(case: Case) -> str:
    """The gradient at masked positions is exactly 0, and not 0 everywhere."""
    masked = np.asarray(case.batch.mask) == 0
    leaves = {path: x for path, x in _leaves(case.base.grads[0]).items() if x.shape[:2] == masked.shape}
    for path, x in leaves.items():
        assert not np.any(x[masked]), f"{path[1:]} has a gradient of {np.abs(x[masked]).max():.3g} at masked positions"
    assert any(np.any(x) for x in _leaves(case.base.grads[0]).values()), "the gradient is 0 everywhere"
    return f"{masked.sum()} masked positions of {', '.join(path[1:] for path in leaves)}"


def jit_equals_eager(case: Case) -> str:
    """Compiled or not: the same loss, gradient and metrics."""
    return same("eager", direct(case.objective, case.stats, case.batch), case.base)


def vmap_over_hyperparameters(case: Case) -> str:
    """An objective built from traced numbers inside vmap gives what it gives for each of them in a loop.

    Every hyperparameter annotated ``float`` is tried, with its value and with another one. Left out is one whose change
    the function refuses (``ValueError``: without effect in this setting, or in conflict); a function that accepts a
    number and breaks on a traced one breaks the contract.
    """
    if case.factory is None:
        raise NotChecked("it needs the function that builds the objective")
    parameters = inspect.signature(case.factory).parameters
    now = {
        name: case.hyperparameters.get(name, p.default)
        for name, p in parameters.items()
        if "float" in str(p.annotation)
    }
    now = {name: x for name, x in now.items() if x is None or isinstance(x, int | float)}
    given, absent = ([n for n in now if (now[n] is None) is none] for none in (False, True))
    notes = []
    for names in (given, absent):  # apart, since what is absent by default often is in conflict with something given
        changed = _accepted(case, names, now)
        if changed:
            start = {n: changed[n] if now[n] is None else now[n] for n in changed}
            notes.append(_vmap_equals_loop(case, start, changed))
    return "; ".join(notes) or "no hyperparameter is a float"


def _accepted(case: Case, names: list[str], now: Mapping[str, Any]) -> dict[str, float]:
    """A new value for each hyperparameter that takes one: alone, and beside those found before it."""
    changed: dict[str, float] = {}
    for name in names:
        tries = (0.5, 2.0) if now[name] is None else (now[name] * 1.25 if now[name] else 0.1,)
        for value in tries:
            try:
                case.factory(**{**case.hyperparameters, **changed, name: float(value)})
            except ValueError:
                continue
            changed[name] = float(value)
            break
    return changed


def _vmap_equals_loop(case: Case, start: Mapping[str, float], changed: Mapping[str, float]) -> str:
    stats = case.stats

    def run(numbers: Mapping[str, Any]) -> tuple[Array, TokenStats]:
        out = direct(case.factory(**{**case.hyperparameters, **numbers}), stats, case.batch)
        return out.loss, out.grads[0]

    settings = [start, {name: 1.1 * x if x == start[name] else x for name, x in changed.items()}]
    columns = {name: jnp.array([s[name] for s in settings], jnp.float32) for name in changed}
    return same(f"vmap over {', '.join(changed)}", _jit(jax.vmap(run))(columns), _stack([run(s) for s in settings]))


def _bfloat16(case: Case) -> tuple[TokenStats, Rollouts]:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if _is_float(x) else x, (case.stats, case.batch))


def float32_accumulation(case: Case) -> str:
    """bfloat16 arrays give the loss and metrics of the same numbers in float32, and its gradient rounded."""
    narrow = _bfloat16(case)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if _is_float(x) else x, narrow)
    a, b = case.direct(*narrow), case.direct(*wide)
    assert jnp.finfo(a.loss.dtype).bits >= 32, f"the loss of bfloat16 inputs is {a.loss.dtype}"
    note = same("bfloat16", a._replace(grads=()), b._replace(grads=()), 1e-5)
    scale = {path: max(np.abs(x).max(), 1e-30) for path, x in _leaves(b.grads[0]).items()}
    x, y = ({path: x / scale[path] for path, x in _leaves(out.grads[0]).items()} for out in (a, b))
    same("gradient of bfloat16", x, y, 2.0**-8)
    return note


def needs_is_exact(case: Case) -> str:
    """Every field of ``needs`` is asked for by name and has an effect; no other is needed (but tokens and mask)."""
    objective, batch = case.objective, case.batch
    for name in sorted(objective.needs):
        try:
            objective.prepare(_without(batch, name), objective.init())
        except MissingField as error:
            assert error.field == name, f"without {name!r} the error names {error.field!r}"
        else:
            raise AssertionError(f"{name!r} is in needs, but a batch without it is accepted")
    least = batch
    for name in set(batch.fields()) - {"tokens", "mask"} - objective.needs:
        least = _without(least, name)
    try:
        jax.eval_shape(partial(direct, objective), case.stats, least)
    except (MissingField, AttributeError, TypeError) as error:
        raise AssertionError(f"with needs {sorted(objective.needs)} alone: {type(error).__name__}: {error}") from error
    prepared, _ = objective.prepare(batch, objective.init())
    standard = results(standard_metrics(case.stats, prepared.replace(logp_old=case.stats.logp)))

    later = _stepped(case)[1]

    def effects(batch: Rollouts) -> dict[str, np.ndarray]:
        """Of the first iteration and of the second, in which the objective may remember the first."""
        outs = []
        for out in (case.direct(case.stats, batch), case.direct(case.stats, batch, later)):
            own = {name: x for name, x in out.metrics.items() if name not in standard}  # which every objective reports
            outs.append(out._replace(grads=out.grads[0], metrics=own))
        return _leaves(outs)

    before = effects(batch)
    for name in sorted(objective.needs):
        after = effects(_replaced(batch, name, jnp.zeros_like(batch.get(name))))
        changed = any(not np.array_equal(after[path], before[path]) for path in before)
        assert changed, f"{name!r} is in needs, but neither loss, gradient nor a metric of its own depends on it"
    return f"needs {', '.join(sorted(objective.needs)) or 'nothing'}"


def _replaced(batch: Rollouts, name: str, value: Array | None) -> Rollouts:
    """The batch with another field, slot or extra of that name; None removes it."""
    for group, key in (("slots", name.removeprefix("logp_")), ("extras", name), ("token_extras", name)):
        held = dict(getattr(batch, group))
        if key in held and name not in Rollouts.__dataclass_fields__:
            held.pop(key) if value is None else held.update({key: value})
            return batch.replace(**{group: held})
    return batch.replace(**{name: value})


def _without(batch: Rollouts, name: str) -> Rollouts:
    return _replaced(batch, name, None)


def _stepped(case: Case) -> tuple[Any, Any]:
    """The objective's state after ``prepare``, and after the first optimizer step."""
    objective, stats = case.objective, case.stats

    def step(batch: Rollouts) -> tuple[Any, Any]:
        batch, state = objective.prepare(batch, objective.init())
        batch = objective.weigh(batch, state, stats if objective.peeks else None)
        return state, objective.update(state, batch, objective.loss(lambda _: stats, batch, state)[1])

    return _jit(step)(case.batch)


def state_survives_a_checkpoint(case: Case) -> str:
    """State is a pytree of arrays of one form, counts iterations and steps, and comes back from disk bit for bit."""
    objective = case.objective
    begin = objective.init()
    prepared, stepped = _stepped(case)
    clock = [(int(s.iteration), int(s.step)) for s in (begin, prepared, stepped)]
    expected = [(-1, 0), (0, 0), (0, 1)]
    assert clock == expected, f"(iteration, step) after init, prepare, update is {clock} instead of {expected}"

    def form(state: Any) -> Any:
        return jax.tree.structure(state), [(jnp.shape(x), jnp.asarray(x).dtype) for x in jax.tree.leaves(state)]

    for what, state in (("prepare", prepared), ("update", stepped)):
        assert form(state) == form(begin), f"{what} changes the form of the state from {form(begin)} to {form(state)}"
    odd = [type(x).__name__ for x in jax.tree.leaves(stepped) if not isinstance(x, jax.Array | np.ndarray)]
    assert not odd, f"the state holds a leaf of type {odd[0]}; arrays only"
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(directory)
        checkpoints.save(0, stepped, {})
        restored, _ = checkpoints.restore(stepped)
        checkpoints.close()
    assert form(restored) == form(stepped), f"a checkpoint brings back {form(restored)} for {form(stepped)}"
    bits = [[np.asarray(x).tobytes() for x in jax.tree.leaves(s)] for s in (stepped, restored)]
    assert bits[0] == bits[1], "the state comes back from a checkpoint with other numbers"
    return f"{len(jax.tree.leaves(begin))} arrays"


def documented(case: Case) -> str:
    """The registry names a source and the docstring says the shapes."""
    if case.factory is None:
        raise NotChecked("it needs the function that builds the objective")
    assert case.source is None or case.source.strip(), "register it with a source: paper and arXiv id"
    said = inspect.getdoc(case.factory) or ""
    assert "Shapes" in said, "the docstring does not say the shapes ('Shapes: logp [B, T], ...')"
    return case.source or "not registered: docstring only"


CONTRACTS: tuple[Callable[[Case], str], ...] = (
    finite_on_hostile_input,
    padding_invariance,
    permutation_equivariance,
    count_is_multiplicity,
    microbatch_invariance,
    evaluate_agrees_with_training,
    mesh_invariance,
    gradient_only_into_the_policy,
    masked_positions_get_no_gradient,
    jit_equals_eager,
    vmap_over_hyperparameters,
    independent_replicas,
    float32_accumulation,
    needs_is_exact,
    state_survives_a_checkpoint,
    documented,
)


def check(
    objective: Subject,
    batch: Rollouts | None = None,
    /,
    *,
    contracts: Sequence[Callable[[Case], str]] | None = None,
    **hyperparameters: Any,
) -> Report:
    """Run every contract (or those of ``contracts``) on a registered objective, or on a user's own.

    Other arguments: as `case`. With 8 devices (``jax_num_cpu_devices``) the mesh is checked too.

    Raises:
      AssertionError: listing every contract that is broken, with the numbers.
    """
    subject = case(objective, batch, **hyperparameters)
    checked, skipped, broken = {}, {}, {}
    contracts = CONTRACTS if contracts is None else contracts
    for contract in contracts:
        try:
            checked[contract.__name__] = contract(subject)
        except NotChecked as reason:
            skipped[contract.__name__] = str(reason)
        except Exception as error:  # whatever an objective raises where it should compute is a broken contract
            line = str(error).strip().split("\n")[0]
            broken[contract.__name__] = line if isinstance(error, AssertionError) else f"{type(error).__name__}: {line}"
    if broken:
        lines = "".join(f"\n  {name}: {why}" for name, why in broken.items())
        raise AssertionError(f"{subject.name} breaks {len(broken)} of {len(contracts)} contracts:{lines}")
    return Report(subject.name, checked, skipped)
