"""The in-graph task: hand-worked rewards, equality with the host, and that it can be learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.tasks.toy import ReverseDigits, toy


def encoded(game, questions):
    return jnp.array([game.tokenizer.encode(game.tokenizer.render(q)) for q in questions])


@pytest.mark.parametrize(
    "text, ended, exact, partial",
    [
        ("703", True, 1, 1),
        ("703", False, 1, 1),
        ("702", True, 0, 2 / 3),
        ("70", True, 0, 2 / 3),
        ("", True, 0, 0),
        ("307", True, 0, 1 / 3),
        ("7033", True, 0, 3 / 4),
        ("70333", False, 0, 3 / 5),
        ("=03", True, 0, 2 / 3),
    ],
)
def test_rewards_worked_by_hand(text, ended, exact, partial):
    ids = ReverseDigits().tokenizer.encode(text) + [0] * ended
    completion = np.full((1, 6), 4)  # whatever stands after the mask must not matter
    completion[0, : len(ids)] = ids
    mask = np.arange(6)[None] < len(ids)
    for credit, expected in ((False, exact), (True, partial)):
        game = ReverseDigits(partial_credit=credit)
        reward = game.reward(encoded(game, ["307"]), jnp.array(completion), jnp.array(mask))
        assert reward.dtype == jnp.float32 and reward.shape == (1,)
        np.testing.assert_allclose(reward, [expected], rtol=1e-6)
        assert game.score("307", text) == pytest.approx(expected)


@pytest.mark.parametrize("partial_credit", [False, True])
@pytest.mark.parametrize("digits, base, length", [(3, 10, 4), (2, 3, 6)])
def test_reward_in_jit_is_the_score_on_the_host(digits, base, length, partial_credit):
    task = toy(500, 1, seed=0, digits=digits, base=base, partial_credit=partial_credit)
    game, rng = ReverseDigits(digits, base, partial_credit), np.random.default_rng(0)
    rows = [task.train[i] for i in rng.integers(len(task.train), size=300)]
    prompts = encoded(game, [e.question for e in rows])
    # Random completions, a third of them right up to a random position, ended by a sampled end or by the length limit.
    completion = rng.integers(0, 2 + base, (300, length))
    targets = np.pad(np.asarray(game.targets(prompts)), ((0, 0), (0, length - digits - 1)))
    right = (rng.random(300) < 0.5)[:, None] & (np.arange(length) < rng.integers(0, digits + 2, 300)[:, None])
    completion = np.where(right, targets, completion)
    ended = np.cumsum(completion == 0, axis=1)
    mask = (ended - (completion == 0)) == 0
    texts = [game.tokenizer.decode(row[m]) for row, m in zip(completion, mask, strict=True)]
    host = task.score(rows, texts)
    graph = jax.jit(game.reward)(prompts, completion, mask)
    np.testing.assert_allclose(graph, [s.reward for s in host], rtol=1e-6)
    assert [s.correct for s in host] == list(np.asarray(graph) == 1)
    assert len({float(g) for g in graph}) > 1
    batched = jax.vmap(game.reward)(prompts[:, None], completion[:, None], mask[:, None])[:, 0]
    np.testing.assert_array_equal(batched, graph)


def test_prompts_are_those_of_the_tokenizer_and_padding_is_ignored():
    game = ReverseDigits(digits=4, base=16)
    prompts = game.prompts(jax.random.key(0), 64)
    assert prompts.shape == (64, 5) and prompts.dtype == jnp.int32
    np.testing.assert_array_equal(prompts, game.prompts(jax.random.key(0), 64))
    texts = [game.tokenizer.decode(p) for p in np.asarray(prompts)]
    np.testing.assert_array_equal(prompts, [game.tokenizer.encode(t) for t in texts])
    targets = game.targets(jnp.pad(prompts, ((0, 0), (3, 0))))
    np.testing.assert_array_equal(targets, game.targets(prompts))
    assert [game.tokenizer.decode(t) for t in np.asarray(targets)] == [t[-2::-1] for t in texts]
    assert (game.reward(prompts, targets, jnp.ones((64, 5))) == 1).all()


def test_the_task():
    task = toy(train_size=200, test_size=30, seed=0, digits=2)
    assert len({e.question for e in task.test}) == 30
    assert {e.question for e in task.train}.isdisjoint(e.question for e in task.test)
    assert len(task.train) == 200 - task.report["train/removed"] < 200
    assert all(s.correct for s in task.score(task.test, [task.demonstrate(e) for e in task.test]))
    assert toy(200, 30, seed=0, digits=2).train == task.train != toy(200, 30, seed=1, digits=2).train
    assert len(toy(5, 5, seed=0, digits=15).train) == 5
    with pytest.raises(ValueError, match="test_size=100 leaves nothing to train on: 100 different prompts exist"):
        toy(5, 100, seed=0, digits=2)


def test_errors():
    game = ReverseDigits()
    with pytest.raises(ValueError, match="3 completion tokens cannot hold 3 digits and the end"):
        game.reward(encoded(game, ["123"]), jnp.zeros((1, 3), int), jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="digits must be a whole number of at least 1, not 0"):
        ReverseDigits(digits=0)
    with pytest.raises(ValueError, match="digits=30 of base 10 give more prompts than can be numbered"):
        toy(5, 5, seed=0, digits=30)
    with pytest.raises(ValueError, match="base must be a whole number in"):
        ReverseDigits(base=1)


def test_a_tiny_policy_learns_it_inside_one_scan():
    """REINFORCE with the group's mean as baseline; the policy is linear in the prompt, one matrix for each position."""
    game = ReverseDigits(digits=3, base=10, partial_credit=True)
    prompts, responses, length, vocab = 16, 8, 5, 12

    def logits(weights, tokens):  # [N, P] -> [N, T, V]
        return jnp.einsum("npv,tpvw->ntw", jax.nn.one_hot(tokens, vocab), weights)

    def step(weights, key):
        ask, draw = jax.random.split(key)
        tokens = jnp.repeat(game.prompts(ask, prompts), responses, axis=0)
        completion = jax.random.categorical(draw, logits(weights, tokens))
        ends = jnp.cumsum(completion == 0, axis=1) - (completion == 0)
        mask = (ends == 0).astype(jnp.float32)
        reward = game.reward(tokens, completion, mask).reshape(prompts, responses)
        advantage = (reward - reward.mean(1, keepdims=True)).reshape(-1, 1)

        def loss(w):
            logp = jnp.take_along_axis(jax.nn.log_softmax(logits(w, tokens)), completion[..., None], -1)[..., 0]
            return -jnp.sum(advantage * mask * logp)

        return weights - 0.05 * jax.grad(loss)(weights), reward.mean()

    @jax.jit
    def train(key):
        return jax.lax.scan(step, jnp.zeros((length, 4, vocab, vocab)), jax.random.split(key, 300))[1]

    rewards = np.asarray(train(jax.random.key(0)))
    assert rewards[:10].mean() < 0.2 and rewards[-10:].mean() > 0.9, rewards[::30]
