"""Attention of long sequences, whose scores are held a part at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.policy import attention
from jaxpo.policy.config import TransformerConfig


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("queries", [2, 4])
def test_parts_give_the_value_and_gradients_of_the_whole(monkeypatch, softcap, queries):
    config, rng = TransformerConfig(vocab_size=8, attention_softcap=softcap), np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 11, 4, 16)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, 13, 2, 16)), jnp.float32) for _ in range(2))
    mask = jnp.asarray(rng.random((2, 11, 13)) < 0.7).at[:, :, 0].set(True)

    def loss(q, k, v):
        return jnp.sum(jnp.sin(attention.attention(config, q, k, v, mask)))

    whole = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
    monkeypatch.setattr(attention, "QUERIES_AT_ONCE", queries)
    parts = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
    assert "scan" in str(jax.make_jaxpr(loss)(q, k, v))
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
