"""Value and score heads on the final hidden state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.batch import Rollouts
from jaxpo.policy import heads, transformer
from jaxpo.policy.stats import completion_hidden, token_stats
from jaxpo.policy.transformer import TransformerConfig

CONFIG = TransformerConfig(vocab_size=11, width=16, layers=1, heads=2)
MODEL = transformer.build(CONFIG)
MASK = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]], jnp.float32)


@pytest.fixture(scope="module")
def params():
    new = heads.init(CONFIG.width, {"value": (), "score": (), "embed": (4,), "gate": (2,)}, jax.random.key(3))
    filled = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape), new)
    return {**transformer.init(CONFIG, jax.random.key(0)), **filled}


@pytest.fixture(scope="module")
def batch():
    return Rollouts(tokens=jax.random.randint(jax.random.key(1), (4, 7), 0, 11), mask=MASK)


def test_a_value_is_of_the_text_before_its_token(params, batch):
    stats = token_stats(MODEL, params, batch, wants=frozenset({"logp", "value"}))
    head = params["heads"]["value"]
    expected = completion_hidden(MODEL, params, batch) @ head["weight"] + head["bias"]
    np.testing.assert_allclose(stats.value, expected, atol=1e-6)
    assert stats.score is None
    other = batch.replace(tokens=batch.tokens.at[:, -2].add(1) % 11)  # the third of four completion tokens
    moved = token_stats(MODEL, params, other, wants=frozenset({"logp", "value"})).value != stats.value
    assert not moved[:, :3].any() and moved[:, 3].all()


def test_a_score_is_of_the_text_with_its_last_token_and_nothing_after(params, batch):
    def score(tokens):
        return token_stats(MODEL, params, batch.replace(tokens=tokens), wants=frozenset({"logp", "score"})).score

    start, prompt = score(batch.tokens), 3
    assert start.shape == (4,)
    for position in range(4):
        moved = score(batch.tokens.at[:, prompt + position].add(1) % 11) != start
        assert moved.tolist() == [position <= last for last in (3, 1, 2, 0)]


def test_what_else_is_said_does_not_change(params, batch):
    plain = token_stats(MODEL, params, batch)
    both = token_stats(MODEL, params, batch, wants=frozenset({"logp", "entropy", "value", "score"}))
    np.testing.assert_allclose(both.logp, plain.logp, atol=1e-6)
    np.testing.assert_allclose(both.entropy, plain.entropy, atol=1e-6)


def test_a_head_that_is_not_there_is_named(batch):
    params = transformer.init(CONFIG, jax.random.key(0))
    with pytest.raises(ValueError, match="no value head: add heads.init"):
        token_stats(MODEL, params, batch, wants=frozenset({"logp", "value"}))
    assert heads.init(CONFIG.width, {}, jax.random.key(0)) == {}


def test_an_embedding_is_of_the_text_that_a_score_is_of_and_a_gate_of_the_prompt(params, batch):
    def said(tokens):
        wants = frozenset({"logp", "score", "embed", "gate"})
        return token_stats(MODEL, params, batch.replace(tokens=tokens), wants=wants)

    start, prompt = said(batch.tokens), 3
    assert start.embed.shape == (4, 4) and start.gate.shape == (4, 2)
    for position in range(-prompt, 4):
        moved = said(batch.tokens.at[:, prompt + position].add(1) % 11)
        assert ((moved.embed != start.embed).any(1) == (moved.score != start.score)).all()
        assert (moved.gate != start.gate).any(1).all() == (position < 0)
    alone = token_stats(MODEL, params, batch, wants=frozenset({"logp", "gate"}))
    np.testing.assert_allclose(alone.gate, start.gate, atol=1e-6)


def test_new_heads_say_0_and_a_new_embedding_something():
    new = heads.init(16, {"score": (), "embed": (4,), "gate": (2,)}, jax.random.key(0))["heads"]
    assert not any(x.any() for name in ("score", "gate") for x in new[name].values())
    assert new["embed"]["weight"].shape == (16, 4) and new["embed"]["weight"].std() > 0.1
