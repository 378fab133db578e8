"""Vocabulary and tokens spread over eight simulated devices: the answers of one, and what they exchange."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpo.kernels import token_logprob
from tests.oracles.cases import COMPILE_FAST

ALL = ("logp", "entropy", "logsumexp", "top1", "sum_p2", "logp_at_temperature", "kl_to")


def mesh_of(data, fsdp, tensor):
    return jax.make_mesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def problem(n, d, v, seed=0):
    """hidden, unembed, bias; targets; vocab_mask; the other pair; a cotangent for each smooth output."""
    rng = np.random.default_rng(seed)
    mask = rng.random(v) < 0.7
    targets = rng.choice(np.flatnonzero(mask), n).astype(np.int32)
    targets[: n // 8] = np.flatnonzero(~mask)[0]
    kl_to = rng.normal(size=(n, 3)), rng.normal(size=(3, v)), rng.normal(size=v)
    return (rng.normal(size=(n, d)), rng.normal(size=(d, v)), rng.normal(size=v)), targets, mask, kl_to, rng


@pytest.mark.parametrize(
    ("sizes", "n", "v"), [((1, 1, 8), 16, 128), ((2, 2, 2), 13, 97), ((1, 2, 4), 8, 130), ((1, 4, 2), 8, 97)], ids=str
)
def test_same_results_as_one_device(sizes, n, v):
    with jax.enable_x64(True):
        inputs, targets, mask, kl_to, rng = problem(n, 6, v)
        g = rng.normal(size=(6, n))

        @partial(jax.jit, static_argnames="options", compiler_options=COMPILE_FAST)
        def run(inputs, options):
            def loss(inputs):
                hidden, unembed, bias = inputs
                out = token_logprob(
                    hidden, unembed, targets, bias=bias, temperature=0.7, softcap=3.0, vocab_mask=mask, want=ALL,
                    second_temperature=1.3, kl_to=kl_to, **dict(options)
                )  # fmt: skip
                smooth = out.logp, out.entropy, out.logsumexp, out.sum_p2, out.logp_at_temperature, out.kl
                kept = (jnp.where(jnp.isfinite(x), x, 0) for x in smooth)
                return sum(jnp.sum(a * x) for a, x in zip(g, kept, strict=True)), out

            return jax.grad(loss, has_aux=True)(inputs)

        spread = run(inputs, (("impl", "xla"), ("mesh", mesh_of(*sizes)), ("block_sizes", (4, 16))))
        for x, y in zip(jax.tree.leaves(spread), jax.tree.leaves(run(inputs, (("impl", "xla"),))), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-11)


def compiled(gradient, sizes=(2, 1, 4), n=32, d=16, v=128):
    """The program of the forward pass, or of both gradients, and its mesh."""
    mesh = mesh_of(*sizes)

    def on(*axes):
        return NamedSharding(mesh, PartitionSpec(*axes))

    def loss(hidden, table, targets):
        out = token_logprob(hidden, table.T, targets, mesh=mesh)
        return jnp.sum(out.logp + out.entropy)

    shapes = (
        jax.ShapeDtypeStruct((n, d), jnp.float32, sharding=on(("data", "fsdp"))),
        jax.ShapeDtypeStruct((v, d), jnp.float32, sharding=on("tensor", "fsdp")),
        jax.ShapeDtypeStruct((n,), jnp.int32, sharding=on(("data", "fsdp"))),
    )
    program = jax.jit(jax.grad(loss, (0, 1)) if gradient else loss).lower(*shapes).compile()
    return program, mesh


def collectives(program):
    """(operation, number of elements of its largest array) for each collective of the compiled program."""
    out = []
    for line in program.as_text().splitlines():
        kind = re.search(
            r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", line
        )
        if kind:
            sizes = [int(np.prod([int(x) for x in s.split(",") if x])) for s in re.findall(r"\[([\d,]*)\]", kind[1])]
            out.append((kind[2], max(sizes)))
    return out


def test_forward_exchanges_a_few_floats_a_token():
    program, _ = compiled(gradient=False)
    found = collectives(program)
    assert found and {kind for kind, _ in found} == {"all-reduce"}
    assert len(found) <= 3 and max(size for _, size in found) <= 4 * 32  # maximum, sum, and the sum of the loss


def test_backward_sums_dhidden_once_and_leaves_the_tables_gradient_where_it_is():
    program, mesh = compiled(gradient=True)
    dhidden, dtable = program.output_shardings
    assert dtable.is_equivalent_to(NamedSharding(mesh, PartitionSpec("tensor")), 2)
    found = collectives(program)
    assert {kind for kind, _ in found} == {"all-reduce"}, found
    # Of one device: statistics of its 16 tokens, dhidden [16, 16], and over data its rows of dtable [32, 16].
    assert max(size for _, size in found) <= 32 * 16


def test_features_over_fsdp_are_gathered_once_and_scattered_once():
    program, mesh = compiled(gradient=True, sizes=(1, 2, 4))
    assert program.output_shardings[1].is_equivalent_to(NamedSharding(mesh, PartitionSpec("tensor", "fsdp")), 2)
    kinds = [kind for kind, _ in collectives(program)]
    assert kinds.count("all-gather") in (1, 2) and kinds.count("reduce-scatter") == 1, kinds


def test_tokens_alone_need_no_vocabulary_axis():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match="the mesh has no axis 'fsdp'; its axes: data"):
        token_logprob(np.zeros((8, 2), np.float32), np.zeros((2, 8), np.float32), np.zeros(8, np.int32), mesh=mesh)


def test_the_naive_form_is_not_spread():
    with pytest.raises(ValueError, match="mesh has no effect with impl='reference'"):
        token_logprob(
            np.zeros((8, 2), np.float32), np.zeros((2, 8), np.float32), np.zeros(8, np.int32), impl="reference",
            mesh=mesh_of(8, 1, 1),
        )  # fmt: skip
