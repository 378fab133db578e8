"""How data is gathered: on policy, and until enough groups have mixed outcomes."""

import jax
import numpy as np
import pytest

from jaxpo.batch import Rollouts
from jaxpo.config.resolve import resolve
from jaxpo.learning.state import Run, advance
from jaxpo.objectives import make
from jaxpo.protocols.protocol import NothingLeft
from jaxpo.registry import names
from jaxpo.rollout.sampling import SamplingOptions
from tests.protocols.fake_gatherer import fake
from tests.runs import tiny

PROMPTS, RESPONSES = 4, 3


class Recorder:
    """A gatherer over 10 prompts; ``outcomes`` [prompt][response] are what the verifier says. Tokens: prompt, row."""

    def __init__(self, outcomes):
        self.outcomes, self.keys, self.calls, self.notes = np.asarray(outcomes, np.float32), [], 0, {}

    @property
    def gatherer(self):
        return fake(
            prompts=PROMPTS,
            draw=self.draw,
            sampling=lambda run: "options",
            generate=self.generate,
            reward=self.reward,
            note=self.notes.__setitem__,
        )

    def draw(self, run, n):
        return advance(run, position=run.position + n), np.arange(run.position, run.position + n) % len(self.outcomes)

    def generate(self, params, indices, key, options=None):
        assert params == "params" and options == "options"
        self.keys.append(tuple(jax.random.key_data(key).tolist()))
        self.calls += 1
        prompt = np.repeat(indices, RESPONSES).astype(np.int32)
        rows = np.arange(len(prompt))
        return Rollouts(
            tokens=np.stack([prompt, rows], 1),
            mask=np.ones((len(rows), 1), np.float32),
            prompt=prompt,
            group=(rows // RESPONSES).astype(np.int32),
            shared_prompt=RESPONSES,
        )

    def reward(self, rollouts):
        correct = self.outcomes[np.asarray(rollouts.prompt), np.asarray(rollouts.tokens)[:, 1] % RESPONSES]
        return rollouts.replace(reward=correct + 0.5, correct=correct)


class State:
    params = "params"


def collect(protocol, recorder, run=None):
    return protocol.collect(run or Run(State()), recorder.gatherer, jax.random.key(0))


def outcomes(mixed):
    """[10, RESPONSES]: one right answer for the prompts of ``mixed``, none or all right for the others in turn."""
    return [[1, 0, 0] if i in mixed else [i % 2] * RESPONSES for i in range(10)]


def test_names():
    assert {"dynamic_sampling", "dapo", "on_policy", "hapo", "spo_single_stream", "spo_segment"} <= set(
        names("protocol")
    )


def test_on_policy_takes_one_batch():
    recorder = Recorder(outcomes(()))
    run, batch = collect(make("on_policy", "protocol"), recorder)
    assert run.position == PROMPTS and recorder.calls == 1
    assert batch.prompt.tolist() == np.repeat(range(4), RESPONSES).tolist() and batch.reward is not None
    assert make("on_policy", "protocol")[1:6] == (None,) * 5  # no other hook


def test_dynamic_sampling_keeps_mixed_groups_of_several_batches():
    recorder = Recorder(outcomes((1, 2, 5, 8)))
    run, batch = collect(make("dynamic_sampling", "protocol"), recorder)
    assert recorder.calls == 3 and run.position == 3 * PROMPTS and len(set(recorder.keys)) == 3
    assert batch.prompt.tolist() == np.repeat([1, 2, 5, 8], RESPONSES).tolist()
    assert batch.rows == PROMPTS * RESPONSES and batch.shared_prompt == RESPONSES
    assert len(set(batch.group.tolist())) == PROMPTS  # groups of different batches stay apart
    assert all(len(set(batch.group.reshape(PROMPTS, RESPONSES)[i].tolist())) == 1 for i in range(PROMPTS))
    np.testing.assert_array_equal(batch.correct.reshape(PROMPTS, RESPONSES), [[1, 0, 0]] * PROMPTS)
    assert recorder.notes == {"dynamic_sampling/batches": 3}


def test_groups_beyond_those_wanted_are_dropped():
    recorder = Recorder(outcomes((0, 1, 2, 4, 5, 6, 7)))
    run, batch = collect(make("dynamic_sampling", "protocol"), recorder)
    assert recorder.calls == 2 and batch.prompt.tolist() == np.repeat([0, 1, 2, 4], RESPONSES).tolist()


def test_the_next_iteration_goes_on_where_this_one_ended():
    recorder = Recorder(outcomes(range(10)))
    protocol = make("dynamic_sampling", "protocol")
    run, first = collect(protocol, recorder)
    _, second = collect(protocol, recorder, run)
    assert sorted(set(first.prompt.tolist())) == [0, 1, 2, 3] and sorted(set(second.prompt.tolist())) == [4, 5, 6, 7]


@pytest.mark.parametrize("mixed", ((), (1, 2)))
def test_dynamic_sampling_gives_up(mixed):
    recorder = Recorder(outcomes(mixed))
    with pytest.raises(
        NothingLeft,
        match=rf"found {len(mixed)} of 4 groups with mixed outcomes in 2 batches.*config.protocol.max_batches",
    ):
        collect(make("dynamic_sampling", "protocol", max_batches=2), recorder)
    assert recorder.calls == 2


def test_it_is_the_outcome_that_counts_and_not_the_reward():
    """Partial credit differs inside a solved group; DAPO filters on what is right."""
    recorder = Recorder(outcomes((0, 1, 2, 3)))
    reward = recorder.reward
    recorder.reward = lambda rollouts: reward(rollouts).replace(reward=np.zeros(rollouts.rows, np.float32))
    _, batch = collect(make("dynamic_sampling", "protocol"), recorder)
    assert batch.prompt.tolist() == np.repeat(range(4), RESPONSES).tolist()


def test_hyperparameters_are_checked():
    with pytest.raises(
        ValueError,
        match="unknown hyperparameter of protocol 'dynamic_sampling' 'max_batch': did you mean 'max_batches'",
    ):
        make("dynamic_sampling", "protocol", max_batch=3)


# ---- HAPO -----------------------------------------------------------------------------------------------------------


def remembering(**memory):
    return type("Remembered", (), {"memory": memory})()


def test_hapo_samples_by_what_the_objective_remembers():
    protocol = make("hapo", "protocol", tau=0.1, T0=1.2, official=True)
    memory = dict(q=np.float32(-1), s=np.float32(2), high=np.float32(3), low=np.float32(4))
    options = protocol.sampler(SamplingOptions(4, eos_ids=(1,)), remembering(**memory, lam=1.0))
    assert options.max_new_tokens == 4 and options.eos_ids == (1,) and not options.plain
    adaptive = options.adaptive
    assert adaptive.base == np.float32(1.2) and adaptive.slope == np.float32(0.1) and adaptive.official
    assert adaptive.numbers == memory
    # what is compiled depends on the structure and the types of the leaves alone
    other = protocol.sampler(SamplingOptions(4, eos_ids=(1,)), remembering(**{k: x + 1 for k, x in memory.items()}))
    assert jax.tree.structure(options) == jax.tree.structure(other)
    assert all(type(x) is np.float32 for x in jax.tree.leaves(adaptive))


def test_hapo_is_dynamic_sampling():
    recorder = Recorder(outcomes((1, 2, 5, 8)))
    run, batch = collect(make("hapo", "protocol"), recorder)
    assert recorder.calls == 3 and sorted(set(batch.prompt.tolist())) == [1, 2, 5, 8]


def test_hapo_needs_the_memory_of_its_objective():
    with pytest.raises(ValueError, match="reads q, s, high, low from the objective's memory, which only"):
        make("hapo", "protocol").sampler(SamplingOptions(4), remembering())


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"sampling.temperature": 0.7}, "config.sampling.temperature must be 1 with protocol 'hapo', not 0.7"),
        ({"objective": {"name": "hapo", "T0": 0.0}}, "T0 must be a positive number"),
        ({"objective": {"name": "hapo", "tau": 1.0}}, r"tau must be a number in \[0, 1\), not 1"),
        ({"protocol": {"name": None, "tau": 0.1}}, "config.protocol.tau is set by config.objective.tau"),
    ),
)
def test_hapo_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        resolve(tiny.config({"objective": {"name": "hapo"}} | changes), 1)


@pytest.mark.slow
def test_hapo_runs(tmp_path):
    with tiny.quick():
        changes = {"objective": {"name": "hapo"}, "training.epochs": 1, "steps": 3, "evaluation.every": 100}
        run = tiny.run(tiny.config(changes), tmp_path / "run")
    assert {f.name: f.compilations for f in run.result.workspace.programs.compiled}[
        "generate"
    ] == 3  # greedy, pass@k, adaptive
    assert "AGAIN" not in run.printed
    for line in tiny.trained(run.path):
        assert line["dynamic_sampling/batches"] >= 1 and line["step/nonfinite"] == 0
        assert line["mismatch/logp_abs_max"] < 1e-4  # of the plain policy
