"""Beginnings of completions: read from rollouts, gone on with, appended to, and handed back as rows."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxpo.batch import Rollouts
from jaxpo.learning.state import Run
from jaxpo.protocols.prefixes import Prefixes, joined
from tests.protocols.fake_gatherer import fake

KEY = jax.random.key(0)
P, T = 3, 5
LENGTH = np.array([1, 2, 3], np.int32)
PROMPTS = np.array([[0, 0, 10], [0, 11, 11], [12, 12, 12]], np.int32)


def gatherer(**more):
    return fake(width=T, encoded=lambda indices: (PROMPTS[indices], LENGTH[indices]), **more)


def continued(tokens, **fields):
    """What a sampler adds: these tokens [n, T], up to the first 0, each of log-prob -token / 10."""
    tokens = np.asarray(tokens, np.int32)
    mask = (tokens > 0).astype(np.float32)
    return Rollouts(
        tokens=np.concatenate([np.zeros((len(tokens), P + T), np.int32), tokens], 1),
        mask=mask,
        logp_beh=-0.1 * tokens.astype(np.float32),
        **fields,
    )


def begun():
    """Two prompts of which the second has the beginning 7 8, sampled, and the third the beginning 9, given."""
    whole = Rollouts(
        tokens=np.concatenate([PROMPTS[1:], [[7, 8, 9, 0, 0], [9, 9, 0, 0, 0]]], 1).astype(np.int32),
        mask=np.array([[1, 1, 1, 0, 0], [0, 1, 0, 0, 0]], np.float32),
        prompt_length=LENGTH[1:],
        prompt=np.array([1, 2], np.int32),
        logp_beh=np.array([[-0.7, -0.8, -0.9, 5, 5], [5, -0.9, 5, 5, 5]], np.float32),
    )
    return Prefixes.of_rollouts(whole, np.array([0, 1]), np.array([2, 1]))


def test_a_path_behind_its_prompt():
    prompt, path = np.array([[0, 0, 5], [0, 6, 7], [8, 9, 4]]), np.array([[1, 2, 3, 4]] * 3)
    tokens, length = joined(prompt, np.array([1, 2, 3]), path, np.array([0, 4, 2]), 7)
    assert tokens.tolist() == [[0, 0, 0, 0, 0, 0, 5], [0, 6, 7, 1, 2, 3, 4], [0, 0, 8, 9, 4, 1, 2]]
    assert length.tolist() == [1, 6, 5] and tokens.dtype == length.dtype == np.int32


def test_prompts_begin_with_nothing():
    paths = Prefixes.of_prompts(gatherer(), np.array([2, 0]), responses=2)
    assert len(paths) == 4 and paths.width == T and paths.question.tolist() == [2, 2, 0, 0]
    assert paths.prompt.tolist() == PROMPTS[[2, 2, 0, 0]].tolist() and paths.prompt_length.tolist() == [3, 3, 1, 1]
    assert not paths.stop.any() and not paths.mask.any() and not paths.tokens.any()


def test_beginnings_of_rollouts():
    paths = begun()
    assert paths.question.tolist() == [1, 2] and paths.stop.tolist() == [2, 1]
    assert paths.mask.tolist() == [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]  # given tokens stay given
    np.testing.assert_allclose(paths.logp_beh[0], [-0.7, -0.8, 0, 0, 0], rtol=1e-6)
    plain = Rollouts(
        tokens=np.zeros((1, P + T), np.int32), mask=np.ones((1, T), np.float32), prompt_length=LENGTH[:1], prompt=LENGTH
    )
    assert not Prefixes.of_rollouts(plain, np.array([0]), np.array([3])).logp_beh.any()


def test_the_policy_goes_on():
    """Two continuations of each beginning, as the sampler gets and gives them; their tokens come behind it."""
    called = {}

    def complete(params, tokens, length, budget, key, options, responses):
        called.update(params=params, tokens=tokens, length=length, budget=budget, options=options, key=key)
        return continued([[1, 2, 3, 0, 0], [4, 0, 0, 0, 0], [0, 0, 0, 0, 0], [5, 6, 0, 0, 0]])

    run = Run(SimpleNamespace(params="params"))
    gather = gatherer(complete=complete, sampling=lambda run: "options")
    longer, out = begun().go_on(run, gather, np.array([3, 2]), KEY, responses=2)
    assert called["params"] == "params" and called["options"] == "options" and called["key"] is KEY
    assert called["tokens"].tolist() == [[0, 0, 0, 0, 11, 11, 7, 8], [0, 0, 0, 0, 12, 12, 12, 9]]
    assert called["length"].tolist() == [4, 4] and called["budget"].tolist() == [3, 2]
    assert longer.question.tolist() == [1, 1, 2, 2] and longer.stop.tolist() == [5, 3, 1, 3]
    assert longer.tokens[:, :3].tolist() == [[7, 8, 1], [7, 8, 4], [9, 9, 0], [9, 5, 6]]
    assert longer.tokens[0].tolist() == [7, 8, 1, 2, 3]
    assert longer.mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]]
    np.testing.assert_allclose(longer.logp_beh[0], [-0.7, -0.8, -0.1, -0.2, -0.3], rtol=1e-6)
    np.testing.assert_allclose(longer.logp_beh[3, 1:], [-0.5, -0.6, 0, 0], rtol=1e-6)
    assert out.rows == 4 and begun().stop.tolist() == [2, 1]  # what was is not changed


def test_given_tokens_are_appended_with_mask_0():
    paths = begun().append(np.array([[21, 22, 23], [24, 25, 26]]), np.array([2, 0]))
    assert paths.stop.tolist() == [4, 1] and paths.tokens[0, :4].tolist() == [7, 8, 21, 22]
    assert paths.mask.tolist() == begun().mask.tolist() and not paths.logp_beh[0, 2:].any()
    assert paths.tokens[1].tolist() == begun().tokens[1].tolist()
    run, gather = (
        Run(SimpleNamespace(params=None)),
        gatherer(complete=lambda *_: continued([[1, 0, 0, 0, 0], [2, 0, 0, 0, 0]]), sampling=lambda run: None),
    )
    turned, _ = paths.go_on(run, gather, np.array([1, 1]), KEY)  # a turn behind what a tool said
    assert turned.tokens[0].tolist() == [7, 8, 21, 22, 1] and turned.mask[0].tolist() == [1, 1, 0, 0, 1]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="row 0: 2 tokens and 4 more do not fit into completions of 5"):
        begun().append(np.zeros((2, 4), np.int64), np.array([4, 1]))


def test_beginnings_as_rows():
    paths = begun().append(np.array([[21], [24]]), np.array([1, 1]))
    batch = paths.rollouts(reward=np.array([1.0, 0.0]), mc_value=np.zeros((2, T)))
    assert batch.prompt_width == P and batch.width == T and batch.prompt.tolist() == [1, 2]
    assert batch.tokens[0, : P + 3].tolist() == [0, 11, 11, 7, 8, 21]
    assert batch.mask.tolist() == [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]] and batch.logp_beh is paths.logp_beh
    assert batch.reward.tolist() == [1, 0] and batch.get("mc_value").shape == (2, T)


def test_the_reward_of_a_beginning_is_that_of_all_its_tokens():
    """A verifier reads given tokens too, and nothing beyond the beginning."""
    seen = []

    def reward(batch):
        rows = zip(batch.completions, batch.mask, strict=True)
        seen.extend(tuple(tokens[on > 0].tolist()) for tokens, on in rows)
        return batch.replace(reward=np.array([0.5, 2.0], np.float32))

    assert begun().rewards(gatherer(reward=reward)).tolist() == [0.5, 2]
    assert seen == [(7, 8), (9,)]
