"""What a plan counts: operations of jaxprs against hand counts, transfers of programs for eight devices, rooflines."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec

from jaxpo.kernels.chips import CHIPS
from jaxpo.parallel import make_mesh
from jaxpo.plan import operations, program, roofline, topology
from tests.oracles.cases import COMPILE_FAST

A, B = jnp.ones((3, 5)), jnp.ones((5, 7))
ONE = 2 * 3 * 5 * 7  # operations of A @ B
SQUARE = jnp.ones((4, 4))


def count(f, *args, **options):
    return operations.count(jax.make_jaxpr(f)(*args), **options)


@jax.custom_vjp
def doubled(a, b):
    return a @ b


doubled.defvjp(lambda a, b: (a @ b, (a, b)), lambda kept, g: (g @ kept[1].T, kept[0].T @ (g @ jnp.eye(7))))


def kernel(a, b, out):
    out[...] = a[...] @ b[...]


def in_pallas(cost=None):
    return pl.pallas_call(
        kernel, grid=(6,), out_shape=jax.ShapeDtypeStruct((3, 7), jnp.float32), cost_estimate=cost, interpret=False
    )


@pytest.mark.parametrize(
    ("f", "args", "expected"),
    [
        (jnp.matmul, (A, B), ONE),
        (jax.jit(jnp.matmul), (A, B), ONE),
        (lambda a, b: jnp.einsum("gij,gjk->gik", jnp.stack([a] * 4), jnp.stack([b] * 4)), (A, B), 4 * ONE),
        (lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=9)[0], (SQUARE,), 9 * 128),
        (lambda x: jax.lax.scan(lambda c, _: (jax.lax.scan(lambda d, _: (d @ d, None), c, length=3)[0], None), x,
                                length=2)[0], (SQUARE,), 6 * 128),
        (lambda x: jax.lax.while_loop(lambda c: c.sum() > 0, lambda c: c @ c, x), (SQUARE,), 10 * 128),
        (lambda x: jax.lax.while_loop(lambda c: c.sum() > 0, lambda c: jax.lax.fori_loop(0, c[0, 0].astype(int),
                                      lambda _, d: d @ d, c), x), (SQUARE,), 30 * 128),
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, x), (SQUARE,), 2 * 128),
        (jax.grad(lambda a, b: jnp.sum(jnp.sin(a @ b)), (0, 1)), (A, B), 3 * ONE),
        (jax.grad(lambda a, b: jnp.sum(jax.checkpoint(lambda a, b: jnp.sin(jnp.sin(a @ b)))(a, b) ** 2), (0, 1)),
         (A, B), 4 * ONE),
        (doubled, (A, B), ONE),
        (jax.grad(lambda a, b: jnp.sum(doubled(a, b)), (0, 1)), (A, B), 3 * ONE + 2 * 3 * 7 * 7),
        (in_pallas(), (A, B), 6 * ONE),
        (in_pallas(pl.CostEstimate(flops=11, transcendentals=0, bytes_accessed=0)), (A, B), 11),
        (lambda x: jax.lax.conv_general_dilated(x, jnp.ones((6, 2, 3, 3)), (1, 1), "VALID"), (jnp.ones((1, 2, 8, 8)),),
         2 * 6 * 6 * 6 * 2 * 9),
        (lambda x: jax.lax.ragged_dot(x, jnp.ones((3, 5, 7)), jnp.array([2, 0, 2])), (jnp.ones((4, 5)),),
         2 * 4 * 5 * 7),
        (jax.grad(lambda w: jnp.sum(jax.lax.ragged_dot(jnp.ones((4, 5)), w, jnp.array([2, 0, 2])) ** 2)),
         (jnp.ones((3, 5, 7)),), 2 * 2 * 4 * 5 * 7),
        (lambda x: jnp.sin(x) + x, (A,), 0),
    ],
    ids=["product", "jit", "batched", "scan", "scan in scan", "while", "while in while", "cond", "gradient",
         "recomputed", "custom_vjp", "custom_vjp backward", "pallas", "pallas estimate", "convolution", "ragged",
         "ragged backward", "element-wise"],
)  # fmt: skip
def test_operations(f, args, expected):
    assert count(f, *args, loop=(10, 3)) == expected


def test_each_shard_of_a_shard_map_works():
    mesh = make_mesh(dict(data=4, fsdp=1, tensor=2))
    rows = PartitionSpec("data")
    f = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows, check_vma=False)
    assert count(f, jnp.ones((12, 5)), B) == 2 * 4 * ONE  # the two along "tensor" do the same


def test_largest_arrays():
    def f(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(jnp.outer(c, c)).sum(0), None), x, length=3)[0]

    (size, what), *others = operations.largest(jax.make_jaxpr(f)(jnp.ones(100)))
    assert size == 40000 and what.startswith("float32[100,100] from ") and "test_plan_counts.py" in what
    assert all(n <= 400 for n, _ in others)


# ---- compiled programs


def compiled(f, *args):
    return jax.jit(f, compiler_options=COMPILE_FAST).lower(*args).compile().as_text()


def on(mesh, shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def sent(text):
    return {c.kind: (c.calls, c.bytes) for c in program.traffic(text, 8).collectives}


def spread(f, mesh, spec_in, spec_out):
    return jax.shard_map(f, mesh=mesh, in_specs=PartitionSpec(*spec_in), out_specs=PartitionSpec(*spec_out),
                         check_vma=False)  # fmt: skip


@pytest.mark.parametrize(
    ("f", "spec_out", "kind", "bytes_sent"),
    [
        (lambda x: jax.lax.psum(x, "fsdp"), ("data",), "all-reduce", 2 * 4 * 16 * 3 / 4),
        (lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), ("data",), "all-gather", 4 * 64 * 3 / 4),
        (lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), (("data", "fsdp"),), "reduce-scatter", 4 * 4 * 3),
        (lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]), (("data", "fsdp"),),
         "collective-permute", 4 * 16),
        (lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True), (("data", "fsdp"),), "all-to-all", 4 * 16 * 3 / 4),
    ],
    ids=["all-reduce", "all-gather", "reduce-scatter", "permute", "all-to-all"],
)  # fmt: skip
def test_bytes_of_each_kind(f, spec_out, kind, bytes_sent):
    mesh = make_mesh(dict(data=2, fsdp=4))
    text = compiled(spread(f, mesh, (("data", "fsdp"),), spec_out), on(mesh, (128,), ("data", "fsdp")))
    assert sent(text) == {kind: (1, bytes_sent)}


def test_collectives_of_a_loop_are_counted_as_often_as_it_runs():
    mesh = make_mesh(dict(data=1, fsdp=8))

    def f(x):
        return jax.lax.fori_loop(0, 11, lambda _, y: jax.lax.psum(jnp.sin(y), "fsdp"), x)

    text = compiled(spread(f, mesh, ("fsdp",), ()), on(mesh, (64,), "fsdp"))
    assert sent(text) == {"all-reduce": (11, 11 * 2 * 4 * 8 * 7 / 8)}
    assert program.traffic(text, 8).endless == 0


def test_memory_traffic_of_a_loop_over_slices():
    """A scan over stacked matrices reads each of them once, not the whole stack at every trip."""
    x, stack = jnp.ones((64, 64)), jnp.ones((20, 64, 64))
    text = compiled(lambda x, stack: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, stack)[0], x, stack)
    once = 4 * 64 * 64
    moved = program.traffic(text, 1).hbm
    assert 20 * 4 * once <= moved <= 20 * 12 * once  # reading the stack whole would be 20 * 20


def test_memory_traffic_of_a_fusion_within_a_fusion():
    """As TPUs compile a product with one matrix of a stack: the slice is read, not the stack; and nothing but the
    update is written into one."""
    moved = program.traffic(NESTED, 1)
    assert moved.hbm == 7 * (2 * 4 * 8 + 2 * 4 + 2 * 8) and moved.endless == 1
    assert program.traffic(NESTED, 1, loop=3).hbm == 3 * moved.hbm and program.traffic(NESTED, 1, loop=3).endless == 0


NESTED = """HloModule jit_f, is_scheduled=true

%slice (p.1: bf16[9,4,8], p.2: s32[]) -> bf16[4,8] {
  %p.1 = bf16[9,4,8]{2,1,0} parameter(0)
  %p.2 = s32[] parameter(1)
  %z.1 = s32[] constant(0)
  %d.1 = bf16[1,4,8]{2,1,0} dynamic-slice(%p.1, %p.2, %z.1, %z.1), dynamic_slice_sizes={1,4,8}
  ROOT %b.1 = bf16[4,8]{1,0} bitcast(%d.1)
}

%into (p.3: bf16[9,8], p.4: bf16[8], p.5: s32[]) -> bf16[9,8] {
  %p.3 = bf16[9,8]{1,0} parameter(0)
  %p.4 = bf16[8]{0} parameter(1)
  %p.5 = s32[] parameter(2)
  %z.2 = s32[] constant(0)
  %b.2 = bf16[1,8]{1,0} bitcast(%p.4)
  ROOT %u.1 = bf16[9,8]{1,0} dynamic-update-slice(%p.3, %b.2, %p.5, %z.2)
}

%product (p.6: bf16[9,4,8], p.7: s32[], p.8: bf16[4]) -> bf16[8] {
  %p.6 = bf16[9,4,8]{2,1,0} parameter(0)
  %p.7 = s32[] parameter(1)
  %p.8 = bf16[4]{0} parameter(2)
  %f.1 = bf16[4,8]{1,0} fusion(%p.6, %p.7), kind=kLoop, calls=%slice
  ROOT %c.1 = bf16[8]{0} dot(%p.8, %f.1), lhs_contracting_dims={0}, rhs_contracting_dims={0}
}

%update (p.9: bf16[9,8], p.10: bf16[8], p.11: s32[]) -> bf16[9,8] {
  %p.9 = bf16[9,8]{1,0} parameter(0)
  %p.10 = bf16[8]{0} parameter(1)
  %p.11 = s32[] parameter(2)
  ROOT %f.2 = bf16[9,8]{1,0} fusion(%p.9, %p.10, %p.11), kind=kLoop, calls=%into
}

%inner_cond (i: (s32[], bf16[9,4,8], bf16[4], bf16[9,8], s32[])) -> pred[] {
  %i = (s32[]{:S(2)}, bf16[9,4,8]{2,1,0}, bf16[4]{0}, bf16[9,8]{1,0}, s32[]{:S(2)}) parameter(0)
  %i.0 = s32[]{:S(2)} get-tuple-element(%i), index=0
  %i.4 = s32[]{:S(2)} get-tuple-element(%i), index=4
  ROOT %lt.1 = pred[]{:S(2)} compare(%i.0, %i.4), direction=LT
}

%inner (j: (s32[], bf16[9,4,8], bf16[4], bf16[9,8], s32[])) -> (s32[], bf16[9,4,8], bf16[4], bf16[9,8], s32[]) {
  %j = (s32[]{:S(2)}, bf16[9,4,8]{2,1,0}, bf16[4]{0}, bf16[9,8]{1,0}, s32[]{:S(2)}) parameter(0)
  %j.0 = s32[]{:S(2)} get-tuple-element(%j), index=0
  %j.1 = bf16[9,4,8]{2,1,0} get-tuple-element(%j), index=1
  %j.2 = bf16[4]{0} get-tuple-element(%j), index=2
  %j.3 = bf16[9,8]{1,0} get-tuple-element(%j), index=3
  %j.4 = s32[]{:S(2)} get-tuple-element(%j), index=4
  %y = bf16[8]{0:S(1)} fusion(%j.1, %j.0, %j.2), kind=kOutput, calls=%product
  %w = bf16[9,8]{1,0} fusion(%j.3, %y, %j.0), kind=kLoop, calls=%update
  ROOT %t.1 = (s32[]{:S(2)}, bf16[9,4,8]{2,1,0}, bf16[4]{0}, bf16[9,8]{1,0}, s32[]{:S(2)}) tuple(%j.0, %j.1, %j.2, %w, %j.4)
}

%cond (c: (s32[], bf16[9,4,8], bf16[4], bf16[9,8], s32[])) -> pred[] {
  %n = s32[] constant(7)
  %c = (s32[]{:S(2)}, bf16[9,4,8]{2,1,0}, bf16[4]{0}, bf16[9,8]{1,0}, s32[]{:S(2)}) parameter(0)
  %c.0 = s32[]{:S(2)} get-tuple-element(%c), index=0
  ROOT %lt.2 = pred[]{:S(2)} compare(%c.0, %n), direction=LT
}

%body (b: (s32[], bf16[9,4,8], bf16[4], bf16[9,8], s32[])) -> (s32[], bf16[9,4,8], bf16[4], bf16[9,8], s32[]) {
  %b = (s32[]{:S(2)}, bf16[9,4,8]{2,1,0}, bf16[4]{0}, bf16[9,8]{1,0}, s32[]{:S(2)}) parameter(0)
  ROOT %v = (s32[]{:S(2)}, bf16[9,4,8]{2,1,0}, bf16[4]{0}, bf16[9,8]{1,0}, s32[]{:S(2)}) while(%b), condition=%inner_cond, body=%inner
}

ENTRY %main (a: (s32[], bf16[9,4,8], bf16[4], bf16[9,8], s32[])) -> (s32[], bf16[9,4,8], bf16[4], bf16[9,8], s32[]) {
  %a = (s32[]{:S(2)}, bf16[9,4,8]{2,1,0}, bf16[4]{0}, bf16[9,8]{1,0}, s32[]{:S(2)}) parameter(0)
  ROOT %r = (s32[]{:S(2)}, bf16[9,4,8]{2,1,0}, bf16[4]{0}, bf16[9,8]{1,0}, s32[]{:S(2)}) while(%a), condition=%cond, body=%body
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4,'axis_2'=3] {'axis_1','axis_2'}", 12),
        ("replica_groups={}", 8),
        ("channel_id=1", 8),
    ],
)
def test_group_size(groups, expected):
    assert program.group_size(f"(%x), {groups}, use_global_device_ids=true", 8) == expected


TPU = """HloModule jit_f, is_scheduled=true

%link.1 (p: bf16[8,4]) -> bf16[16,4] {
  %p = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %g.1 = bf16[16,4]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %s = (bf16[16,4]{1,0}) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%link.2 (q: bf16[8,4]) -> bf16[16,4] {
  %q = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g.2 = bf16[16,4]{1,0:T(8,128)(2,1)S(1)} all-gather(%q), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
}

%cond (c: (s32[], bf16[8,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(36)
  %c = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (b: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %b = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%b), index=1
  %f.1 = bf16[16,4]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kOutput, calls=%link.1
  %f.2 = bf16[16,4]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kOutput, calls=%link.2
  %cp = (bf16[8,4]{1,0:T(8,128)(2,1)}, bf16[8,4]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %y = bf16[8,4]{1,0:T(8,128)(2,1)} collective-permute-done(%cp)
  %j = s32[]{:T(128)} get-tuple-element(%b), index=0
  ROOT %t = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) tuple(%j, %y)
}

ENTRY %main (z: bf16[8,4]) -> bf16[8,4] {
  %z = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %k = s32[]{:T(128)} constant(0)
  %u = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) tuple(%k, %z)
  %w = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) while(%u), condition=%cond, body=%body
  ROOT %r = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%w), index=1
}
"""  # noqa: E501


def test_text_of_a_tpu_program():
    """The parts of one transfer, fused with computations, are one transfer; trips are those of the condition."""
    assert sent(TPU) == {"all-gather": (36, 36 * 16 * 4 * 2 / 2), "collective-permute": (36, 36 * 8 * 4 * 2)}


def test_bytes_of_shapes():
    assert program.nbytes("(bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[3]{0}, pred[5]{0}, u32[]{:S(2)})") == 85
    assert program.nbytes("(bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, f32[3]{0}, s4[6]{0})", hbm=True) == 15


# ---- rooflines and slices


def test_roofline():
    work = roofline.Work(operations=459e12 * 2, hbm=2765e9 * 3, sent=600e9)
    terms = roofline.seconds(work, CHIPS["v5p"])
    assert terms == dict(compute=2.0, memory=3.0, interconnect=1.0) and roofline.bound(terms) == "memory"


@pytest.mark.parametrize(
    ("name", "size", "cloud"),
    [
        ("v5e:2x4", 8, "v5litepod-8"),
        ("v5p:4x4x4", 64, "v5p-128"),
        ("v5p:8x8x8", 512, "v5p-1024"),
        ("v6e:8x8", 64, "v6e-64"),
    ],
)
def test_chips_of_a_slice_and_its_name_in_the_cloud(name, size, cloud):
    where = topology.parse(name)
    assert (where.size, where.cloud, where.chip.name) == (size, cloud, name[:3])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:3x5", "shape of a v5e slice '3x5'.*2x4"),
        ("v5p:4x4", "shape of a v5p slice '4x4'.*4x4x4"),
        ("v5x:2x2", "chip of --topology 'v5x'.*v5e:16x16"),
        ("v5p", "shape of a v5p slice ''"),
    ],
)
def test_a_slice_that_does_not_exist(name, message):
    with pytest.raises(ValueError, match=message):
        topology.parse(name)
