"""Groups of past batches beside fresh ones."""

from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxpo.batch import Rollouts, TokenStats
from jaxpo.config.resolve import resolve
from jaxpo.fields import role_id
from jaxpo.learning.state import Run, TrainState, advance
from jaxpo.objectives import make
from jaxpo.objectives.grammar.base import Asks
from jaxpo.protocols.gatherer import Watch
from jaxpo.protocols.protocol import Facts, Protocol
from jaxpo.runs.gatherer import make_gatherer, make_stage
from jaxpo.runs.iteration import Stage, learn, score_references
from jaxpo.runs.loop import minibatches
from jaxpo.runs.workspace import setup
from tests.protocols.fake_gatherer import fake
from tests.runs import tiny

G, K, T = 4, 2, 3
ROWS = G * K


def batch_of(iteration):
    """A scored batch; every leaf says of which iteration and row it is."""
    name = 100 * iteration + np.arange(ROWS)

    def wide(x):
        return np.repeat(x[:, None], T, 1).astype(np.float32)

    return Rollouts(
        tokens=np.repeat(name[:, None], 2 + T, 1).astype(np.int32),
        mask=wide(1 + 0 * name),
        count=np.ones(ROWS, np.float32),
        group=np.repeat(np.arange(G), K).astype(np.int32),
        role=np.zeros(ROWS, np.int32),
        seed=(7919 * name + 5).astype(np.uint32),
        reward=name.astype(np.float32),
        correct=name.astype(np.float32),
        logp_old=wide(-name),
        logp_ref=wide(-2 * name),
        per_token={"logp_sampler": wide(-3 * name)},
        shared_prompt=K,
    )


class World:
    def __init__(self, fraction=0.5, capacity=2):
        self.protocol, self.notes = make("replay", "protocol", fraction=fraction, capacity=capacity), {}
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch_of(0))
        self.gatherer = fake(prompts=G, scored=lambda: shapes, note=self.notes.__setitem__)
        self.run = Run(None, tables=self.protocol.tables(self.gatherer))

    def step(self, rollouts=None):
        """One iteration: the batch that is trained on, and which rows of it are not fresh."""
        i = self.run.iteration
        self.run, mixed = self.protocol.before(self.run, self.gatherer, batch_of(i) if rollouts is None else rollouts)
        self.run = advance(self.run, iteration=i + 1)
        return mixed, np.flatnonzero(mixed.role == role_id("replay"))


def test_the_first_batch_is_fresh():
    world = World()
    mixed, back = world.step()
    jax.tree.map(np.testing.assert_array_equal, mixed, batch_of(0))
    assert len(back) == 0 and world.notes == {"replay/age": 0}


def test_whole_groups_come_back_as_they_were():
    world = World()
    world.step()
    mixed, back = world.step()
    assert len(back) == ROWS // 2 and len(set(back // K)) == G // 2  # whole groups
    fresh = batch_of(1)
    np.testing.assert_array_equal(np.delete(mixed.tokens[:, 0], back), np.delete(fresh.tokens[:, 0], back))
    name = mixed.tokens[:, 0]
    assert (name[back] < ROWS).all() and len(set(name.tolist())) == ROWS  # of batch 0, none twice
    assert (name.reshape(G, K) // K == name.reshape(G, K)[:, :1] // K).all()
    np.testing.assert_array_equal(mixed.tokens, np.repeat(name[:, None], 2 + T, 1))
    for x, times in (
        (mixed.reward, 1),
        (mixed.correct, 1),
        (mixed.logp_old[:, 1], -1),
        (mixed.per_token["logp_ref"][:, 0], -2),
        (mixed.per_token["logp_sampler"][:, 2], -3),
    ):
        np.testing.assert_array_equal(x, times * name)
    for field in ("group", "seed", "count"):
        np.testing.assert_array_equal(getattr(mixed, field), getattr(fresh, field))
    assert mixed.shared_prompt == K and world.notes == {"replay/age": 1}
    assert jax.tree.map(lambda x: x.dtype, mixed) == jax.tree.map(lambda x: x.dtype, fresh)


def test_the_buffer_holds_the_latest_batches_as_they_were_scored():
    """Those of iterations 1 and 2 before the fourth, in which groups of 2 and 1 come back: of ages 1 and 2."""
    world, seen = World(fraction=0.75), set()
    for i in range(60):
        before = world.run.tables["iteration"].tolist()
        assert sorted(before) == [[-1, -1], [-1, 0], [0, 1]][min(i, 2)] if i < 3 else sorted(before) == [i - 2, i - 1]
        mixed, back = world.step()
        born = mixed.tokens[back, 0] // 100
        assert all(i - 2 <= b < i for b in born) and len(back) == (0 if i == 0 else 3 * K)
        if i:
            assert world.notes["replay/age"] == pytest.approx(np.mean(i - born))
        seen |= {i - b for b in born.tolist()}
        place = world.run.tables["iteration"].tolist().index(i)
        stored = jax.tree.map(lambda x, place=place: x[place], world.run.tables["batches"])
        jax.tree.map(np.testing.assert_array_equal, stored, batch_of(i))  # fresh, and not what was trained on
    assert seen == {1, 2}


def test_every_group_and_every_place_has_its_turn():
    world = World()
    places, groups = np.zeros(G), np.zeros(G)
    for _ in range(200):
        mixed, back = world.step()
        np.add.at(places, back[::K] // K, 1)
        np.add.at(groups, mixed.tokens[back[::K], 0] % 100 // K, 1)
    for counts in (places, groups):
        assert counts.sum() == 2 * 199 and counts.min() > 70


def test_what_comes_back_is_a_function_of_the_iterations_seeds():
    drawn = []
    for shift in (0, 0, 1):
        world = World()
        world.step()
        later = batch_of(1)
        mixed, _ = world.step(later.replace(seed=later.seed + np.uint32(shift)))
        drawn.append(mixed.tokens[:, 0].tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_tables_are_replaced_and_never_edited():
    world = World()
    world.step()
    tables = world.run.tables
    before = jax.tree.map(np.copy, tables)
    world.step()
    jax.tree.map(np.testing.assert_array_equal, tables, before)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (dict(fraction=0.0), r"fraction must be a number in \(0, 1\), not 0"),
        (dict(fraction=1.0), r"fraction must be a number in \(0, 1\), not 1"),
        (dict(capacity=0), "capacity must be a whole number of at least 1, not 0"),
        (dict(capacity=1.5), "capacity must be a whole number"),
    ),
)
def test_hyperparameters_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        make("replay", "protocol", **options)


R2VPO = {"objective": {"name": "r2vpo"}, "protocol": {"name": "replay"}}


@pytest.mark.parametrize(("fraction", "groups"), ((0.05, 0), (0.97, 8)))
def test_a_batch_that_would_not_be_mixed(fraction, groups):
    changes = R2VPO | {"protocol": {"name": "replay", "fraction": fraction}}
    with pytest.raises(
        ValueError, match=f"config.protocol.fraction {fraction} of config.rollout.prompts 8 is {groups}"
    ):
        resolve(tiny.config(changes), 1)


# ---- the loop -------------------------------------------------------------------------------------------------------


def test_the_shapes_of_a_scored_batch():
    """What ``gatherer.scored`` promises is what the protocol is handed, references and sampler's numbers too."""
    changes = {"protocol": {"name": "replay"}, "training.epochs": 1, "training.minibatches": 1}  # of grpo, beta > 0
    with tiny.quick():
        workspace = setup(tiny.config(changes | {"sampling.top_k": 3}), report=lambda text: None)
        gatherer = make_gatherer(workspace, Watch())
        shapes = gatherer.scored()
        assert not workspace.programs.compiled  # nothing was computed
        params = workspace.init_params(jax.random.key(0))
        rollouts = gatherer.reward(gatherer.generate(params, np.arange(8, dtype=np.int32), jax.random.key(1)))
        run = Run(SimpleNamespace(params=params, objective=workspace.objective.init()), {"ref": params})
        batch = score_references(make_stage(workspace, Watch()), run, workspace.put(rollouts))
    assert (
        set(batch.per_token) == {"logp_ref", "logp_sampler"}
        and batch.logp_old is not None
        and "logp_sampler" in batch.per_token
    )
    assert jax.tree.structure(batch) == jax.tree.structure(shapes)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(batch)] == [(x.shape, x.dtype) for x in jax.tree.leaves(shapes)]


def stage_of(objective, stale, steps, **calls):
    """An iteration by the given functions; any other fails."""
    rest = dict.fromkeys(("score", "prepare", "update"))
    return Stage(objective, Protocol(None, facts=Facts(stale=stale)), steps, **{**rest, **calls})


@pytest.mark.parametrize("stale", (False, True))
def test_old_log_probs_are_no_peek_at_the_current_policy(stale):
    """The first step's look is free when all rows are fresh; with rows of the past in between it is not."""
    seen = []

    def update(state, batch, rows, fresh):
        seen.append(fresh)
        return state, {}

    peeking = make("reinforce")._replace(asks=Asks(peeks=frozenset({"logp"})))
    stage = stage_of(peeking, stale, 4, prepare=lambda batch, memory: (batch, memory), update=update)
    run = Run(TrainState(None, None, None))
    learn(stage, run, batch_of(0), partial(minibatches, tiny.config(), jax.random.key(0)))
    assert seen == [not stale, False, False, False]


def test_old_log_probs_are_scored_even_for_a_single_step():
    stats, objective = TokenStats(logp=np.ones((ROWS, T), np.float32)), make("r2vpo")

    def scored(stale):
        stage = stage_of(objective, stale, 1, score=lambda params, batch: stats)
        run = Run(TrainState(None, None, objective.init()))
        return score_references(stage, run, batch_of(0).replace(logp_old=None))

    assert scored(False).logp_old is None and scored(True).logp_old is stats.logp


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(tmp_path):
    """One step an iteration, so that only what comes back can be off policy; stopped in the middle and resumed."""
    changes = R2VPO | {
        "protocol": {"name": "replay", "fraction": 0.5, "capacity": 2},
        "training.epochs": 1,
        "training.minibatches": 1,
        "steps": 5,
        "warm_start.steps": 20,
        "evaluation.pass_at": (),
        "evaluation.every": 100,
        "checkpoint.every": 100,
    }
    with tiny.quick():
        whole, _ = tiny.stopped_and_resumed(changes, tmp_path, at=3)
    lines = tiny.trained(whole.path)
    assert [line["replay/age"] == 0 for line in lines] == [True] + [False] * 4
    assert lines[0]["ratio/max"] == pytest.approx(1, abs=1e-5)
    assert all(line["ratio/max"] > 1 + 1e-4 for line in lines[1:])
    assert all(line["mismatch/logp_abs_max"] < 1e-4 and line["step/nonfinite"] == 0 for line in lines)
