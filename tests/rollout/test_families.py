"""Cached decoding against the uncached policy, for every feature that the families differ in: sampler and trainer agree
where windows are shorter than the text, prompts are ragged and padded on the left, and responses share them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.batch import from_sequences
from jaxpo.parallel import make_mesh, rows_over_mesh, shardings
from jaxpo.policy.families import config_from_hf
from jaxpo.policy.hf import load
from jaxpo.policy.stats import completion_hidden, token_stats
from jaxpo.policy.transformer import build
from jaxpo.rollout import SamplingOptions, generate
from tests.oracles.cases import COMPILE_FAST
from tests.policy import tiny_hf

EOS, K = (5, 17), 2
FEATURES = {
    "a window": "mistral",
    "windows and biases": "qwen2_window",
    "qk-norm": "qwen3",
    "experts": "qwen3_moe",
    "soft-caps": "gemma2",
    "two rotary bases": "gemma3",
}


@partial(jax.jit, static_argnums=0, compiler_options=COMPILE_FAST)
def both(config, params, tokens, length):
    """Rollouts, and the trainer's log-probs of them."""
    model = build(config)
    options = SamplingOptions(tiny_hf.NEW, EOS)
    out = generate(model, params, tokens, jax.random.key(0), options, prompt_length=length, responses=K)
    return out, token_stats(model, params, out).logp


@pytest.mark.parametrize("feature", FEATURES)
def test_the_sampler_gives_the_trainers_log_probs(feature):
    source = tiny_hf.random_source(FEATURES[feature])
    config = config_from_hf(source.config)
    out, logp = both(config, load(source, config), *tiny_hf.padded())
    np.testing.assert_allclose(out.logp_beh, logp * out.mask, atol=1e-4)
    longest = np.asarray(out.mask).sum(-1) + np.repeat(tiny_hf.padded()[1], K)
    assert config.window is None or longest.max() > 2 * config.window
    assert np.asarray(logp)[np.asarray(out.mask) > 0].std() > 0.3


def test_a_window_that_no_text_fills_is_no_window():
    source = tiny_hf.random_source("mistral")
    params = load(source, config_from_hf(source.config))
    wide, none = (config_from_hf({**source.config, "sliding_window": window}) for window in (100, None))
    assert wide.window == 100 and none.window is None
    (a, logp_a), (b, logp_b) = (both(config, params, *tiny_hf.padded()) for config in (wide, none))
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(logp_a, logp_b, atol=1e-6)
    short, logp = both(config_from_hf(source.config), params, *tiny_hf.padded())
    assert (np.asarray(short.tokens) != np.asarray(a.tokens)).any()  # a short one changes what is sampled


@pytest.mark.slow
def test_experts_over_the_mesh():
    """Tokens are sorted by expert across devices: the same hidden states and gradients."""
    source = tiny_hf.random_source("qwen3_moe")
    config = config_from_hf(source.config)
    mesh, params = make_mesh(dict(fsdp=2, tensor=2), jax.devices()[:4]), load(source, config)
    placed = load(source, config, mesh)
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings(placed, mesh)
    batch = jax.tree.map(jnp.asarray, from_sequences(tiny_hf.PROMPTS, tiny_hf.PROMPTS[::-1]))

    @partial(jax.jit, compiler_options=COMPILE_FAST)
    def run(params, batch):
        return jax.value_and_grad(lambda p: jnp.sin(completion_hidden(build(config), p, batch)).sum())(params)

    one, spread = run(params, batch), run(placed, rows_over_mesh(batch, mesh))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), spread, one)
    assert np.abs(one[1]["blocks"]["router"]).max() > 1e-2
