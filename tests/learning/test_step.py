"""One optimizer step: what is accumulated, and what is skipped without a trace."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpo.batch import Rollouts, TokenStats
from jaxpo.learning.optimizers import by_label, labels
from jaxpo.learning.step import accumulate, moved_share, optimizer_step, score
from jaxpo.metrics import results
from jaxpo.objectives import Asks, Term, from_terms, linearized, make
from jaxpo.objectives.grammar.base import Hooks, Unit

B, T = 8, 3
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T)), jnp.float32)
PARAMS = {"w": jnp.array([0.7, -0.2, -0.0]), "frozen": jnp.arange(2)}


def nll(stats, batch, state):
    return -stats.logp


def remembering(**unit):
    """An objective with a memory that every step changes."""

    def count(state, batch, report):
        return state.replace(memory={"seen": state.memory["seen"] + results(report)["tokens"]})

    return from_terms([Term("nll", nll)], hooks=Hooks({"seen": jnp.float32(0)}, update=count), unit=Unit(**unit))


def rollouts(**fields):
    return Rollouts(mask=jnp.ones((B, T)), per_row={"x": X}).replace(**fields)


def linear(params, batch):
    return TokenStats(logp=batch.per_row["x"] * params["w"])


def make_step(objective, apply=linear, optimizer=None, **options):
    """(params, opt_state, state, batch) -> (params, opt_state, state, metrics), jitted, with the start of each."""
    optimizer = optimizer or optax.adam(0.1)
    params = {"w": PARAMS["w"]}

    @jax.jit
    def step(params, opt_state, state, batch):
        batch, state = objective.prepare(batch, state)
        return optimizer_step(objective, apply, optimizer, params, opt_state, state, batch, **options)

    return step, params, optimizer.init(params), objective.init()


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def test_a_step_moves_parameters_optimizer_and_state():
    step, *before = make_step(remembering(), optimizer=optax.sgd(0.5))
    params, opt_state, state, metrics = step(*before, rollouts())
    gradient = -X.sum(0) / (B * T)
    np.testing.assert_allclose(params["w"], PARAMS["w"] - 0.5 * gradient, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], -jnp.mean(X * PARAMS["w"]), rtol=1e-6)
    assert (int(state.iteration), int(state.step), float(state.memory["seen"])) == (0, 1, B * T)
    assert metrics["step/nonfinite"] == 0 and metrics["step/empty"] == 0
    assert all(v.dtype == jnp.float32 and v.shape == () for v in metrics.values())


def root(params, batch):
    """Finite log-probs with a gradient that is not: the root has an infinite slope at 0."""
    return TokenStats(logp=batch.per_row["x"] * jnp.sqrt(batch.per_row["gate"][:, None] * (1 + params["w"] ** 2)))


BAD = {
    "a loss of NaN": (linear, {"x": X.at[3, 1].set(jnp.nan)}),
    "a loss of inf": (linear, {"x": X.at[3, 1].set(jnp.inf)}),
    "only the gradient": (root, {"x": X, "gate": jnp.zeros(B)}),
}


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("why", BAD)
def test_a_step_that_is_not_finite_is_skipped_whole(why, microbatches):
    apply, per_row = BAD[why]
    step, *start = make_step(remembering(), apply, microbatches=microbatches)
    good = {**per_row, "x": X, **({"gate": jnp.ones(B)} if "gate" in per_row else {})}
    *moved, metrics = step(*start, rollouts(per_row=good))
    assert bits(moved) != bits(start) and metrics["step/nonfinite"] == 0
    params, opt_state, state, metrics = step(*moved, rollouts(per_row=per_row))
    assert metrics["step/nonfinite"] == 1 and metrics["step/empty"] == 0
    assert np.isfinite(metrics["loss"]) == (why == "only the gradient") and not np.isfinite(metrics["grad_norm"])
    assert bits((params, opt_state)) == bits(moved[:2])
    assert bits((state.step, state.memory)) == bits((moved[2].step, moved[2].memory))
    assert int(state.iteration) == 1, "prepare counted the rollouts, which did come"


@pytest.mark.parametrize("nothing", [{"count": jnp.zeros(B)}, {"mask": jnp.zeros((B, T))}])
def test_a_step_without_weight_is_skipped_with_its_optimizer(nothing):
    step, *start = make_step(remembering())
    *moved, _ = step(*start, rollouts())
    optimizer = optax.adam(0.1)
    drifted = optimizer.update({"w": jnp.zeros(3)}, moved[1], moved[0])[0]
    assert np.any(drifted["w"]), "Adam moves on a gradient of zero, so that skipping has to be explicit"
    params, opt_state, state, metrics = step(*moved, rollouts(**nothing))
    assert metrics["step/empty"] == 1 and metrics["step/nonfinite"] == 0
    assert bits((params, opt_state, state.step, state.memory)) == bits((*moved[:2], moved[2].step, moved[2].memory))


def test_the_center_of_a_linearized_term_is_no_weight():
    objective = from_terms([linearized(Term("nll", nll), lambda s: s + 1.0)])
    step, *start = make_step(objective)
    assert step(*start, rollouts(count=jnp.zeros(B)))[-1]["step/empty"] == 1


def test_one_weighted_token_is_enough():
    step, *start = make_step(remembering())
    params, _, _, metrics = step(*start, rollouts(mask=jnp.zeros((B, T)).at[5, 2].set(1)))
    assert metrics["step/empty"] == 0 and bits(params) != bits(start[0])


# ---- optimizers by label

BOTH = {"w": PARAMS["w"], "heads": {"value": {"bias": jnp.float32(0.3)}, "score": {"bias": jnp.float32(0.1)}}}


def with_value(params, batch):
    value = batch.per_row["x"] * params["w"] + params["heads"]["value"]["bias"]
    return TokenStats(logp=batch.per_row["x"] * params["w"], value=value)


def policy_and_critic(policy=1.0, critic=1.0):
    """A policy's and a critic's term whose tokens have these weights."""

    def square(stats, batch, state):
        return jnp.square(stats.value)

    of_policy = Term("nll", nll, tokens=lambda batch, state: policy * batch.mask)
    of_critic = Term(
        "value",
        square,
        tokens=lambda batch, state: critic * batch.mask,
        asks=Asks(wants=frozenset({"value"})),
        trains="critic",
    )
    return from_terms([of_policy, of_critic])


def step_of_both(objective, params=BOTH, opt_state=None):
    optimizer = by_label({"policy": optax.adamw(0.1), "critic": optax.adam(0.01)})
    opt_state = optimizer.init(params) if opt_state is None else opt_state
    batch, state = objective.prepare(rollouts(), objective.init())
    return optimizer_step(objective, with_value, optimizer, params, opt_state, state, batch)


def of_label(tree, label):
    return [x for x, own in zip(jax.tree.leaves(tree), jax.tree.leaves(labels(tree)), strict=True) if own == label]


def test_the_value_head_is_the_critics():
    assert labels(BOTH) == {"w": "policy", "heads": {"value": {"bias": "critic"}, "score": {"bias": "policy"}}}


def test_each_label_has_its_own_optimizer():
    params, _, _, _ = step_of_both(policy_and_critic())
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), params, BOTH)
    np.testing.assert_allclose(moved["heads"]["value"]["bias"], 0.01, rtol=1e-3)  # Adam's first step is its rate
    assert moved["w"] > 0.09


@pytest.mark.parametrize(("idle", "weights"), (("critic", dict(critic=0.0)), ("policy", dict(policy=0.0))))
def test_a_label_without_weight_keeps_its_parameters_and_its_optimizers_state(idle, weights):
    params, opt_state, _, _ = step_of_both(policy_and_critic())  # so that moments and weight decay would move them
    again, later, state, metrics = step_of_both(policy_and_critic(**weights), params, opt_state)
    busy = {"critic": "policy", "policy": "critic"}[idle]
    assert bits(of_label(again, idle)) == bits(of_label(params, idle))
    assert bits(of_label(again, busy)) != bits(of_label(params, busy))
    inner = [x.inner_states for x in (opt_state, later)]
    for label, same in ((idle, True), (busy, False)):
        before, after = (bits(x[label].inner_state.inner_state) for x in inner)
        assert (before == after) is same
    assert metrics["step/empty"] == 0 and int(state.step) == 1


def test_a_step_in_which_no_label_has_weight_is_empty():
    params, opt_state, _, metrics = step_of_both(policy_and_critic(policy=0.0, critic=0.0))
    assert bits(params) == bits(BOTH) and metrics["step/empty"] == 1


def test_gradients_of_bfloat16_parameters_are_added_in_float32():
    """One slice with a gradient of 1 and fifteen of 2^-9, each of which bfloat16 would lose beside the 1."""
    x = jnp.full((16, 1), -(2.0**-9)).at[0].set(-1)
    batch = Rollouts(mask=jnp.ones((16, 1)), per_row={"x": x})
    objective = from_terms([Term("nll", nll, make("sum_const", "aggregation", L_const=1.0))])
    batch, state = objective.prepare(batch, objective.init())
    batch = objective.weigh(batch, state, None)
    _, grads, _ = accumulate(objective, linear, {"w": jnp.ones(1, jnp.bfloat16)}, batch, state, microbatches=16)
    assert grads["w"].dtype == jnp.bfloat16
    assert grads["w"] == jnp.asarray([1 + 15 / 512], jnp.bfloat16) and grads["w"] > 1


@pytest.mark.parametrize(("rate", "moved"), [(1e-5, 0.0), (0.3, 1.0)])
def test_the_share_of_bfloat16_parameters_that_moved(rate, moved):
    """Beside 1, bfloat16 has steps of 1/128 and 1/256: half of the smaller one is the least update that moves it."""
    step, _, _, state = make_step(from_terms([Term("nll", nll)]), optimizer=optax.sgd(rate))
    half = {"w": jnp.ones(3, jnp.bfloat16)}
    params, *_, out = step(half, optax.sgd(rate).init(half), state, rollouts())
    assert out["update/moved_frac"] == moved == np.mean(np.asarray(params["w"] != half["w"]))
    whole = {"w": jnp.ones(3)}
    assert "update/moved_frac" not in step(whole, optax.sgd(rate).init(whole), state, rollouts())[3]


def test_what_no_update_asks_to_move_counts_neither_way():
    old = {"a": jnp.ones(4, jnp.bfloat16), "b": jnp.ones(9), "n": jnp.ones(3, jnp.int8)}
    updates = {"a": jnp.array([0.5, 1e-4, 0, 0], jnp.bfloat16), "b": jnp.ones(9), "n": jnp.zeros(3, jnp.int8)}
    assert moved_share(old, updates, optax.apply_updates(old, updates))["update/moved_frac"] == 0.5
    nothing = jax.tree.map(jnp.zeros_like, updates)
    assert moved_share(old, nothing, old)["update/moved_frac"] == 1


def test_accumulates_on_every_device_by_itself():
    """Replicas with parameters of their own, one a device, each adding up its slices."""
    objective = remembering()
    mesh = jax.make_mesh((4,), ("replica",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    one, all_of_it = jax.sharding.PartitionSpec("replica"), jax.sharding.PartitionSpec()

    def loss_and_grad(w, batch):
        batch, state = objective.prepare(batch, objective.init())
        batch = objective.weigh(batch, state, None)
        value, grads, _ = accumulate(objective, linear, {"w": w[0]}, batch, state, microbatches=2)
        return value[None], grads["w"][None]

    w = jnp.arange(12.0).reshape(4, 3)
    each = jax.shard_map(loss_and_grad, mesh=mesh, in_specs=(one, all_of_it), out_specs=one)
    loss, grads = jax.jit(each)(w, rollouts())
    np.testing.assert_allclose(loss, -jnp.mean(X * w[:, None], (1, 2)), rtol=1e-6)
    np.testing.assert_allclose(grads, jnp.tile(-X.sum(0) / (B * T), (4, 1)), rtol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 8])
def test_score_in_slices_is_score_without_gradient(n):
    got = score(linear, PARAMS, rollouts(), microbatches=n)
    np.testing.assert_array_equal(got.logp, X * PARAMS["w"])
    slope = jax.grad(lambda w: score(linear, {"w": w}, rollouts(), microbatches=n).logp.sum())(PARAMS["w"])
    assert not np.any(slope)


def count_calls(objective, batch, **options):
    """One step, and the rows of every call that traced the policy in it."""
    calls = []

    def apply(params, part):
        calls.append(part.rows)
        return linear(params, part)

    step, *start = make_step(objective, apply, **options)
    return step(*start, batch), calls


def test_the_peek_is_free_while_the_parameters_are_those_that_scored():
    objective = from_terms([linearized(Term("nll", nll), jnp.square)])
    batch = rollouts(logp_old=X * PARAMS["w"])
    looked, twice = count_calls(objective, batch)
    free, once = count_calls(objective, batch, fresh=True)
    assert (len(twice), len(once)) == (2, 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), looked, free)


def test_a_fresh_peek_without_what_it_needs_is_taken():
    objective = from_terms([linearized(Term("nll", nll), jnp.square)])
    assert len(count_calls(objective, rollouts(), fresh=True)[1]) == 2, "there is no logp_old to read it from"
    assert len(count_calls(remembering(), rollouts())[1]) == 1, "an objective that does not peek costs one pass"


@pytest.mark.parametrize(
    ("objective", "batch", "n", "message"),
    [
        (remembering(), rollouts(), 3, "8 rows in units of 1 cannot be cut into 3 equal slices"),
        (
            remembering(coupling="group"),
            rollouts(shared_prompt=4),
            4,
            "4 microbatches cut groups of 4 rows, which this objective must see whole",
        ),
        (
            remembering(layout=("chosen", "rejected")),
            rollouts(layout=("chosen", "rejected")),
            8,
            "in units of 2 cannot be cut into 8",
        ),
    ],
)
def test_slices_that_cut_what_belongs_together_are_refused(objective, batch, n, message):
    step, *start = make_step(objective, microbatches=n)
    with pytest.raises(ValueError, match=message):
        step(*start, batch)


@pytest.mark.parametrize(("coupling", "shared", "n"), [("group", 4, 2), ("row", 4, 8), ("group", 2, 4)])
def test_slices_of_whole_groups_pass(coupling, shared, n):
    step, *start = make_step(remembering(coupling=coupling), microbatches=n)
    whole, *_ = make_step(remembering(coupling=coupling))
    got, expected = (s(*start, rollouts(shared_prompt=shared))[-1] for s in (step, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)


def test_groups_of_unknown_rows_are_not_cut():
    """``shared_prompt`` 1 says nothing of groups (rows were shuffled, say), so no slice is known to hold whole ones."""
    step, *start = make_step(remembering(coupling="group"), microbatches=4)
    with pytest.raises(ValueError, match="must see whole"):
        step(*start, rollouts(group=jnp.arange(B) % 2))
