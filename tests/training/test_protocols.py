"""How data is gathered: on policy, and until enough groups have mixed outcomes."""

import jax
import numpy as np
import pytest

from jaxpo.batch import Rollouts
from jaxpo.objectives import make
from jaxpo.registry import names
from jaxpo.training.protocols import NothingLeft, Run, Tools, advance

PROMPTS, RESPONSES = 4, 3


class Recorder:
    """Tools over 10 prompts; ``outcomes`` [prompt][response] are what the verifier says. Tokens: prompt and row."""

    def __init__(self, outcomes):
        self.outcomes, self.keys, self.calls = np.asarray(outcomes, np.float32), [], 0

    @property
    def tools(self):
        return Tools(PROMPTS, self.draw, self.generate, self.reward)

    def draw(self, run, n):
        return advance(run, position=run.position + n), np.arange(run.position, run.position + n) % len(self.outcomes)

    def generate(self, params, indices, key, options=None):
        assert params == "params" and options is None
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
    return protocol.collect(run or Run(State()), recorder.tools, jax.random.key(0))


def outcomes(mixed):
    """[10, RESPONSES]: one right answer for the prompts of ``mixed``, none or all right for the others in turn."""
    return [[1, 0, 0] if i in mixed else [i % 2] * RESPONSES for i in range(10)]


def test_names():
    assert {"dynamic_sampling", "dapo", "on_policy"} <= set(names("protocol"))
    assert make("on_policy", "protocol").sampler(None) is None


def test_on_policy_takes_one_batch():
    recorder = Recorder(outcomes(()))
    run, batch = collect(make("on_policy", "protocol"), recorder)
    assert run.position == PROMPTS and recorder.calls == 1
    assert batch.prompt.tolist() == np.repeat(range(4), RESPONSES).tolist() and batch.reward is not None
    protocol = make("on_policy", "protocol")
    assert protocol.init(run) is run and protocol.after(run, recorder.tools, batch) is run
    assert protocol.before(run, recorder.tools, batch) == (run, batch)


def test_dynamic_sampling_keeps_mixed_groups_of_several_batches():
    recorder = Recorder(outcomes((1, 2, 5, 8)))
    run, batch = collect(make("dynamic_sampling", "protocol"), recorder)
    assert recorder.calls == 3 and run.position == 3 * PROMPTS and len(set(recorder.keys)) == 3
    assert batch.prompt.tolist() == np.repeat([1, 2, 5, 8], RESPONSES).tolist()
    assert batch.rows == PROMPTS * RESPONSES and batch.shared_prompt == RESPONSES
    assert len(set(batch.group.tolist())) == PROMPTS  # groups of different batches stay apart
    assert all(len(set(batch.group.reshape(PROMPTS, RESPONSES)[i].tolist())) == 1 for i in range(PROMPTS))
    np.testing.assert_array_equal(batch.correct.reshape(PROMPTS, RESPONSES), [[1, 0, 0]] * PROMPTS)
    assert set(batch.extras["generation_batches"].tolist()) == {3.0}


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
