"""Where parameters and rows lie on (2, 2, 2) devices, and that it does not change what is computed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as Spec

from jaxpo.batch import from_sequences
from jaxpo.parallel import batch_shards, constrain_rows, make_mesh, replicated, rows_over_mesh, shardings
from jaxpo.parallel.sharding import spec_of
from jaxpo.policy.stats import completion_hidden, token_stats
from jaxpo.policy.transformer import TransformerConfig, build, init
from tests.oracles.cases import COMPILE_FAST

SHAPE = dict(vocab_size=12, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24, tied=False)


def shapes(**fields):
    return jax.eval_shape(partial(init, TransformerConfig(**{**SHAPE, **fields})), jax.random.key(0))


def cube():
    return make_mesh(dict(data=2, fsdp=2, tensor=2))


def test_parameters_are_cut_by_rule():
    specs = jax.tree.map(lambda s: s.spec, shardings(shapes(), cube()))
    assert specs == {
        "embedding": Spec("tensor", "fsdp"),
        "head": Spec("tensor", "fsdp"),
        "final_norm": Spec(),
        "blocks": {
            "wq": Spec(None, "fsdp", "tensor", None),
            "wk": Spec(None, "fsdp", "tensor", None),
            "wv": Spec(None, "fsdp", "tensor", None),
            "wo": Spec(None, "tensor", None, "fsdp"),
            "w_in": Spec(None, "fsdp", None, "tensor"),
            "w_down": Spec(None, "tensor", "fsdp"),
            "attn_norm": Spec(),
            "mlp_norm": Spec(),
        },
    }
    params = jax.device_put(jax.tree.map(lambda x: jnp.zeros(x.shape), shapes()), shardings(shapes(), cube()))
    for name, x in params["blocks"].items():
        parts = 1 if "norm" in name else 4  # every matrix is cut in four, and each cut is held twice (data)
        assert x.addressable_shards[0].data.size * parts == x.size, name


def test_optimizer_moments_follow_their_parameter():
    tree = ({"count": jax.ShapeDtypeStruct((), jnp.int32), "mu": shapes(), "nu": shapes()},)
    moments = shardings(tree, cube())[0]
    assert moments["mu"] == moments["nu"] == shardings(shapes(), cube())
    assert moments["count"].spec == Spec()


def test_a_vocabulary_that_does_not_divide_stays_whole():
    specs = shardings(shapes(vocab_size=13), cube())
    assert specs["embedding"].spec == specs["head"].spec == Spec(None, "fsdp")
    assert shardings({"mu": {"embedding": jax.ShapeDtypeStruct((13, 16), jnp.float32)}}, cube())["mu"][
        "embedding"
    ].spec == Spec(None, "fsdp")


@pytest.mark.parametrize(
    ("fields", "sizes", "message"),
    [
        (
            dict(kv_heads=1),
            dict(data=4, tensor=2),
            r"mesh.tensor=2 does not divide axis 2 of blocks/wk \(2, 16, 1, 4\): choose a divisor of 1",
        ),
        (
            dict(heads=6, kv_heads=3, head_dim=2),
            dict(data=4, tensor=2),
            "mesh.tensor=2 does not divide axis 2 of blocks/wk",
        ),
        (dict(mlp_width=15), dict(data=4, tensor=2), "mesh.tensor=2 does not divide axis . of blocks/w_(down|in)"),
        (dict(width=20, head_dim=4), dict(fsdp=8), r"mesh.fsdp=8 does not divide axis . of .* choose a divisor of 20"),
    ],
    ids=["one-kv-head", "three-kv-heads", "mlp", "width"],
)
def test_what_does_not_divide_is_refused_by_name(fields, sizes, message):
    with pytest.raises(ValueError, match=message):
        shardings(shapes(**fields), make_mesh(sizes))


def test_other_arrays_are_on_every_device():
    mesh = cube()
    for name, shape in (("step", ()), ("adaptive/beta", (3,)), ("embedding", (12,)), ("blocks/wq", (2, 16))):
        assert spec_of(name, shape, mesh) == Spec()
    assert replicated(mesh).spec == Spec() and len(replicated(mesh).device_set) == 8


def test_rows():
    mesh = cube()
    assert batch_shards(mesh) == 4
    batch = {"x": np.arange(8), "y": np.ones((8, 3))}
    placed = rows_over_mesh(batch, mesh)
    inside = jax.jit(lambda tree: constrain_rows(jax.tree.map(lambda x: x + 1, tree), mesh))(batch)
    for tree in (placed, inside):
        assert all(
            x.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, Spec(("data", "fsdp"))), x.ndim)
            for x in tree.values()
        )
        assert {s.data.shape for s in tree["y"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(inside["x"], np.arange(8) + 1)


def problem(vocabulary):
    """A loss, parameters, and a batch of 4 ragged prompts with 2 completions each."""
    config, rng = TransformerConfig(**{**SHAPE, "vocab_size": vocabulary}), np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (0.4 * rng.normal(size=x.shape) + (x.ndim < 2)).astype(x.dtype), shapes(vocab_size=vocabulary)
    )
    prompts = [rng.integers(0, vocabulary, n).tolist() for n in (3, 1, 4, 2)]
    batch = from_sequences(
        [s for s in prompts for _ in range(2)], rng.integers(0, vocabulary, (8, 5)).tolist(), shared_prompt=2
    )

    def loss(params, batch):
        stats = token_stats(build(config), params, batch)
        return jnp.sum(stats.logp + stats.entropy) / 8, stats

    return loss, params, batch


@pytest.mark.parametrize(
    ("vocabulary", "transform"),
    [(12, partial(jax.value_and_grad, has_aux=True)), (13, lambda loss: loss)],
    ids=["value-and-gradient", "vocabulary-kept-whole"],
)
def test_eight_devices_compute_what_one_computes(vocabulary, transform):
    loss, params, batch = problem(vocabulary)
    run, mesh = jax.jit(transform(loss), compiler_options=COMPILE_FAST), cube()
    one = run(params, batch)
    eight = run(jax.device_put(params, shardings(params, mesh)), rows_over_mesh(batch, mesh))
    for a, b in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        assert len(a.sharding.device_set) == 8
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [2, 8])
def test_a_prompt_is_run_where_its_rows_are(shared):
    """4 devices have rows: 2 rows of a prompt stay together, 8 are a prompt that each of the 4 runs."""
    _, params, _ = problem(12)
    model, mesh, rng = build(TransformerConfig(**SHAPE)), cube(), np.random.default_rng(1)
    prompts = [rng.integers(0, 12, n).tolist() for n in (3, 1, 4, 2)][: 8 // shared]
    completions = rng.integers(0, 12, (8, 5)).tolist()
    batch = from_sequences([s for s in prompts for _ in range(shared)], completions, shared_prompt=shared)
    run = jax.jit(completion_hidden, static_argnums=(0, 3), compiler_options=COMPILE_FAST)
    spread = run(model, jax.device_put(params, shardings(params, mesh)), rows_over_mesh(batch, mesh), mesh)
    np.testing.assert_allclose(spread, run(model, params, batch, None), rtol=1e-5, atol=1e-5)
    assert {s.data.shape[0] for s in spread.addressable_shards} == {2}
