"""A number of a row that is not finite ends an iteration before its step; one line names iteration, row and number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpo
from jaxpo import testing
from jaxpo.batch import Rollouts
from jaxpo.learning.state import Run, TrainState
from jaxpo.objectives.parts import shaping
from jaxpo.protocols.protocol import Protocol
from jaxpo.runs.iteration import Stage, gather, learn
from jaxpo.testing.variants import replaced

ITERATION, ROW = 7, 5


def never(*_, **__):
    raise AssertionError("an optimizer step was taken")


def stage_of(objective: jaxpo.Objective, rollouts: Rollouts) -> Stage:
    """An iteration that gathers these rows; ``prepare`` is compiled, as in a run."""
    protocol = Protocol(lambda run, gatherer, key: (run, rollouts))
    scored = testing.bigram(objective, frozenset({"logp"}), testing.parameters(), rollouts)
    return Stage(objective, protocol, 1, lambda params, batch: scored, jax.jit(objective.prepare), never)


def iterated(objective: jaxpo.Objective, rollouts: Rollouts) -> None:
    """Up to the first optimizer step."""
    stage = stage_of(objective, rollouts)
    run = Run(TrainState(None, None, objective.init()), iteration=ITERATION)
    _, batch = gather(stage, None, run, jax.random.key(0))
    learn(stage, run, batch, lambda batch: [np.arange(batch.rows)])


def spoilt(objective: jaxpo.Objective, name: str, value: float) -> Rollouts:
    batch = testing.example(objective)
    return replaced(batch, name, jnp.asarray(batch.get(name)).at[ROW].set(value))


@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize(
    ("name", "field"),
    (
        ("grpo", "reward"),
        ("d3s", "reward"),
        ("hapo", "reward"),
        ("dapo", "correct"),
        ("gdpo", "rewards_multi"),
        ("spo_single_stream", "tracker_value"),
        ("kto", "label"),
        ("sppo", "win"),
        ("gpo", "pref_score"),
    ),
)
def test_what_is_gathered(name, field, value):
    objective = jaxpo.make(name)
    said = "reward" if field == "rewards_multi" else field
    message = f"^iteration {ITERATION}: the {said} of row {ROW} is {value:g}: it must be a finite number$"
    with pytest.raises(ValueError, match=message):
        iterated(objective, spoilt(objective, field, value))


def test_a_number_of_a_pair_is_read_from_its_first_row():
    objective = jaxpo.make("bradley_terry_rm", margins=True)
    batch = testing.example(objective)

    def given(row):
        return replaced(batch, "margin", batch.get("margin").at[row].set(jnp.nan))

    with pytest.raises(ValueError, match="the margin of row 4 is nan"):
        objective.prepare(given(4), objective.init())
    for row in (3, 5):
        assert np.isfinite(objective.prepare(given(row), objective.init())[0].count).all()


def test_a_reward_that_is_not_finite_after_shaping_is_named_before_the_step():
    """Of a reference that says NaN of one token, which enters the reward with the KL."""
    objective = jaxpo.make("rloo")
    batch = testing.example(objective)
    logp_ref = batch.get("logp_ref").at[ROW, 0].set(jnp.nan)
    assert batch.mask[ROW, 0] > 0
    batch = replaced(batch, "logp_ref", logp_ref)
    message = (
        rf"row {ROW} has a number or an advantage that is not finite \(reward -?[\d.]+, reward after shaping nan\)$"
    )
    with pytest.raises(ValueError, match=f"^{message}"):
        objective.prepare(batch, objective.init())
    stage = stage_of(objective, batch)
    run = Run(TrainState(None, None, objective.init()), iteration=ITERATION)
    with pytest.raises(ValueError, match=f"^iteration {ITERATION}: {message}"):
        learn(stage, run, batch, lambda batch: [np.arange(batch.rows)])


@pytest.mark.parametrize("base", ("grpo", "d3s"))
def test_a_shaping_of_ones_own_that_gives_nan_is_never_dropped(base):
    """Also where a filter would choose other rows: the compiled loss is NaN."""
    bad = shaping.Shaping(lambda batch, state: batch.reward.at[ROW].set(jnp.inf))
    spelled = dict(
        advantage=jaxpo.objectives.parts.advantages.group_normalized(),
        ratio=jaxpo.objectives.parts.ratios.token(),
        surrogate=jaxpo.objectives.parts.surrogates.clipped(0.2, 0.2),
        aggregate=jaxpo.primitives.aggregation.token_mean,
        shaping=[bad],
        filters=[jaxpo.objectives.parts.filters.d3s_rows(total=9)] if base == "d3s" else [],
    )
    objective = jaxpo.policy_gradient(**spelled)
    batch = testing.example(objective)
    stats = testing.bigram(objective, frozenset({"logp"}), testing.parameters(), batch)
    loss = jax.jit(lambda batch: jaxpo.evaluate(objective, lambda _: stats, batch)[0])
    assert np.isnan(loss(batch))
    with pytest.raises(ValueError, match=f"row {ROW} .* reward after shaping inf"):
        jaxpo.evaluate(objective, lambda _: stats, batch)


def test_rows_that_do_not_count_hold_anything():
    objective = jaxpo.make("dapo")
    batch = testing.example(objective)
    out = [
        jax.jit(objective.prepare)(b.replace(count=batch.count.at[ROW].set(0)), objective.init())[0]
        for b in (batch, spoilt(objective, "reward", np.nan))
    ]
    np.testing.assert_array_equal(out[0].adv, out[1].adv)
    np.testing.assert_array_equal(out[0].count, out[1].count)
