"""Experts on eight simulated devices: what one computes, whatever the router does."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as Spec

from jaxpo.batch import from_sequences
from jaxpo.parallel import make_mesh, rows_over_mesh, shardings
from jaxpo.plan import operations
from jaxpo.policy import experts
from jaxpo.policy.stats import token_stats
from jaxpo.policy.transformer import TransformerConfig, build, init
from jaxpo.rollout import SamplingOptions, generate
from tests.oracles.cases import COMPILE_FAST

SHAPE = dict(vocab_size=12, width=8, layers=2, heads=2, mlp_width=4, experts=8, experts_per_token=3, norm_topk=True)
CONFIG = TransformerConfig(**SHAPE)
MESHES = (dict(fsdp=2, expert=2, tensor=2), dict(data=2, expert=4), dict(expert=4, context=2))


def assert_same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, want)


def by_definition(x, weight, chosen, w_in, w_down):
    """Every expert for every token, in float64."""
    x, weight, w_in, w_down = (np.asarray(y, np.float64) for y in (x, weight, w_in, w_down))
    gate, up = np.moveaxis(np.einsum("...d,edum->...eum", x, w_in), -2, 0)
    every = np.einsum("...em,emd->...ed", gate / (1 + np.exp(-gate)) * up, w_down)
    return (np.take_along_axis(every, np.asarray(chosen)[..., None], -2) * weight[..., None]).sum(-2)


@pytest.mark.parametrize("sizes", [None, *MESHES], ids=str)
@pytest.mark.parametrize("shape", [(4, 6), (7,)], ids=["positions", "single tokens"])
@pytest.mark.parametrize("at_once", [8192, 5])
def test_exact_whatever_the_router_does(monkeypatch, sizes, shape, at_once):
    monkeypatch.setattr(experts, "TOKENS_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    x, w_in = rng.normal(size=(*shape, 8)), rng.normal(size=(8, 8, 2, 4))
    arrays = [jnp.asarray(y, jnp.float32) for y in (x, rng.random((*shape, 3)), w_in, rng.normal(size=(8, 4, 8)))]
    mesh = sizes and make_mesh(sizes)
    run = jax.jit(partial(experts.mixture, CONFIG, mesh=mesh), compiler_options=COMPILE_FAST)
    spread = np.argsort(rng.random((*shape, 8)), -1)[..., :3]
    for chosen in (spread, np.broadcast_to([5, 4, 7], (*shape, 3))):  # the latter: all of them to one device
        got = run(arrays[0], arrays[1], jnp.asarray(chosen), *arrays[2:])
        np.testing.assert_allclose(got, by_definition(*arrays[:2], chosen, *arrays[2:]), rtol=1e-4, atol=1e-5)


def test_operations_are_those_of_the_experts_that_were_chosen():
    """On a mesh as without one: 3 experts a token, three products of 8 x 4, and twice as many for each gradient."""
    arrays = jnp.ones((16, 8)), jnp.ones((16, 3)), jnp.zeros((16, 3), int), jnp.ones((8, 8, 2, 4)), jnp.ones((8, 4, 8))
    for mesh in (None, make_mesh(MESHES[1]), make_mesh(MESHES[0])):

        def loss(x, w_in, w_down, mesh=mesh):
            return jnp.sum(jnp.sin(experts.mixture(CONFIG, x, *arrays[1:3], w_in, w_down, mesh)))

        program = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(arrays[0], *arrays[3:])
        assert operations.count(program) == 3 * 16 * 3 * 3 * 2 * 8 * 4


def rollouts():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 12, n).tolist() for n in (3, 1, 4, 2) for _ in range(2)]
    prompts = [prompts[i - i % 2] for i in range(8)]
    return from_sequences(prompts, rng.integers(0, 12, (8, 5)).tolist(), shared_prompt=2)


@pytest.mark.parametrize("sizes", [MESHES[0], *(pytest.param(m, marks=pytest.mark.slow) for m in MESHES[1:])], ids=str)
@pytest.mark.parametrize("at_once", [8192, pytest.param(5, marks=pytest.mark.slow)])
def test_a_policys_values_and_gradients(monkeypatch, sizes, at_once):
    monkeypatch.setattr(experts, "TOKENS_AT_ONCE", at_once)
    params, batch, mesh = init(CONFIG, jax.random.key(0)), rollouts(), make_mesh(sizes)

    def loss(params, batch, mesh):
        stats = token_stats(build(CONFIG, mesh), params, batch, mesh=mesh)
        return jnp.sum(jnp.sin(stats.logp) + stats.entropy), stats

    def run(mesh):
        return jax.jit(jax.value_and_grad(partial(loss, mesh=mesh), has_aux=True), compiler_options=COMPILE_FAST)

    placed = jax.device_put(params, shardings(params, mesh)), rows_over_mesh(batch, mesh)
    assert_same(run(mesh)(*placed), run(None)(params, batch))


def test_they_lie_over_their_axis():
    mesh = make_mesh(MESHES[0])
    specs = jax.tree.map(lambda s: s.spec, shardings(jax.eval_shape(partial(init, CONFIG), jax.random.key(0)), mesh))
    assert specs["blocks"]["w_in"] == Spec(None, "expert", "fsdp", None, "tensor")
    assert specs["blocks"]["w_down"] == Spec(None, "expert", "tensor", "fsdp")
    with pytest.raises(ValueError, match=r"mesh.expert=4 does not divide axis 1 of blocks/w_.*a divisor of 6"):
        six = TransformerConfig(**SHAPE | dict(experts=6))
        shardings(jax.eval_shape(partial(init, six), jax.random.key(0)), make_mesh(MESHES[1]))


@pytest.mark.parametrize("sizes", [MESHES[2], pytest.param(MESHES[0], marks=pytest.mark.slow)], ids=str)
def test_rollouts(sizes):
    """The sampler's numbers are those of one device, and the scorer's on the mesh."""
    mesh, params = make_mesh(sizes), init(CONFIG, jax.random.key(0))
    prompts = jnp.asarray(np.random.default_rng(0).integers(0, 12, (8, 3)))
    options = SamplingOptions(max_new_tokens=4, eos_ids=(0,))

    def run(mesh):
        model = build(CONFIG, mesh)
        sample = partial(generate, model, key=jax.random.key(1), options=options, responses=2)
        return jax.jit(sample, compiler_options=COMPILE_FAST)

    got = run(mesh)(jax.device_put(params, shardings(params, mesh)), rows_over_mesh(prompts, mesh))
    want = run(None)(params, prompts)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logp_beh, want.logp_beh, rtol=2e-5, atol=2e-6)
    assert {s.data.shape[0] for s in got.tokens.addressable_shards} == {16 * mesh.shape["tensor"] // 8}
