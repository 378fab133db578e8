"""The contracts.

Each takes a `Case`, raises ``AssertionError`` with the numbers if it is broken, and returns one line about what it
compared.
"""

import inspect
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpo.batch import MissingField, Rollouts, TokenStats
from jaxpo.metrics import results
from jaxpo.objectives import evaluate
from jaxpo.objectives.grammar.base import standard_metrics
from jaxpo.objectives.precision import bound_of
from jaxpo.storage.checkpoint import Checkpoints
from jaxpo.testing.cases import (
    Case,
    NotChecked,
    Outcome,
    direct,
    leaves_of,
    not_finite,
    quick_jit,
    replicas,
    same,
    train,
)
from jaxpo.testing.examples import GROUP, bigram
from jaxpo.testing.float32 import apart
from jaxpo.testing.variants import as_dtype, bad_numbers, form, permutation, replaced, replica, stacked


def finite_on_hostile_input(case: Case) -> str:
    """Loss, gradient and metrics are finite on every extreme input."""
    inputs = {name: out for name, out in case.outcomes.items() if name.startswith("hostile: ")}
    inputs["bfloat16"] = case.narrow
    bad = [line for what, out in inputs.items() for line in not_finite(what.removeprefix("hostile: "), out)]
    assert not bad, "; ".join(bad)
    return f"{len(inputs)} hostile inputs"


def bad_numbers_are_refused(case: Case) -> str:
    """A reward of a counted row that is not finite, or another number that the objective reads of it, is an error that
    names the row; where nothing can be read, in a compiled function, the loss is NaN. It has no effect on rows of count
    0."""
    tried = 0
    for what, row, batch in bad_numbers(case):
        try:
            case.objective.prepare(jax.tree.map(jnp.asarray, batch), case.objective.init())
        except ValueError as error:
            assert f"row {row}" in str(error), f"{what}: the error does not name row {row}: {error}"
        else:
            raise AssertionError(f"{what} is accepted by prepare")
        loss = case.outcomes[what].loss
        assert np.isnan(loss), f"{what}: the compiled loss is {loss}"
        tried += 1
    a, b = case.outcomes["left out, with NaN"], case.outcomes["left out"]
    same("NaN in rows of count 0", a._replace(grads=a.grads[0]), b._replace(grads=b.grads[0]), 0)
    return f"{tried} numbers that are not finite"


def padding_invariance(case: Case) -> str:
    """More padding of T and P and more filler rows do not change loss, gradient or metrics."""
    b, t = case.batch.mask.shape
    out = case.grown["padded"]
    note = same("padded", _cropped(out, case), _cropped(case.base, case))

    def outside(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        x[(slice(b), slice(t)) if x.ndim > 1 else slice(b)] = 0
        return x

    added = jax.tree.map(outside, out.grads[0])
    same("gradient into padding", added, jax.tree.map(np.zeros_like, added), 0)
    return note


def _cropped(out: Outcome, case: Case) -> Outcome:
    """The outcome with only the gradient of the statistics, on the rows and tokens of the case's own batch."""
    b, t = case.batch.mask.shape
    own = jax.tree.map(lambda x, s: x[:b, :t] if s.shape[:2] == (b, t) else x[:b], out.grads[0], case.stats)
    return out._replace(grads=own)


def permutation_equivariance(case: Case) -> str:
    """Permuting rows (keeping units whole) leaves loss and metrics the same, and permutes the gradient."""
    rows, out = permutation(case), case.outcomes["permuted"]
    expected = case.base._replace(grads=jax.tree.map(lambda x: x[rows], case.base.grads[0]))
    return same("permuted", out._replace(grads=out.grads[0]), expected)


def count_is_multiplicity(case: Case) -> str:
    """A row of count 2 has the effect of the row written twice; rows of count 0 have no effect, whatever they hold."""
    a, b, r = case.outcomes["count 2"], case.outcomes["written twice"], case.unit
    together = jax.tree.map(lambda g: np.concatenate([g[:r] + g[r : 2 * r], 0 * g[:r], g[2 * r :]]), b.grads[0])
    note = same("count 2", a._replace(grads=a.grads[0]), b._replace(grads=together))
    return f"{note}; {same('count 0', _cropped(case.grown['count 0'], case), _cropped(case.base, case))}"


def microbatch_invariance(case: Case) -> str:
    """One slice, and one for each unit (or group, if groups are coupled), give the same loss, gradient and metrics."""
    batch, most = case.batch, case.units
    if case.objective.unit.coupling == "group":
        if batch.shared_prompt == 1:
            batch = batch.replace(shared_prompt=GROUP if case.unit == 1 else case.unit)
        most = batch.rows // batch.shared_prompt
    out = quick_jit(partial(train, case.objective, microbatches=most))(case.params, batch)
    return same(f"{most} slices", out, case.trained)


def evaluate_agrees_with_training(case: Case) -> str:
    """`evaluate` in a notebook and the training step compute the same loss and metrics."""
    return same("evaluated", case.base._replace(grads=()), case.trained._replace(grads=()))


def _mesh(case: Case, most: int = 8) -> jax.sharding.Mesh:
    devices = max(n for n in range(1, min(most, jax.device_count()) + 1) if case.units % n == 0)
    if devices < 2:
        raise NotChecked(f"{jax.device_count()} device(s) and {case.units} units")
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def mesh_invariance(case: Case) -> str:
    """One device, and up to 8 devices that divide the units, give the same loss, gradient and metrics."""
    mesh = _mesh(case)
    batch = jax.device_put(case.batch, NamedSharding(mesh, PartitionSpec("data")))
    params = jax.device_put(case.params, NamedSharding(mesh, PartitionSpec()))
    return same(f"{mesh.size} devices", quick_jit(partial(train, case.objective))(params, batch), case.trained)


def independent_replicas(case: Case) -> str:
    """Replicas with their own policies and batches, run by vmap on several devices, each give what they give alone."""
    alone = direct(case.objective, *jax.tree.map(jnp.asarray, replica(case)))
    what = f"vmap over {len(case.outcomes)} on {replicas()} device(s)"
    return same(what, case.outcomes["replica"], alone)


def gradient_only_into_the_policy(case: Case) -> str:
    """The derivative with respect to every float of the batch is exactly 0."""
    into = {path: x for path, x in leaves_of(case.base.grads[1]).items()}
    bad = [f"{path[1:]} gets a gradient of {np.abs(x).max():.3g}" for path, x in into.items() if np.any(x != 0)]
    assert not bad, "; ".join(bad)
    return f"{len(into)} fields"


def masked_positions_get_no_gradient(case: Case) -> str:
    """The gradient is exactly 0 at masked positions, but not everywhere."""
    masked = np.asarray(case.batch.mask) == 0
    leaves = {path: x for path, x in leaves_of(case.base.grads[0]).items() if x.shape[:2] == masked.shape}
    for path, x in leaves.items():
        assert not np.any(x[masked]), f"{path[1:]} has a gradient of {np.abs(x[masked]).max():.3g} at masked positions"
    assert any(np.any(x) for x in leaves_of(case.base.grads[0]).values()), "the gradient is 0 everywhere"
    return f"{masked.sum()} masked positions of {', '.join(path[1:] for path in leaves)}"


def jit_equals_eager(case: Case) -> str:
    """Compiled and eager evaluation give the same loss, gradient and metrics."""
    return same("eager", case.eager, case.base)


def vmap_over_hyperparameters(case: Case) -> str:
    """An objective built from traced numbers inside vmap gives the same as a loop over the numbers.

    Every hyperparameter annotated ``float`` is tried, with its value and with another one. It is left out if the
    function refuses the change (``ValueError``: without effect in this setting, or in conflict). A function that
    accepts a number but fails on a traced one breaks the contract.
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
    notes, left = [], given + absent
    while changed := _accepted(case, left, now):
        start = {n: changed[n] if now[n] is None else now[n] for n in changed}
        notes.append(_vmap_equals_loop(case, start, changed))
        # A hyperparameter that is None by default often conflicts with a given one: try the refused ones by themselves.
        left = [n for n in absent if n in left and n not in changed]
    return "; ".join(notes) or "no hyperparameter is a float"


def _accepted(case: Case, names: list[str], now: Mapping[str, Any]) -> dict[str, float]:
    """A new value for each hyperparameter that accepts one together with the new values found before it."""
    changed: dict[str, float] = {}
    for name in names:
        tries = (0.5, 2.0) if now[name] is None else (now[name] * 1.25 if now[name] else 0.1,)
        for value in tries:
            try:
                built = case.factory(**{**case.hyperparameters, **changed, name: float(value)})
            except ValueError:
                continue
            if built.asks.rewards != case.objective.asks.rewards:  # the example's rewards may be out of the new range
                continue
            changed[name] = float(value)
            break
    return changed


def _vmap_equals_loop(case: Case, start: Mapping[str, float], changed: Mapping[str, float]) -> str:
    stats, batch, asks = case.stats, case.batch, case.objective.asks
    whole = case.factory(**{**case.hyperparameters, **changed}).asks
    more = bool((whole.wants | whole.peeks) - (asks.wants | asks.peeks))
    if more:  # a number that is 0 by default, such as an entropy bonus, asks for nothing until it is another one
        stats = bigram(case.objective, asks.wants | asks.peeks | whole.wants | whole.peeks, case.params, batch)

    def run(numbers: Mapping[str, Any]) -> tuple[Array, TokenStats]:
        objective = case.factory(**{**case.hyperparameters, **numbers})
        return jax.value_and_grad(lambda stats: evaluate(objective, lambda _: stats, batch)[0])(stats)

    settings = [start, {name: 1.1 * x if x == start[name] else x for name, x in changed.items()}]
    columns = {name: jnp.array([s[name] for s in settings], jnp.float32) for name in changed}
    alone = [
        (case.eager.loss, case.eager.grads[0]) if _is_built(case, start) and not more else run(start),
        run(settings[1]),
    ]
    return same(f"vmap over {', '.join(changed)}", quick_jit(jax.vmap(run))(columns), stacked(alone))


def _is_built(case: Case, numbers: Mapping[str, float]) -> bool:
    """Whether the case's objective was built with these numbers."""
    default = inspect.signature(case.factory).parameters
    return all(case.hyperparameters.get(name, default[name].default) == x for name, x in numbers.items())


def float32_accumulation(case: Case) -> str:
    """bfloat16 arrays give the loss and metrics of the same numbers in float32, and the same gradient, rounded."""
    a, b = case.narrow, case.outcomes["rounded"]
    assert jnp.finfo(a.loss.dtype).bits >= 32, f"the loss of bfloat16 inputs is {a.loss.dtype}"
    note = same("bfloat16", a._replace(grads=()), b._replace(grads=()), 1e-5)
    scale = {path: max(np.abs(x).max(), 1e-30) for path, x in leaves_of(b.grads[0]).items()}
    x, y = ({path: x / scale[path] for path, x in leaves_of(out.grads[0]).items()} for out in (a, b))
    same("gradient of bfloat16", x, y, 2.0**-8)
    return note


def float32_agrees_with_float64(case: Case) -> str:
    """float32 gives the loss and gradient of float64, up to the bound that the objective states
    (`jaxpo.objectives.precision`)."""

    def arrays(loss: Array, grads: TokenStats) -> tuple[np.ndarray, list[np.ndarray]]:
        return np.asarray(loss), [np.asarray(x) for x in jax.tree.leaves(grads)]

    with jax.enable_x64(True):
        objective = case.objective if case.factory is None else case.factory(**case.hyperparameters)
        stats, batch = jax.tree.map(jnp.asarray, as_dtype(case.arrays, np.float64))
        exact = jax.value_and_grad(lambda stats: evaluate(objective, lambda _: stats, batch)[0])(stats)
        error = apart(arrays(case.eager.loss, case.eager.grads[0]), arrays(*exact))
    bound = bound_of(case.name, registered=case.source is not None).error
    assert error <= bound, f"float32 is {error:.1e} from float64, and the bound is {bound:g}"
    return f"float32: error {error:.1e}, bound {bound:g}"


def needs_is_exact(case: Case) -> str:
    """``needs`` is exact: nothing is missing and nothing is unused.

    An error names each field of ``needs`` that is missing; each has an effect; and no other field is needed, except
    tokens and mask.
    """
    objective, batch = case.objective, case.batch
    for name in sorted(objective.asks.needs):
        try:
            jax.eval_shape(objective.prepare, _without(batch, name), objective.init())
        except MissingField as error:
            assert error.field == name, f"without {name!r} the error names {error.field!r}"
        else:
            raise AssertionError(f"{name!r} is in needs, but a batch without it is accepted")
    least = batch
    for name in set(batch.fields()) - {"tokens", "mask"} - objective.asks.needs:
        least = _without(least, name)
    try:
        jax.eval_shape(lambda stats, batch: evaluate(objective, lambda _: stats, batch)[0], case.stats, least)
    except (MissingField, AttributeError, TypeError) as error:
        raise AssertionError(
            f"with needs {sorted(objective.asks.needs)} alone: {type(error).__name__}: {error}"
        ) from error
    prepared, _ = jax.eval_shape(objective.prepare, batch, objective.init())
    seen = prepared.replace(logp_old=case.stats.logp)
    standard = jax.eval_shape(lambda batch: results(standard_metrics(case.stats, batch)), seen)

    def effects(what: str) -> dict[str, np.ndarray]:
        """Results of the first iteration, and of the second, where the objective may remember the first."""
        outs = []
        for name in ((what or "as it is"), f"later {what}".strip()):
            if name in case.outcomes:
                out = case.outcomes[name]
                own = {n: x for n, x in out.metrics.items() if n not in standard}  # not reported by all
                outs.append(out._replace(grads=out.grads[0], metrics=own))
        return leaves_of(outs)

    before = effects("")
    for name in sorted(objective.asks.needs):
        after = effects(f"without {name}")
        changed = any(not np.array_equal(after[path], before[path]) for path in before)
        assert changed, f"{name!r} is in needs, but neither loss, gradient nor a metric of its own depends on it"
    return f"needs {', '.join(sorted(objective.asks.needs)) or 'nothing'}"


def _without(batch: Rollouts, name: str) -> Rollouts:
    return replaced(batch, name, None)


def state_survives_a_checkpoint(case: Case) -> str:
    """The state is a pytree of arrays of fixed form, counts iterations and steps, and survives a checkpoint bitwise."""
    objective = case.objective
    begin = objective.init()
    prepared, stepped = case.stepped
    clock = [(int(s.iteration), int(s.step)) for s in (begin, prepared, stepped)]
    expected = [(-1, 0), (0, 0), (0, 1)]
    assert clock == expected, f"(iteration, step) after init, prepare, update is {clock} instead of {expected}"
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
    """The registry names a source, and the docstring states the shapes."""
    if case.factory is None:
        raise NotChecked("it needs the function that builds the objective")
    assert case.source is None or case.source.strip(), "register it with a source: paper and arXiv id"
    said = inspect.getdoc(case.factory) or ""
    assert "Shapes" in said, "the docstring does not state the shapes ('Shapes: logp [B, T], ...')"
    return case.source or "not registered: docstring only"


CONTRACTS: tuple[Callable[[Case], str], ...] = (
    finite_on_hostile_input,
    bad_numbers_are_refused,
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
    float32_agrees_with_float64,
    needs_is_exact,
    state_survives_a_checkpoint,
    documented,
)
