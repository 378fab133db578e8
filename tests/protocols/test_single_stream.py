"""A value for every prompt that outlives the batch: offline samples, weighted draws, forgetting, resuming."""

import jax
import numpy as np
import pytest

from jaxpo.batch import Rollouts, TokenStats
from jaxpo.config.resolve import resolve
from jaxpo.learning.state import Run, advance
from jaxpo.objectives import make
from jaxpo.storage.checkpoint import restore_params
from tests.protocols.fake_gatherer import fake
from tests.runs import tiny

N, B, P, T = 9, 4, 2, 3


class World:
    """A policy whose answer to prompt i has ``1 + i % T`` tokens (i, i+1, ...) and the log-prob ``-params * token``
    each; prompt i is answered rightly at each visit whose turn ``rewards`` [N, ...] says."""

    def __init__(self, rewards=None):
        self.rewards = np.tile([1.0, 0.0], (N, 50)) if rewards is None else rewards
        self.visits, self.drawn, self.notes, self.said = np.zeros(N, int), [], {}, []

    @property
    def gatherer(self):
        functions = {name: getattr(self, name) for name in ("generate", "reward", "score")}
        return fake(
            prompts=B,
            size=N,
            width=T,
            sampling=lambda run: "options",
            note=self.notes.__setitem__,
            say=self.said.append,
            **functions,
        )

    def generate(self, params, indices, key, options):
        assert options == "options" and len(indices) == B
        self.drawn.append(indices.tolist())
        tokens = np.concatenate([np.repeat(indices[:, None], P, 1), indices[:, None] + np.arange(T)], 1)
        return Rollouts(
            tokens=tokens.astype(np.int32),
            mask=(np.arange(T) < 1 + indices[:, None] % T).astype(np.float32),
            prompt=indices.astype(np.int32),
        )

    def reward(self, rollouts):
        turns = []
        for i in rollouts.prompt:
            turns.append(self.rewards[i, self.visits[i]])
            self.visits[i] += 1
        return rollouts.replace(reward=np.array(turns, np.float32))

    def score(self, params, rollouts):
        assert (rollouts.tokens[:, :P] == np.asarray(rollouts.prompt)[:, None]).all()
        return TokenStats(logp=-params * np.asarray(rollouts.completions, np.float32))


def started(world, params=0.1, **options):
    protocol = make("spo_single_stream", "protocol", **options)
    run = Run(type("State", (), {"params": params})(), tables=protocol.tables(world.gatherer))
    return protocol, protocol.init(run, world.gatherer, jax.random.key(0))


def moved(run, params):
    return advance(run, state=type("State", (), {"params": params})())


def test_without_offline_samples_every_value_is_a_half():
    world = World()
    _, run = started(world, n0=0)
    assert world.drawn == [] and (run.tables["alpha"] == 0.5).all() and (run.tables["beta"] == 0.5).all()


def test_offline_samples_of_every_prompt():
    rewards = np.random.default_rng(0).integers(0, 2, (N, 20)).astype(float)
    world = World(rewards)
    _, run = started(world, n0=3, rho_min=0.8)
    assert len(world.drawn) == 7 and sum(world.drawn, [])[: 3 * N] == np.repeat(np.arange(N), 3).tolist()
    successes = rewards[:, :3].sum(1)
    np.testing.assert_allclose(run.tables["alpha"], 5 * (successes + 0.5) / 4, rtol=1e-6)
    np.testing.assert_allclose(run.tables["beta"], 5 * (3 - successes + 0.5) / 4, rtol=1e-6)
    assert world.said[0] == "offline samples: 3 of each of 9 prompts, in 7 batches"


def test_prompts_are_drawn_without_replacement_by_their_weight():
    world = World()
    protocol, run = started(world, n0=0)
    uncertain = np.array([2, 3, 5, 7])
    alpha = np.full(N, 1e6, np.float32)
    alpha[uncertain] = 0.5
    run = advance(run, tables={**run.tables, "alpha": alpha})
    floor = make("spo_single_stream", "protocol", floor=1e-6)
    for i in range(3):
        _, batch = floor.collect(run, world.gatherer, jax.random.key(i))
        assert sorted(batch.prompt.tolist()) == uncertain.tolist()
    counts = np.zeros(N)
    for i in range(200):
        _, batch = protocol.collect(run, World().gatherer, jax.random.key(i))
        assert len(set(batch.prompt.tolist())) == B
        counts[batch.prompt] += 1
    assert counts.sum() == 200 * B and counts[uncertain].min() > 2 * np.delete(counts, uncertain).max()
    assert np.delete(counts, uncertain).min() > 0


def test_the_batch_is_a_function_of_the_key():
    draws = []
    for seed in (0, 0, 1):
        protocol, run = started(world := World(), n0=0)
        run, batch = protocol.collect(run, world.gatherer, jax.random.key(seed))
        draws.append(batch.prompt.tolist())
        assert run.position == B
    assert draws[0] == draws[1] != draws[2]


def test_the_value_handed_on_is_that_before_the_step():
    world = World()
    protocol, run = started(world, n0=3)
    value = run.tables["alpha"] / (run.tables["alpha"] + run.tables["beta"])
    _, batch = protocol.collect(run, world.gatherer, jax.random.key(0))
    np.testing.assert_allclose(batch.per_row["tracker_value"], value[batch.prompt], rtol=1e-6)


def test_two_visits_by_hand():
    """First visit: rho = rho_max whatever the policy did. Second: D of the stored response, then forgetting."""
    world = World(np.ones((N, 9)))
    protocol, run = started(world, n0=0, d_half=2.0, rho_min=0.5, rho_max=0.9)
    run, batch = protocol.collect(run, world.gatherer, jax.random.key(0))
    batch = batch.replace(reward=batch.reward - 7)  # an objective's shaping is not what is tracked
    at = batch.prompt
    run = protocol.after(moved(run, 0.3), world.gatherer, batch)
    np.testing.assert_allclose(run.tables["alpha"][at], 0.9 * 0.5 + 1, rtol=1e-6)
    np.testing.assert_allclose(run.tables["beta"][at], 0.9 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(run.tables["seen"], np.isin(np.arange(N), at))
    np.testing.assert_allclose(run.tables["logp"][at], -0.3 * np.asarray(batch.completions), rtol=1e-6)
    np.testing.assert_array_equal(run.tables["mask"][at], batch.mask)
    untouched = np.delete(np.arange(N), at)
    assert (run.tables["alpha"][untouched] == 0.5).all() and (run.tables["logp"][untouched] == 0).all()
    assert world.notes["tracker/drift"] == 0 and world.notes["tracker/rho"] == pytest.approx(0.9)

    again = batch.replace(per_row={**batch.per_row, "tracker_reward": np.zeros(B, np.float32)})
    run = protocol.after(moved(run, 0.7), world.gatherer, again)
    drift = np.array([np.mean([0.4 * (i + t) for t in range(1 + i % T)]) for i in at])
    rho = np.clip(2 ** (-drift / 2.0), 0.5, 0.9)
    np.testing.assert_allclose(run.tables["alpha"][at], rho * 1.45, rtol=1e-5)
    np.testing.assert_allclose(run.tables["beta"][at], rho * 0.45 + 1, rtol=1e-5)
    assert world.notes["tracker/drift"] == pytest.approx(drift.mean(), rel=1e-5)


def test_tables_are_replaced_and_never_edited():
    world = World()
    protocol, run = started(world, n0=0)
    before = {name: x.copy() for name, x in run.tables.items()}
    _, batch = protocol.collect(run, world.gatherer, jax.random.key(0))
    protocol.after(run, world.gatherer, batch)
    for name, x in before.items():
        np.testing.assert_array_equal(run.tables[name], x)


def test_rewards_outside_0_and_1_are_refused():
    world = World(-np.ones((N, 9)))
    with pytest.raises(ValueError, match=r"a reward of -1 is outside \[0, 1\]"):
        started(world)


def test_more_prompts_than_there_are():
    gatherer = World().gatherer
    gatherer.prompts = N + 1
    with pytest.raises(ValueError, match="config.rollout.prompts 10 is more than the 9 training prompts"):
        make("spo_single_stream", "protocol").tables(gatherer)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (dict(n0=-1), "n0 must be a whole number of at least 0, not -1"),
        (dict(d_half=0.0), "d_half must be a positive number"),
        (dict(floor=0.0), "floor must be a positive number"),
        (dict(rho_min=0.9, rho_max=0.8), "rho_max must be at least rho_min, not 0.8 beside 0.9"),
    ),
)
def test_hyperparameters_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        make("spo_single_stream", "protocol", **options)


def test_one_response_a_prompt():
    with pytest.raises(ValueError, match="config.rollout.responses must be 1 with protocol 'spo_single_stream', not 4"):
        resolve(tiny.config({"objective": {"name": "spo_single_stream"}}), 1)


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(tmp_path):
    """Stopped after the second of four iterations and resumed: the same parameters and tables, no second offline
    pass."""
    changes = {
        "objective": {"name": "spo_single_stream"},
        "protocol": {"name": None, "n0": 2},
        "rollout.responses": 1,
        "training.epochs": 1,
        "warm_start.steps": 20,
        "evaluation.pass_at": (),
        "evaluation.every": 100,
        "checkpoint.every": 100,
    }
    with tiny.quick():
        whole, rest = tiny.stopped_and_resumed(changes, tmp_path, at=2)
    assert "offline samples" in whole.printed and "offline samples" not in rest.printed
    tables, _ = restore_params(whole.path / "checkpoints", name="tables")
    assert tables["seen"].sum() > 8 and tables["tokens"].shape == (21, 3)
