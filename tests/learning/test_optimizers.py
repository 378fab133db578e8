"""optax by name: schedules at their corners, clipping, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpo.learning.optimizers import (
    OPTIMIZERS,
    SCHEDULES,
    make_optimizer,
    make_schedule,
    optimizer_arguments,
    schedule_arguments,
)

CONSTANT = {"name": "constant", "warmup_steps": 0}
PARAMS = {"up": jnp.full((3, 4), 0.5), "down": jnp.full((3, 4), -0.5)}


def config(name="sgd", learning_rate=0.1, clip_norm=None, schedule=CONSTANT, **arguments):
    return dict(name=name, learning_rate=learning_rate, clip_norm=clip_norm, schedule=schedule, **arguments)


@pytest.mark.parametrize(
    ("schedule", "at"),
    (
        ({"name": "constant"}, {0: 2, 99: 2}),
        ({"name": "constant", "warmup_steps": 10}, {0: 0, 5: 1, 10: 2, 99: 2}),
        ({"name": "linear"}, {0: 2, 50: 1, 100: 0}),
        ({"name": "linear", "end_share": 0.5}, {0: 2, 50: 1.5, 100: 1, 200: 1}),
        ({"name": "linear", "warmup_steps": 20}, {0: 0, 10: 1, 20: 2, 60: 1, 100: 0}),
        ({"name": "cosine"}, {0: 2, 50: 1.1, 100: 0.2, 200: 0.2}),
        ({"name": "cosine", "end_share": 0.0, "warmup_steps": 20}, {0: 0, 10: 1, 20: 2, 60: 1, 100: 0}),
        ({"name": "cosine", "warmup_steps": 150}, {0: 0, 75: 1, 100: 2 * 100 / 150}),  # a run shorter than its warm-up
    ),
)
def test_schedules(schedule, at):
    f = make_schedule(schedule, 2.0, 100)
    assert {step: float(f(step)) for step in at} == pytest.approx(at, abs=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup_steps", (0, 1, 7))
@pytest.mark.parametrize("steps", (1, 7))
def test_schedules_of_short_runs_are_finite_and_within_bounds(name, warmup_steps, steps):
    f = make_schedule({"name": name, "warmup_steps": warmup_steps}, 0.3, steps)
    values = [float(f(i)) for i in range(steps + 1)]
    assert all(0 <= v <= 0.3 + 1e-6 for v in values)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_every_parameter(name):
    optimizer = make_optimizer(config(name, clip_norm=1.0), steps=10)
    state = optimizer.init(PARAMS)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)
    for new, old in zip(jax.tree.leaves(optax.apply_updates(PARAMS, updates)), jax.tree.leaves(PARAMS), strict=True):
        assert np.isfinite(new).all() and (np.asarray(new) < np.asarray(old)).all()


def test_arguments_reach_the_optimizer():
    gradient = {"x": jnp.array([3.0, 4.0])}
    for clip_norm, expected in ((None, [-0.3, -0.4]), (1.0, [-0.06, -0.08]), (10.0, [-0.3, -0.4])):
        optimizer = make_optimizer(config(clip_norm=clip_norm), 1)
        updates, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
        np.testing.assert_allclose(updates["x"], expected, rtol=1e-6)
    decayed = make_optimizer(config("adamw", weight_decay=0.5), 1)
    updates, _ = decayed.update({"x": jnp.zeros(1)}, decayed.init({"x": jnp.ones(1)}), {"x": jnp.ones(1)})
    np.testing.assert_allclose(updates["x"], -0.1 * 0.5, rtol=1e-6)


def test_arguments_of_names():
    assert "learning_rate" not in optimizer_arguments("adamw") and "b2" in optimizer_arguments("adamw")
    assert list(schedule_arguments("cosine")) == ["warmup_steps", "end_share"]


@pytest.mark.parametrize(
    ("bad", "message"),
    (
        (config("adamm"), "unknown optimizer 'adamm': did you mean 'adam'"),
        (
            config("adamw", weight_dekay=0.1),
            "unknown hyperparameter of optimizer 'adamw' 'weight_dekay': did you mean 'weight_decay'",
        ),
        (config(schedule={"name": "cosin"}), "unknown schedule 'cosin': did you mean 'cosine'"),
        (
            config(schedule={"name": "constant", "end_share": 0.1}),
            "unknown hyperparameter of schedule 'constant' 'end_share'",
        ),
        (config(learning_rate=0.0), "optimizer.learning_rate must be a positive number, not 0.0"),
        (config(learning_rate=float("nan")), "optimizer.learning_rate must be a positive number, not nan"),
        (config(clip_norm=0.0), "optimizer.clip_norm"),  # every update would be 0
        (config(clip_norm=-1.0), "optimizer.clip_norm"),  # every update would go uphill
        (config(schedule={"name": "linear", "warmup_steps": -3}), "warmup_steps"),
        (config(schedule={"name": "cosine", "warmup_steps": -3}), "warmup_steps"),
        (config(schedule={"name": "constant", "warmup_steps": -3}), "warmup_steps"),
        (config(schedule={"name": "linear", "end_share": -0.5}), "end_share"),
    ),
)
def test_errors(bad, message):
    with pytest.raises(ValueError, match=message) as error:
        make_optimizer(bad, 10)
    assert "\n" not in str(error.value)
