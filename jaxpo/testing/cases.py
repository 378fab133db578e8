"""Cases: an objective with a small example batch, a policy of two tables, and the two ways to evaluate it."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpo import registry
from jaxpo.batch import Rollouts, TokenStats, complete, pad
from jaxpo.fields import role_id
from jaxpo.learning.step import accumulate, score
from jaxpo.metrics import results
from jaxpo.objectives import Objective, evaluate

Subject = str | Objective | Callable[..., Objective]
VOCABULARY, PROMPT, WIDTH, GROUP = 7, 3, 6, 4
TOKEN_FIELDS = ("logp_old", "logp_beh", "entropy_old", "value_old", "per_token")
# Contracts compile much and compute little: quick compilation halves their time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
quick_jit = partial(jax.jit, compiler_options=QUICK)


class NotChecked(Exception):
    """A contract does not apply to this case; the message says why."""


class Outcome(NamedTuple):
    """What one evaluation gives: a scalar, gradients (a tree), metrics by name."""

    loss: Array
    grads: Any
    metrics: dict[str, Array]


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
        return quick_jit(partial(bigram, self.objective, self.objective.asks.wants | self.objective.asks.peeks))(
            self.params, self.batch
        )

    @cached_property
    def direct(self) -> Callable[..., Outcome]:
        """Jitted `direct` of the objective: (stats, batch, state of the objective = the initial one) -> `Outcome`."""
        compiled, begin = quick_jit(partial(direct, self.objective)), self.objective.init()

        def call(stats: TokenStats, batch: Rollouts, state: Any = begin) -> Outcome:
            return compiled(stats, batch, jax.tree.map(np.asarray, state))  # one program for states of one form

        return call

    @cached_property
    def base(self) -> Outcome:
        """`direct` on the example as it is."""
        return self.direct(self.stats, self.batch)

    @cached_property
    def train(self) -> Callable[[dict[str, Array], Rollouts], Outcome]:
        """Jitted `train` of the objective."""
        return quick_jit(partial(train, self.objective))

    @cached_property
    def trained(self) -> Outcome:
        """`train` on the example as it is."""
        return self.train(self.params, self.batch)

    @cached_property
    def stepped(self) -> tuple[Any, Any]:
        """The objective's state after ``prepare``, and after the first optimizer step."""
        objective, stats = self.objective, self.stats

        def step(batch: Rollouts) -> tuple[Any, Any]:
            batch, state = objective.prepare(batch, objective.init())
            batch = objective.weigh(batch, state, stats if objective.asks.peeks else None)
            return state, objective.update(state, batch, objective.loss(lambda _: stats, batch, state)[1])

        return quick_jit(step)(self.batch)

    @property
    def unit(self) -> int:
        """Rows that make one unit of the objective's layout."""
        return max(len(self.objective.unit.layout), 1)

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
        hyperparameters = {**row.of_run(WIDTH, 10), **hyperparameters}
    registry.check_arguments(f"objective {name!r}", hyperparameters, inspect.signature(factory).parameters)
    built = factory(**hyperparameters)
    batch = example(built) if batch is None else complete(batch)
    return Case(name, built, batch, factory, hyperparameters, row.source if row else None)


def example(objective: Objective) -> Rollouts:
    """A small batch with every field the objective may read: groups of 4 (or units), holes in the mask, no ties.

    Raises:
      ValueError: the objective needs a field that is no field of `Rollouts`; bring a batch that has it.
    """
    rng, unit = np.random.default_rng(0), max(len(objective.unit.layout), 1)
    b = 8 * unit * max(1, 16 // (8 * unit))
    lengths = np.resize([WIDTH, 3, 5, 1, 4, 6, 2], b)
    mask = (np.arange(WIDTH) < lengths[:, None]).astype(np.float32)
    mask[::3, 1] = 0  # a hole: a token that the policy did not write

    def logp() -> np.ndarray:
        return rng.normal(-2, 0.5, (b, WIDTH)).astype(np.float32)

    per_row = {
        "rewards_multi": rng.uniform(size=(b, 3)),
        "tracker_value": rng.uniform(size=b),
        "edge_adv": rng.normal(size=b),
        "mc_value": rng.uniform(size=(b, WIDTH)),
    }
    per_row |= preference_extras(b)
    known = {"logp", *Rollouts.__dataclass_fields__, *per_row}
    strange = sorted(n for n in objective.asks.needs if n not in known and not n.startswith("logp_"))
    if strange:
        raise ValueError(f"no example of {strange[0]!r}, which this objective needs: give check a batch that has it")
    group = np.arange(b, dtype=np.int32) // (GROUP if unit == 1 else unit)
    roles = [
        role_id(r)
        for r in objective.unit.layout or (("own", "own", "own", "kl") if "label" in objective.asks.needs else ("own",))
    ]
    batch = Rollouts(
        tokens=rng.integers(0, VOCABULARY, (b, PROMPT + WIDTH)).astype(np.int32),
        mask=mask,
        prompt_length=rng.integers(1, PROMPT + 1, b).astype(np.int32),
        count=np.ones(b, np.float32),
        group=97 - 5 * group,
        role=np.resize(roles, b).astype(np.int32),
        prompt=group,
        seed=rng.integers(0, 2**32, b, dtype=np.uint32),
        reward=allowed(objective, rng.normal(size=b).astype(np.float32)),
        correct=np.resize([0, 1, 1, 0], b).astype(np.float32),
        truncated=(lengths == WIDTH).astype(np.float32),
        entropy_old=rng.uniform(0, 1, (b, WIDTH)).astype(np.float32),
        value_old=logp(),
        layout=objective.unit.layout,
    )
    # The first row, which `count_is_multiplicity` doubles, is at the end of its group's order.
    batch.entropy_old[:] *= np.resize([0.1, 1, 0.4, 0.7], b)[:, None]
    batch = jax.tree.map(jnp.asarray, batch)
    slots = {n.removeprefix("logp_") for n in objective.asks.needs if n.startswith("logp_")} - {"old", "beh"}
    said = bigram(objective, frozenset({"logp"}), parameters(), batch).logp

    def near(x: Array, scale: float) -> Array:
        return x + jnp.asarray(rng.normal(0, scale, x.shape), jnp.float32)

    old = near(said, 0.3)  # some ratios are clipped and some are not
    asked = {n: jnp.asarray(x, jnp.float32) for n, x in per_row.items() if n in objective.asks.needs}
    per_token = {n: x for n, x in asked.items() if x.shape == batch.mask.shape}
    return complete(
        batch.replace(
            logp_old=old,
            logp_beh=near(old, 0.01),
            per_row={n: x for n, x in asked.items() if n not in per_token},
            per_token={
                "logp_sampler": near(old, 0.01),
                **per_token,
                **{f"logp_{name}": near(said, 0.5) for name in sorted(slots | {"ref"})},
            },
        )
    )


def preference_extras(b: int) -> dict[str, np.ndarray]:
    """What preference objectives ask for besides: win rates, labels, scores, weights and kinds of tokens."""
    rng = np.random.default_rng(2)
    return {
        "label": np.resize([1, 0, 0, 1, 0, 1], b),
        **{name: rng.uniform(size=b) for name in ("win", "pref_prob", "pref_opp")},
        **{name: rng.normal(size=b) for name in ("rm", "pref_score", "margin")},
        **{name: rng.normal(size=(b, 3)) for name in ("cand_scores", "adapter_logits", "obj_scores")},
        "rm_scores": rng.normal(size=(b, 2)),
        **{name: rng.uniform(0.5, 3, (b, WIDTH)) for name in ("severity", "relevance")},
        "segment": rng.integers(0, 4, (b, WIDTH)),
        **{name: rng.normal(size=(b, 2)) for name in ("pos_ll", "neg_ll")},
        **{name: rng.normal(size=b) for name in ("rel_query", "rel_answer")},
        "open_ended": np.resize([1, 0, 0], b),
        "num_words": rng.integers(1, 9, b),
        "num_tri": np.resize([4, 0, 6], b),
        "uniq_tri": np.resize([3, 0, 5], b),
        "likert": rng.integers(1, 6, b),
        "choice": rng.integers(-1, 3, b),
        "satisfies": rng.integers(0, 2, (b, 3)),
        "cost": rng.uniform(1, 3, (b, 3)),
    }


def parameters() -> dict[str, Array]:
    """Parameters of the policy `bigram`."""
    rng = np.random.default_rng(1)
    shapes = {"table": (VOCABULARY, VOCABULARY), "head": (VOCABULARY,)}
    scale = {"table": 6, "head": 1}  # some tokens are all but certain and some all but impossible
    return {name: jnp.asarray(scale[name] * rng.normal(size=x), jnp.float32) for name, x in shapes.items()}


def allowed(objective: Objective, reward: Array) -> Array:
    """The rewards, squeezed in their order into the range that the objective is defined for."""
    if objective.asks.rewards is None:
        return reward
    low, high = objective.asks.rewards
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
        "embed": jnp.sum(logits * (batch.mask > 0)[..., None], 1)[:, :4],
        "gate": logits[:, 0, :2],
    }
    flat = logits.reshape(-1, VOCABULARY), batch.completions.reshape(-1)
    derived = {n: f(*flat).reshape(batch.mask.shape) for n, f in objective.asks.derived.items() if n in wants}
    return TokenStats(**{name: said[name] for name in wants - set(derived)}, derived=derived)


# ---- the two ways to evaluate --------------------------------------------------------------------------------------


def direct(objective: Objective, stats: TokenStats, batch: Rollouts, state: Any = None) -> Outcome:
    """`evaluate` of plain arrays; ``grads`` is (gradient into them, gradient into every float of the batch)."""
    floats = jax.tree.map(lambda x: x if is_float(x) else None, batch)

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
    if objective.asks.peeks:
        peek = score(partial(bigram, objective, objective.asks.peeks), params, batch, microbatches=microbatches)
    batch = objective.weigh(batch, state, peek)
    apply = partial(bigram, objective, objective.asks.wants)
    value, grads, report = accumulate(objective, apply, params, batch, state, microbatches=microbatches)
    return Outcome(value, grads, results(report))


def is_float(x: Array) -> bool:
    return jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)


def leaves_of(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(x, np.float64) for path, x in leaves}


def same(what: str, got: Any, expected: Any, tolerance: float = 1e-6) -> str:
    """Compare two trees leaf by leaf; the error names the worst leaf, the note tells the largest difference.

    Differences are taken relative to the largest entry of the leaf where that is above 1.
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


def grow(batch: Rollouts, rows: int) -> Rollouts:
    """Padded by fixed amounts in width, so that two contracts share one compilation."""
    return pad(batch, rows=rows, width=batch.width + 3, prompt_width=batch.prompt_width + 2)


def pad_stats(stats: TokenStats, batch: Rollouts, value: float) -> TokenStats:
    """The statistics of a grown batch: ``value`` on everything that was added."""
    b, t = stats.logp.shape

    def grow(x: Array) -> Array:
        widths = [(0, batch.rows - b), *[(0, 0)] * (x.ndim - 1)]
        if x.shape[:2] == (b, t):
            widths[1] = (0, batch.width - t)
        return jnp.pad(x, widths, constant_values=value)

    return jax.tree.map(grow, stats)


def where_masked(tree: Any, mask: Array, value: float) -> Any:
    """``value`` at the masked positions of every [B, T, ...] float array."""

    def fill(x: Array) -> Array:
        if not is_float(x) or x.shape[:2] != mask.shape:
            return x
        return jnp.where((mask > 0).reshape(*mask.shape, *[1] * (x.ndim - 2)), x, value)

    return jax.tree.map(fill, tree)
