"""The fused attention, interpreted, beside the plain one; its compiled form is in tests/parallel/test_plan_aot.py."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.parallel import make_mesh
from jaxpo.plan import operations
from jaxpo.policy import attention, splash, stats, transformer
from jaxpo.policy.config import EVERYWHERE, TransformerConfig
from jaxpo.rollout import SamplingOptions, generate

B, TQ, TK, D = 2, 150, 290, 16
CASES = {
    "soft-cap, scale, a mesh": dict(attention_softcap=5.0, query_scalar=3.0, mesh=dict(data=1, fsdp=2, tensor=2)),
    "a window of some layers": dict(window=jnp.int32(40)),
    "no window of some layers": dict(window=jnp.int32(EVERYWHERE)),
    "a window": dict(window=40),
    "nothing": dict(),
}
SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in list(CASES)[2:]]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Blocks of 128, so that there are several; and as if on a chip that has the kernels."""
    monkeypatch.setattr(splash, "BLOCK", 128)
    monkeypatch.setattr(splash, "attention", partial(splash.attention, interpret=True))
    monkeypatch.setattr(splash, "why_not", lambda q, mesh: None)


@pytest.mark.parametrize("case", [*list(CASES)[:2], *SLOW])
def test_values_and_gradients_are_those_of_the_plain_form(case):
    options = dict(CASES[case])
    window, mesh = options.pop("window", None), options.pop("mesh", None)
    mesh = mesh and make_mesh(mesh, jax.devices()[:4])
    limit = {"window": 40} if window is not None else {}
    config = TransformerConfig(vocab_size=8, heads=4, kv_heads=2, head_dim=D, **limit, **options)
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(B, TQ, 4, D)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(B, TK, 2, D)), jnp.float32) for _ in range(2))
    of_key = jnp.ones((B, TK), jnp.int32).at[0, :7].set(0).at[1, 200:].set(2)  # left padding; a second text
    of_query = of_key[:, TK - TQ :]

    def loss(name, q, k, v):
        c = dataclasses.replace(config, attention=name)
        out = attention.causal_attention(c, q, k, v, of_query, of_key, window, mesh)
        return jnp.sum(jnp.sin(3 * out)), out

    grad = {n: jax.jit(jax.grad(partial(loss, n), (0, 1, 2), has_aux=True)) for n in ("splash", "xla")}
    got, expected = (grad[n](q, k, v) for n in ("splash", "xla"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, expected)
    assert "pallas_call" in str(jax.make_jaxpr(grad["splash"])(q, k, v))


def test_the_sampler_and_the_trainer_agree():
    """As they do with the plain form, in tests/rollout/test_engine.py."""
    shape = dict(width=32, layers=2, heads=2, kv_heads=1, attention_softcap=20.0, window=4, local_layers=(0,))
    config = TransformerConfig(vocab_size=11, attention="splash", **shape)
    model, params = transformer.build(config), transformer.init(config, jax.random.key(0))
    params = jax.tree.map(lambda x: 3 * x, params)
    prompts, length = jnp.arange(12).reshape(2, 6) % 11, jnp.array([6, 3])
    sample = jax.jit(partial(generate, model), static_argnames="responses")
    out = sample(params, prompts, jax.random.key(1), SamplingOptions(9), prompt_length=length, responses=2)
    told = jax.jit(partial(stats.token_stats, model))(params, out).logp
    np.testing.assert_allclose(told * out.mask, out.logp_beh, atol=2e-5)
    assert np.ptp(out.logp_beh) > 0.1


def test_operations_are_those_of_the_blocks_that_are_not_skipped():
    config = TransformerConfig(vocab_size=8, heads=4, kv_heads=2, head_dim=D, attention="splash")
    q, k = jnp.ones((3, 256, 4, D)), jnp.ones((3, 512, 2, D))
    ok = jnp.ones((3, 512))

    def run(q, k, v):
        return attention.causal_attention(config, q, k, v, ok[:, 256:], ok, None)

    blocks = 3 + 4  # of 128 queries and 128 keys, of each head
    once = 2 * 128 * 128 * D * 3 * 4 * blocks
    assert operations.count(jax.make_jaxpr(run)(q, k, k)) == 2 * once  # scores, and their product with the values
    grad = jax.grad(lambda *x: run(*x).sum(), (0, 1, 2))
    assert operations.count(jax.make_jaxpr(grad)(q, k, k)) == pytest.approx((2 + 3 + 4) * once, rel=0.01)


def test_where_it_cannot_run_is_an_error_or_for_auto_the_plain_form(monkeypatch):
    monkeypatch.undo()
    config = TransformerConfig(vocab_size=8, attention="splash")
    q, ok = jnp.ones((1, 2048, 4, D)), jnp.ones((1, 2048))
    with pytest.raises(ValueError, match="policy.attention='splash' cannot be used: it runs on TPUs, not on cpu"):
        attention.causal_attention(config, q, q, q, ok, ok, None)
    monkeypatch.setattr(splash, "target_platform", lambda: "tpu")
    with pytest.raises(ValueError, match="it takes the mesh"):
        attention.causal_attention(config, q, q, q, ok, ok, None)
    mesh = make_mesh(dict(data=8))
    with jax.enable_x64(), pytest.raises(ValueError, match="in float32, not in float64"):
        attention.causal_attention(config, q.astype(jnp.float64), q, q, ok, ok, None, mesh)
    with pytest.raises(ValueError, match="mesh.tensor 8 must divide policy.heads 4"):
        attention.causal_attention(config, q, q, q, ok, ok, None, make_mesh(dict(tensor=8)))
    auto = dataclasses.replace(config, attention="auto")
    text = {}
    for platform in ("cpu", "tpu"):
        monkeypatch.setattr(attention, "target_platform", lambda platform=platform: platform)
        for n in (1024, 1023):
            x, seg = q[:, :n], ok[:, :n]
            f = partial(attention.causal_attention, auto, window=None, mesh=mesh)
            text[platform, n] = "pallas_call" in str(jax.make_jaxpr(f)(x, x, x, seg, seg))
    assert text == {("cpu", 1024): False, ("cpu", 1023): False, ("tpu", 1024): True, ("tpu", 1023): False}
    with pytest.raises(ValueError, match="policy.attention 'splsh'.*splash"):
        TransformerConfig(vocab_size=8, attention="splsh")
