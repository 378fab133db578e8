"""The TPU kernels through the real compiler, for chips that are not there (`make tpu_aot`; needs libtpu, no TPU)."""

import importlib.util
import os
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpo.kernels import token_logprob, token_logprob_loss
from jaxpo.kernels.policy_surrogate.api import policy_surrogate
from jaxpo.kernels.token_logprob import chips, pallas_tpu
from jaxpo.kernels.token_logprob.core import Problem, Statics
from jaxpo.kernels.token_logprob.plan import BLOCK_BYTES, whole_vocabulary_slices

pytestmark = pytest.mark.tpu_aot

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
QWEN3_8B = 16384, 4096, 151936  # N, D, V
WHOLE = PartitionSpec()
EVERYTHING = dict(
    want=("logp", "entropy", "logsumexp", "top1", "sum_p2", "logp_at_temperature"),
    second_temperature=1.3,
    temperature=0.7,
    softcap=30.0,
    grad_filter_eps=1e-6,
)


@pytest.fixture(scope="module", autouse=True)
def libtpu():
    if importlib.util.find_spec("libtpu") is None:  # a tier that skips everything would have checked nothing
        pytest.fail("libtpu is not installed: make tpu_aot installs it")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # A program for a chip that is not there can be written to the cache of compiled programs, but not read again.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def mesh_of(chip, tensor=1):
    """A mesh of the first ``tensor`` devices of a topology of these chips."""
    devices = topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu").devices
    return Mesh(np.array(devices[:tensor]).reshape(1, 1, tensor), ("data", "fsdp", "tensor"))


def loss(hidden, unembed, bias, targets, **options):
    out = token_logprob(hidden, unembed, targets, bias=bias, **options)
    return sum(jnp.sum(x) for x in out if x is not None and x.dtype != jnp.int32)


def compiled(f, mesh, n, d, v, dtype, specs=(WHOLE,) * 4, outside=False):
    """``f(hidden, unembed, bias, targets)`` for the mesh; inside a shard_map, or ``outside`` of one."""
    shapes = ((n, d), dtype), ((d, v), dtype), ((v,), jnp.float32), ((n,), jnp.int32)
    arguments = [
        jax.ShapeDtypeStruct(*s, sharding=NamedSharding(mesh, spec)) for s, spec in zip(shapes, specs, strict=True)
    ]
    if not outside:
        f = jax.shard_map(f, mesh=mesh, in_specs=WHOLE, out_specs=WHOLE, check_vma=False)
    return jax.jit(f).lower(*arguments).compile()


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_forward_and_backward_at_the_size_of_qwen3_8b(chip):
    n, d, v = QWEN3_8B

    def step(hidden, unembed, bias, targets):
        assert chips.current_chip().name == chip
        return jax.value_and_grad(loss, (0, 1))(hidden, unembed, None, targets, impl="pallas_tpu")

    program = compiled(step, mesh_of(chip), n, d, v, jnp.bfloat16)
    assert program.memory_analysis().temp_size_in_bytes <= n * v * 8 / 50
    # The estimate that is given to the compiler: logits three times, and a product for each gradient.
    np.testing.assert_allclose(program.cost_analysis()["flops"], 10 * n * d * v, rtol=0.01)


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_the_naive_form_does_not_fit_or_needs_far_more(chip):
    n, d, v = QWEN3_8B

    def step(hidden, unembed, bias, targets):
        return jax.value_and_grad(loss, (0, 1))(hidden, unembed, None, targets, impl="reference")

    try:
        program = compiled(step, mesh_of(chip), n, d, v, jnp.bfloat16)
    except jax.errors.JaxRuntimeError as error:
        assert "RESOURCE_EXHAUSTED" in str(error)
    else:
        assert program.memory_analysis().temp_size_in_bytes >= n * v * 4


@pytest.mark.parametrize(
    ("chip", "shape", "dtype", "options"),
    [
        ("v6e", (2048, 1024, 151936), jnp.bfloat16, EVERYTHING),
        ("v5e", (5, 64, 97), jnp.bfloat16, EVERYTHING),
        ("v5e", (1000, 1000, 1003), jnp.bfloat16, EVERYTHING),
        ("v5e", (1, 5, 1), jnp.float32, EVERYTHING),
        ("v6e", (1037, 100, 262144), jnp.float32, dict(want=("logp",))),
        ("v5p", (1024, 16384, 1280), jnp.bfloat16, {}),
        ("v5p", (1037, 512, 128256), jnp.bfloat16, dict(block_sizes=(16, 128))),
    ],
    ids=["everything", "tiny", "ragged", "one token", "float32", "D in parts", "small blocks"],
)
def test_odd_shapes_and_options(chip, shape, dtype, options):
    step = jax.value_and_grad(partial(loss, impl="pallas_tpu", **options), (0, 1, 2))
    compiled(step, mesh_of(chip), *shape, dtype)


def test_a_tile_of_1024_by_1024_passes_on_the_chip_with_the_least_vmem():
    """With the limit that the kernels set; the compiler's default refuses half of it. (The backward kernels hold a
    block of a gradient besides, and take smaller tiles.)"""
    statics = Statics(block_tokens=1024, block_vocab=1024)

    def step(hidden, unembed, bias, targets):
        problem = Problem(hidden, unembed.T, targets, bias, None, jnp.float32(1), None, None)
        return pallas_tpu.forward(statics, problem)

    compiled(step, mesh_of("v5p"), 2048, 4096, 2048, jnp.bfloat16)


def test_a_second_pair():
    def step(hidden, unembed, bias, targets):
        kl_to = (hidden[:, :999] + 1, unembed[:999])
        return jax.grad(loss, (0, 1))(hidden, unembed, bias, targets, want=("kl_to",), kl_to=kl_to, impl="pallas_tpu")

    compiled(step, mesh_of("v5e"), 1000, 1024, 1003, jnp.bfloat16)


def test_a_sharded_vocabulary_moves_only_statistics_forward():
    n, d, v = 2048, 1024, 151936
    mesh = mesh_of("v5e", tensor=4)
    specs = WHOLE, PartitionSpec(None, "tensor"), PartitionSpec("tensor"), WHOLE
    forward = partial(loss, impl="pallas_tpu", mesh=mesh)
    text = compiled(forward, mesh, n, d, v, jnp.bfloat16, specs, outside=True).as_text()
    sizes = collectives(text)
    assert sizes and max(sizes) <= 4 * n
    text = compiled(jax.grad(forward, (0, 1)), mesh, n, d, v, jnp.bfloat16, specs, outside=True).as_text()
    assert max(collectives(text)) <= n * d  # the sum of dhidden; dunembed stays where it is


def collectives(text):
    """Elements of each array that a collective gives."""
    lines = re.findall(r"= (.*?) (?:all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\(", text)
    shapes = [shape for line in lines for shape in re.findall(r"\w+\[([\d,]*)\]", line)]
    return [int(np.prod([int(x) for x in shape.split(",") if x])) for shape in shapes]


@pytest.mark.parametrize(("chip", "shape"), [("v5e", (1000, 1500)), ("v6e", (512, 8192)), ("v5p", (3, 7))], ids=str)
def test_policy_surrogate(chip, shape):
    def loss(logp, adv):
        out = policy_surrogate(
            logp, logp, adv, logp, logp, low=logp, high=1.2, dual=3.0, kl="k3", logp_ref=logp, kl_weight=logp,
            impl="pallas_tpu",
        )  # fmt: skip
        return out.policy + out.kl

    mesh = mesh_of(chip)
    step = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=WHOLE, out_specs=WHOLE, check_vma=False)
    whole = NamedSharding(mesh, WHOLE)
    logp, adv = (jax.ShapeDtypeStruct(s, jnp.float32, sharding=whole) for s in (shape, shape[:1]))
    jax.jit(step).lower(logp, adv).compile()


@pytest.mark.parametrize(("chip", "tensor"), [("v5e", 1), ("v6e", 4)])
def test_a_loss_in_one_pass(chip, tensor):
    """The products are made once, and no more is held than the budget of a slice's logits allows."""
    n, d, v = QWEN3_8B
    mesh = mesh_of(chip, tensor)
    slices = whole_vocabulary_slices("tpu", 16, n // 16, v, vocab_shards=tensor)

    def step(hidden, table, targets):  # the table as a policy holds it, [V, D]
        def of_slice(out, part):
            return jnp.sum(out.logp * part), jnp.sum(out.entropy)

        def loss(hidden, table):
            parts, around = jnp.ones((slices, n // slices)), dict(mesh=mesh) if tensor > 1 else {}
            return token_logprob_loss(of_slice, hidden, table.T, targets, parts, **around)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, table)

    whole, split = (NamedSharding(mesh, spec) for spec in (WHOLE, PartitionSpec("tensor")))
    arguments = (
        jax.ShapeDtypeStruct((n, d), jnp.bfloat16, sharding=whole),
        jax.ShapeDtypeStruct((v, d), jnp.bfloat16, sharding=split),
        jax.ShapeDtypeStruct((n,), jnp.int32, sharding=whole),
    )
    program = jax.jit(step).lower(*arguments).compile()
    assert program.memory_analysis().temp_size_in_bytes <= 1.25 * BLOCK_BYTES["tpu"]
    if tensor > 1:
        assert max(collectives(program.as_text())) <= n * d
