"""Positions spread over devices: what one computes, with a share of its memory and work."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxpo.batch import from_sequences
from jaxpo.kernels.token_logprob import plan
from jaxpo.parallel import ROWS, by_row, by_token, make_mesh, rows_over_mesh, shardings
from jaxpo.policy import attention, splash
from jaxpo.policy.loss import policy_loss
from jaxpo.policy.stats import completion_hidden, token_stats
from jaxpo.policy.transformer import TransformerConfig, build, init
from tests.oracles.cases import COMPILE_FAST

SHAPE = dict(vocab_size=12, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24, tied=False)
WINDOWS = dict(window=3, local_layers=(0,), attention_softcap=5.0)
WANTS = frozenset({"logp", "entropy"})


def ragged(prompt_lengths=(3, 1, 4, 2), width=5, per_prompt=2):
    """Prompts of up to 4 tokens, neither they nor the completions a multiple of anything."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 12, n).tolist() for n in prompt_lengths for _ in range(per_prompt)]
    prompts = [prompts[i - i % per_prompt] for i in range(len(prompts))]
    return from_sequences(prompts, rng.integers(0, 12, (len(prompts), width)).tolist(), shared_prompt=per_prompt)


def on(mesh, params, batch):
    return jax.device_put(params, shardings(params, mesh)), rows_over_mesh(batch, mesh)


def assert_same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, want)


def score(stats, part):
    """A loss of whole rows: their ratios are products over positions."""
    return jnp.sum(jnp.exp((stats.logp * part.mask).mean(-1)) + (stats.entropy * part.mask).sum(-1)), {}


@pytest.mark.parametrize(
    ("sizes", "fields", "batch"),
    [
        (dict(fsdp=2, context=2, tensor=2), {}, ragged()),
        pytest.param(dict(data=2, context=4), WINDOWS, ragged(), marks=pytest.mark.slow),
        pytest.param(dict(context=8), {}, ragged((1, 1), 1, 4), marks=pytest.mark.slow),
    ],
    ids=["all axes", "windows", "more devices than positions"],
)
def test_values_and_gradients_are_those_of_one_device(sizes, fields, batch):
    model, mesh = build(TransformerConfig(**SHAPE, **fields)), make_mesh(sizes)
    params = init(model.config, jax.random.key(0))

    def loss(params, batch, mesh):
        stats = token_stats(model, params, batch, mesh=mesh)
        return score(stats, batch)[0], stats

    def run(mesh):
        return jax.jit(jax.value_and_grad(partial(loss, mesh=mesh), has_aux=True), compiler_options=COMPILE_FAST)

    assert_same(run(mesh)(*on(mesh, params, batch)), run(None)(params, batch))


def test_a_loss_in_one_pass_sees_whole_rows(monkeypatch):
    """Statistics of a slice come from all devices along the axis, each gets the cotangents of its own."""
    monkeypatch.setattr(plan, "TOKENS_AT_ONCE", (5, 5))
    mesh = make_mesh(dict(data=2, context=2), jax.devices()[:4])
    model, batch = build(TransformerConfig(**SHAPE)), ragged()
    params = init(model.config, jax.random.key(0))

    def run(platform, mesh):
        f = partial(policy_loss, model, loss=score, wants=WANTS, temperature=0.8, platform=platform, mesh=mesh)
        return jax.value_and_grad(lambda p, b: f(p, b)[0])

    got, want = (jax.jit(run(*x), compiler_options=COMPILE_FAST) for x in (("gpu", mesh), ("cpu", None)))
    assert "length=4" in str(jax.make_jaxpr(run("gpu", mesh))(params, batch)), "two devices with four slices of a row"
    assert_same(got(*on(mesh, params, batch)), want(params, batch))


def test_queries_in_parts_are_each_devices_own(monkeypatch):
    model, mesh, batch = build(TransformerConfig(**SHAPE)), make_mesh(dict(data=4, context=2)), ragged(width=29)
    params = init(model.config, jax.random.key(0))
    want = completion_hidden(model, params, batch)
    monkeypatch.setattr(attention, "QUERIES_AT_ONCE", 4)
    run = jax.jit(completion_hidden, static_argnums=(0, 3), compiler_options=COMPILE_FAST)
    got = run(model, *on(mesh, params, batch), mesh)
    np.testing.assert_allclose(got[:, :29], want, rtol=1e-5, atol=1e-5)
    assert {s.data.shape for s in got.addressable_shards} == {(2, 15, 16)}
    program = str(jax.make_jaxpr(lambda p, b: completion_hidden(model, p, b, mesh))(params, batch))
    assert "2,4,4,4,4" in program  # of 15 queries: 4 parts of 4, [parts, rows, queries, heads, d] = [4, 2, 4, 4, 4]


@pytest.mark.slow
def test_the_fused_form_over_positions(monkeypatch):
    """What a part of the queries may see is turned around, the future first: its kernel takes that, too."""
    monkeypatch.setattr(splash, "BLOCK", 128)
    monkeypatch.setattr(splash, "attention", partial(splash.attention, interpret=True))
    monkeypatch.setattr(splash, "why_not", lambda q, mesh: None)
    mesh, batch = make_mesh(dict(context=2), jax.devices()[:2]), ragged((3, 1), width=150)
    plain, fused = (TransformerConfig(**SHAPE, window=100, attention=name) for name in ("xla", "splash"))
    params = init(plain, jax.random.key(0))

    def run(config, mesh, *arrays):
        def loss(params, batch):
            hidden = completion_hidden(build(config), params, batch, mesh)[:, :150]
            return jnp.sum(jnp.sin(hidden)), hidden

        return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=COMPILE_FAST)(*arrays)

    got, want = run(fused, mesh, *on(mesh, params, batch)), run(plain, None, params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)


def test_memory_and_work_of_a_device_are_a_share():
    """Compiled, not run: 16 rows of 256 tokens. What is gathered for one layer's attention is not divided."""
    config = TransformerConfig(
        vocab_size=512, width=32, layers=8, heads=4, kv_heads=1, mlp_width=64, scan_layers=True, remat="full"
    )
    model = build(config)
    params = jax.eval_shape(partial(init, config), jax.random.key(0))
    batch = ragged((16, 16), 256, 8)
    used, done = [], []
    for parts in (1, 8):
        mesh = make_mesh(dict(context=parts), jax.devices()[:parts])
        place = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings(params, mesh)
        )
        rows = jax.tree.map(
            lambda x, mesh=mesh: jax.ShapeDtypeStruct(
                jnp.shape(x), jnp.result_type(x), sharding=NamedSharding(mesh, PartitionSpec(ROWS))
            ),
            batch,
        )

        def loss(params, batch, mesh=mesh):
            return score(token_stats(model, params, batch, mesh=mesh), batch)[0]

        program = jax.jit(jax.grad(loss), compiler_options=COMPILE_FAST).lower(place, rows).compile()
        used.append(program.memory_analysis().temp_size_in_bytes)
        done.append(program.cost_analysis()["flops"])
    assert used[1] < 1.25 * used[0] / 8 and done[1] < 1.25 * done[0] / 8


def test_tokens_in_the_order_of_the_devices():
    mesh = make_mesh(dict(data=2, context=4))
    x = np.arange(4 * 8).reshape(4, 8)
    flat = np.asarray(by_token(x, mesh))
    assert flat[:4].tolist() == [0, 1, 8, 9] and flat[4:8].tolist() == [2, 3, 10, 11]
    np.testing.assert_array_equal(by_row(flat, 4, mesh), x)
    np.testing.assert_array_equal(by_token(x, None), x.reshape(-1))


def test_rows_that_do_not_divide():
    mesh = make_mesh(dict(data=4, context=2))
    model = build(TransformerConfig(**SHAPE))
    with pytest.raises(ValueError, match="6 rows do not divide over mesh.data .* = 4, which mesh.context 2 asks for"):
        completion_hidden(model, init(model.config, jax.random.key(0)), ragged((2, 1, 3)), mesh)
