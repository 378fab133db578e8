"""What the policy says of a batch: shared prompts, padding, log-probs and entropy against float64."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.batch import Rollouts, from_sequences, pad
from jaxpo.parallel import make_mesh
from jaxpo.policy.attention import prompt_mask
from jaxpo.policy.stats import completion_hidden, policy_of, token_stats
from jaxpo.policy.transformer import TransformerConfig, build, init
from tests.oracles.cases import COMPILE_FAST
from tests.oracles.transformer import log_softmax

CONFIG = TransformerConfig(vocab_size=13, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24)
MODEL = build(CONFIG)
PROMPTS, COMPLETIONS = ([4, 9, 2], [7]), ([5, 1, 3, 8], [6, 0, 0], [12], [2, 11, 10, 1], [1, 1, 1, 1], [3, 4])


@cache
def params():
    rng = np.random.default_rng(0)

    def draw(x):
        return jnp.asarray(rng.normal(x.ndim < 2, 0.4, x.shape), x.dtype)  # norms about 1, matrices about 0

    return jax.tree.map(draw, jax.eval_shape(partial(init, CONFIG), jax.random.key(0)))


def batch_of(k=3, **kwargs):
    """Two prompts with three completions each; k says in runs of how many rows the prompt is shared."""
    prompts = [p for p in PROMPTS for _ in range(3)]
    return jax.tree.map(jnp.asarray, from_sequences(prompts, COMPLETIONS, shared_prompt=k, **kwargs))


@partial(jax.jit, compiler_options=COMPILE_FAST)
def run(params, batch, temperature=1.0):
    return token_stats(MODEL, params, batch, temperature=temperature)


@partial(jax.jit, compiler_options=COMPILE_FAST)
def logits_of(params, batch):
    return MODEL.logits(params, completion_hidden(MODEL, params, batch))


@partial(jax.jit, compiler_options=COMPILE_FAST)
def gradient(params, batch):
    def loss(params):
        stats = token_stats(MODEL, params, batch)
        return jnp.sum(batch.mask * (stats.logp * jnp.sin(1 + jnp.arange(batch.rows))[:, None] + stats.entropy))

    return jax.grad(loss)(params)


def assert_same(a, b, mask):
    for name in ("logp", "entropy"):
        np.testing.assert_allclose(
            getattr(a, name)[:, : mask.shape[1]] * mask, getattr(b, name)[:, : mask.shape[1]] * mask, atol=2e-5
        )


def padded(k):
    """The same batch, wider on both sides; what stands in the padding does not matter."""
    wide = pad(batch_of(k), width=6, prompt_width=5)
    tokens = np.array(wide.tokens)
    tokens[:, :2] = tokens[3:, :4] = tokens[:, -2:] = 8
    return wide.replace(tokens=jnp.asarray(tokens))


def test_shared_prompt_equals_one_prompt_a_row():
    assert_same(run(params(), batch_of(3)), run(params(), batch_of(1)), batch_of().mask)


def test_padding_changes_nothing():
    assert_same(run(params(), padded(3)), run(params(), batch_of(3)), batch_of().mask)


def test_gradient_changes_neither_with_sharing_nor_with_padding():
    a, b = gradient(params(), padded(3)), gradient(params(), batch_of(1))
    assert all(np.isfinite(x).all() and np.abs(x).max() > 1e-2 for x in jax.tree.leaves(a))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), a, b)


def test_prompt_length_none_is_the_whole_width():
    full = batch_of(1).replace(prompt_length=jnp.full(6, 3, jnp.int32))
    np.testing.assert_allclose(
        run(params(), full.replace(prompt_length=None)).logp, run(params(), full).logp, atol=1e-6
    )
    assert prompt_mask(None, 2, 3).all()
    np.testing.assert_array_equal(prompt_mask(jnp.array([0, 2]), 2, 3), [[False] * 3, [False, True, True]])


def test_one_token_completions():
    long = run(params(), batch_of())
    prompts = [p for p in PROMPTS for _ in range(3)]
    short = jax.tree.map(jnp.asarray, from_sequences(prompts, [c[:1] for c in COMPLETIONS], shared_prompt=3))
    assert_same(run(params(), short), long, np.ones((6, 1)))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logp_and_entropy_equal_a_float64_softmax(temperature):
    batch = batch_of()
    logits = np.asarray(logits_of(params(), batch), np.float64)
    log_p = log_softmax(logits / temperature)
    stats = run(params(), batch, temperature=temperature)
    assert stats.logp.dtype == stats.entropy.dtype == jnp.float32 and stats.logp.shape == (6, 4)
    np.testing.assert_allclose(
        stats.logp, np.take_along_axis(log_p, np.asarray(batch.completions)[..., None], -1)[..., 0], atol=1e-5
    )
    np.testing.assert_allclose(stats.entropy, -(np.exp(log_p) * log_p).sum(-1), atol=1e-5)
    assert stats.entropy.min() < 0.6 * np.log(13)  # far from uniform, so the test tests something


def test_only_what_is_wanted_is_there():
    stats = jax.eval_shape(partial(token_stats, MODEL, wants=frozenset({"logp"})), params(), batch_of())
    assert stats.logp.shape == (6, 4) and stats.entropy is None and not stats.derived


def test_what_else_the_pass_can_give():
    batch, shape = batch_of(), (6, 4)
    log_p = log_softmax(np.asarray(logits_of(params(), batch), np.float64) / 0.6)
    wants = frozenset({"logsumexp", "sum_p2", "top1", "logp_at_temperature", "peak"})
    derived = {"peak": lambda logits, tokens: jax.nn.softmax(logits).max(-1)}
    policy = policy_of(MODEL, wants=wants, derived=derived, temperature=0.6, second_temperature=0.6)
    stats = jax.jit(policy, compiler_options=COMPILE_FAST)(params(), batch)
    assert stats.entropy is None and all(x.shape == shape for x in stats.derived.values())
    np.testing.assert_allclose(stats.derived["logp_at_temperature"], stats.logp, atol=1e-6)
    np.testing.assert_array_equal(stats.derived["top1_id"], log_p.argmax(-1))
    for name, x in dict(top1_logp=log_p.max(-1), peak=np.exp(log_p.max(-1)), sum_p2=np.exp(2 * log_p).sum(-1)).items():
        np.testing.assert_allclose(stats.derived[name], x, atol=1e-5, err_msg=name)
    with pytest.raises(ValueError, match="second_temperature must be given together"):
        token_stats(MODEL, params(), batch, wants=frozenset({"logp_at_temperature"}))


def test_head_over_the_mesh():
    """13 entries over 4 devices, 6 x 4 tokens over 2: nothing divides, nothing changes."""
    mesh = make_mesh({"data": 2, "tensor": 4})
    batch = batch_of()

    def loss(params, mesh):
        stats = token_stats(MODEL, params, batch, mesh=mesh)
        return jnp.sum(batch.mask * (stats.logp * jnp.sin(1 + jnp.arange(batch.rows))[:, None] + stats.entropy))

    grad = jax.jit(jax.value_and_grad(loss), static_argnums=1, compiler_options=COMPILE_FAST)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), grad(params(), mesh), grad(params(), None))


def test_only_what_this_policy_gives_can_be_wanted():
    with pytest.raises(ValueError, match="unknown policy statistic 'entrpy': did you mean 'entropy'"):
        token_stats(MODEL, params(), batch_of(), wants=frozenset({"logp", "entrpy"}))
    with pytest.raises(ValueError, match="the policy's parameters have no value head"):
        policy_of(MODEL, wants=frozenset({"value"}))(params(), batch_of())


def test_policy_of_binds_the_options():
    policy = policy_of(MODEL, temperature=0.6, wants=frozenset({"logp"}))
    assert policy.func is token_stats and policy.args == (MODEL,)
    assert policy.keywords == dict(temperature=0.6, wants=frozenset({"logp"}))


def test_a_policy_needs_tokens():
    with pytest.raises(ValueError, match="Rollouts.tokens is required"):
        token_stats(MODEL, params(), Rollouts(mask=jnp.ones((2, 3))))
