"""Adapters: the base at first, beside it what a merged copy gives, and gradients of theirs alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.batch import Rollouts
from jaxpo.policy import lora, transformer
from jaxpo.policy.stats import token_stats
from jaxpo.policy.transformer import TransformerConfig
from jaxpo.rollout import SamplingOptions, generate

CONFIG = TransformerConfig(vocab_size=11, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24)
SCALE = 0.5


MODEL = transformer.build(CONFIG)


@pytest.fixture(scope="module")
def base():
    return transformer.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def batch():
    tokens = jax.random.randint(jax.random.key(1), (4, 7), 0, 11)
    return Rollouts(tokens=tokens, mask=jnp.ones((4, 4)))


@jax.jit
def logp_of(params, batch):
    return token_stats(MODEL, params, batch).logp


def adapters(base, targets=lora.TARGETS, *, moved=True, rank=3):
    """Of ``init``, with ``b`` away from zero when ``moved``."""
    out = lora.init(base, jax.random.key(2), rank=rank, targets=targets)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), out) if moved else out


def test_a_policy_starts_as_its_base_bit_for_bit(base, batch):
    start = lora.attach(base, adapters(base, moved=False), SCALE)
    assert jnp.array_equal(logp_of(start, batch), logp_of(base, batch))


@pytest.mark.parametrize("targets", [("wo",), ("wq", "w_in"), lora.TARGETS])
def test_beside_the_base_adapters_compute_what_a_merged_copy_does(base, batch, targets):
    own = adapters(base, targets)
    beside = logp_of(lora.attach(base, own, SCALE), batch)
    merged = lora.merge(base, own, SCALE)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, base)
    np.testing.assert_allclose(beside, logp_of(merged, batch), atol=1e-5)
    assert np.abs(beside - logp_of(base, batch)).max() > 1e-3


def test_a_merged_matrix_is_the_formula(base):
    own = adapters(base, ("wo", "w_in"))
    merged = lora.merge(base, own, SCALE)["blocks"]
    for name, letters in dict(wo="lhdr,lrD->lhdD", w_in="lDgr,lrgm->lDgm").items():
        a, b = (np.asarray(own["blocks"][name][x], np.float64) for x in "ab")
        expected = np.asarray(base["blocks"][name], np.float64) + SCALE * np.einsum(letters, a, b)
        np.testing.assert_allclose(merged[name], expected, atol=1e-6)
    assert merged["wq"] is base["blocks"]["wq"]


def test_the_sampler_gives_the_log_probs_of_the_trainer(base):
    params = lora.attach(base, adapters(base), SCALE)
    prompts, options = jnp.array([[1, 2, 3], [4, 5, 6]]), SamplingOptions(max_new_tokens=4)
    out = jax.jit(lambda params: generate(MODEL, params, prompts, jax.random.key(3), options, responses=2))(params)
    np.testing.assert_allclose(out.logp_beh, logp_of(params, out), atol=1e-5)


def test_gradients_are_those_of_the_merged_copy_by_the_chain_rule(base, batch):
    own = adapters(base)

    def total(params):
        return logp_of(params, batch).sum()

    got, expected = (
        jax.jit(jax.grad(lambda own, way=way: total(way(base, own, SCALE))))(own) for way in (lora.attach, lora.merge)
    )
    assert jax.tree.structure(got) == jax.tree.structure(own)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, expected)


def test_adapters_beside_the_base_take_no_memory_for_a_copy_of_it():
    """The scratch of a compiled gradient is smaller than the block weights; that of a merged copy holds them."""
    config = TransformerConfig(vocab_size=11, width=64, layers=6, heads=2, mlp_width=256)
    model, base = transformer.build(config), transformer.init(config, jax.random.key(0))
    own, few = adapters(base, rank=2), Rollouts(tokens=jnp.ones((1, 4), jnp.int32), mask=jnp.ones((1, 2)))

    def scratch(way):
        grad = jax.grad(lambda own, base: token_stats(model, way(base, own, SCALE), few).logp.sum())
        return jax.jit(grad).lower(own, base).compile().memory_analysis().temp_size_in_bytes

    weights = sum(x.nbytes for x in jax.tree.leaves(base["blocks"]))
    assert scratch(lora.attach) < 0.5 * weights and scratch(lora.merge) > weights


def test_computation_in_bfloat16_with_float32_adapters(base, batch):
    config = TransformerConfig(**{**CONFIG.__dict__, "dtype": "bfloat16", "param_dtype": "bfloat16"})
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    own = adapters(half)
    assert {x.dtype for x in jax.tree.leaves(own)} == {jnp.dtype("float32")}
    apply = jax.jit(lambda params: token_stats(transformer.build(config), params, batch).logp)
    logp = apply(lora.attach(half, own, SCALE))
    assert logp.dtype == jnp.float32 and np.isfinite(logp).all()
    assert {x.dtype for x in jax.tree.leaves(lora.merge(half, own, SCALE))} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("rank", "targets", "experts", "message"),
    [
        (0, ("wq",), False, "lora.rank must be a whole number of at least 1, not 0"),
        (2, (), False, "lora.targets is empty: name some of wq"),
        (2, ("wqq",), False, "unknown lora target 'wqq': did you mean 'wq'"),
        (2, ("wq", "w_in"), True, "w_in of a mixture of experts has no adapter"),
    ],
)
def test_what_is_refused(rank, targets, experts, message):
    with pytest.raises(ValueError, match=message):
        lora.check(rank, targets, experts=experts)
