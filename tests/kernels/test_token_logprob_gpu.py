"""The GPU kernels: interpreted on the CPU against the naive form in float64, lowered for CUDA, and run where there is a
GPU."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.export import DisabledSafetyCheck, export
from jax.sharding import Mesh

from jaxpo.kernels import token_logprob
from jaxpo.kernels.token_logprob import api, pallas_gpu, xla
from jaxpo.kernels.token_logprob.core import WANTS, Problem, Statics, needed_sums
from jaxpo.kernels.token_logprob.gpu_kernels import Tiles
from tests.kernels.test_token_logprob_tpu import ALL, assert_close, exact, problem, run
from tests.oracles.cases import COMPILE_FAST

TRITON = "__gpu$xla.gpu.triton"
QWEN3_8B = 16384, 4096, 151936  # N, D, V
EVERYTHING = dict(
    want=tuple(name for name in WANTS if name != "kl_to"), second_temperature=1.3, temperature=0.7, softcap=30.0
)


def interpreted(arrays, options, **statics):
    """`run` of the kernels."""
    step = partial(run.__wrapped__, impl="pallas_gpu", interpret=True, **statics)
    return jax.jit(step, compiler_options=COMPILE_FAST)(arrays, options)


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "block_sizes", "softcap", "options"),
    [
        ((1, 5, 97), None, 3.0, dict(bias=True, masked=0.3)),
        ((33, 70, 256), (16, 128), None, dict(bias=True)),
        ((40, 64, 1009), (16, 256), 3.0, dict(bias=True, masked=0.9)),
        ((20, 6, 130), (16, 32), None, dict(bias=True, masked=0.5, d_q=9)),
    ],
    ids=str,
)
def test_values_and_gradients_equal_the_naive_form(shape, block_sizes, softcap, options):
    arrays, options = problem(*shape, **options)
    statics = dict(want=ALL + ("kl_to",) * ("kl_to" in options), softcap=softcap, block_sizes=block_sizes)
    got = interpreted(arrays, options, **statics)
    assert got[0].top1_id.dtype == jnp.int32 and all(x.dtype == np.float32 for x in jax.tree.leaves(got[1]))
    assert_close(got, exact(arrays, options, **statics))


@pytest.mark.parametrize("want", WANTS)
def test_what_is_wanted_alone_is_summed_alone(want):
    (hidden, unembed, targets), options = problem(20, 6, 97, bias=True, d_q=7)
    kl = want == "kl_to"
    second = jnp.float32(1.3) if want == "logp_at_temperature" else None
    other = api.other_of(options["kl_to"], 20, 97) if kl else None
    p = Problem(hidden, unembed.T, targets, options["bias"], None, jnp.float32(0.7), second, other)
    statics = Statics(want=frozenset({want}), softcap=3.0, block_tokens=16, block_vocab=32, interpret=True)
    got, expected = jax.jit(lambda: (pallas_gpu.forward(statics, p), xla.forward(statics, p)))()
    assert {name for name, x in got._asdict().items() if x is not None} == {"m", "target", "s"} | needed_sums({want})
    assert_close(got, jax.tree.map(np.asarray, expected))


def test_bfloat16_is_no_less_exact_than_the_naive_form():
    arrays, options = problem(40, 32, 300, dtype=jnp.bfloat16)
    statics = dict(want=("logp", "entropy", "logsumexp"), softcap=None)
    got = interpreted(arrays, options, **statics)
    naive, truth = run(arrays, options, impl="reference", **statics), exact(arrays, options, **statics)
    assert [x.dtype.name for x in jax.tree.leaves(got)] == ["float32"] * 3 + ["bfloat16"] * 2

    def errors(form):
        pairs = zip(jax.tree.leaves(form), jax.tree.leaves(truth), strict=True)
        return [np.linalg.norm(np.float64(x) - y) / np.linalg.norm(y) for x, y in pairs]

    for ours, theirs in zip(errors(got), errors(naive), strict=True):
        assert ours < 1.5 * theirs + 1e-6


def test_the_vocabulary_in_chunks(monkeypatch):
    """Of 64 entries, the last of 44: two loops over what the chunks share."""
    arrays, options = problem(20, 6, 300, bias=True)
    statics = dict(want=("logp", "sum_p2"), softcap=None, block_sizes=(16, 32))
    monkeypatch.setattr(pallas_gpu, "DX_BYTES", 20 * 4 * 64)
    given = Statics(block_tokens=16, block_vocab=32)
    p = Problem(arrays[0], arrays[1].T, *[None] * 6)
    assert pallas_gpu.chunk_of(given, p) == 64
    assert_close(interpreted(arrays, options, **statics), exact(arrays, options, **statics))


def test_over_a_mesh():
    """Shards of 65 rows of the vocabulary, whose last block of 16 reaches beyond them."""
    arrays, options = problem(32, 6, 260, bias=True)
    mesh = Mesh(np.array(jax.devices()).reshape(1, 2, 4), ("data", "fsdp", "tensor"))
    statics = dict(want=("logp", "entropy", "top1"), softcap=None)
    assert_close(interpreted(arrays, options, mesh=mesh, **statics), exact(arrays, options, **statics))


def test_targets_that_hit_nothing():
    """Masked out, negative, and beyond the vocabulary but inside its last block: logp -inf, no gradient."""
    (hidden, unembed, _), _ = problem(5, 6, 130)
    mask = np.arange(130) != 7
    targets = jnp.array([7, -1, 130, 200, 3])

    def f(hidden, unembed, targets):
        statics = dict(want=("logp",), impl="pallas_gpu", interpret=True)
        out = token_logprob(hidden, unembed, targets, vocab_mask=mask, **statics)
        return jnp.sum(jnp.where(out.logp > -jnp.inf, out.logp, 0)), out.logp

    (_, logp), (grad, _) = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(hidden, unembed, targets)
    assert (logp[:4] == -jnp.inf).all() and jnp.isfinite(logp[4])
    assert (grad[:4] == 0).all() and (grad[4] != 0).any()


def test_extreme_logits():
    """Logits of +-1e4; rows whose largest one is in the first and in the last block, or in many: the first counts."""
    unembed = np.zeros((2, 300), np.float32)
    unembed[0], unembed[1, [0, 299]] = np.linspace(-1, 1, 300), 1
    hidden = np.array([[1e4, 0], [-1e4, 0], [0, 1e4], [0, -1e4], [0, 0]], np.float32)
    arrays = jnp.asarray(hidden), jnp.asarray(unembed), np.array([0, 0, 299, 0, 7], np.int32)
    statics = dict(want=ALL, softcap=None, block_sizes=(16, 64))
    got = interpreted(arrays, {"bias": None}, **statics)
    assert_close(got, exact(arrays, {"bias": None}, **statics), 1e-3)  # float32 near 1e4 is spaced by 1e-3


# --- what is computed -------------------------------------------------------------------------------------------------


def test_a_frozen_table_has_no_product():
    (hidden, unembed, targets), _ = problem(5, 6, 130)

    def made(wrt, want):
        def loss(hidden, unembed):
            return token_logprob(hidden, unembed, targets, want=want, impl="pallas_gpu", interpret=True)[0].sum()

        text = str(jax.make_jaxpr(jax.grad(loss, wrt))(hidden, unembed))
        return "token_logprob_forward" in text, "token_logprob_dx" in text, "f32[130,6] = dot_general" in text

    assert made((0, 1), ("logp", "entropy")) == (True, True, True)
    assert made(0, ("logp", "entropy")) == (True, True, False)
    assert made(0, ("logp",)) == (False, False, False)  # one pass


@pytest.mark.parametrize(("n", "v"), [(1, 1), (16, 32), (500, 100), (16 * 33, 999)])
def test_every_tile_has_one_program(n, v):
    tiles = Tiles(n, v, 16, 32, None)
    tokens, vocab = tiles.grid
    places = np.stack(jax.vmap(tiles.place)(jnp.arange(tokens * vocab)), 1)
    assert (np.unique(places, axis=0) == np.argwhere(np.ones((tokens, vocab)))).all()


def test_tiles_and_chunks_at_full_size():
    n, d, v = QWEN3_8B
    bf16 = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    p = Problem(bf16((n, d)), bf16((v, d)), *[None] * 6)
    chunk = pallas_gpu.chunk_of(Statics(), p)
    assert pallas_gpu.blocks_of(Statics(), p) == (128, 256)
    assert chunk % 256 == 0 and n * chunk * 2 <= pallas_gpu.DX_BYTES and 4 * chunk < v < 5 * chunk
    assert pallas_gpu.blocks_of(Statics(), p._replace(hidden=bf16((5, d)))) == (16, 256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(block_sizes=(20, 128)), "block_tokens=20 is no power of two of at least 16; nearest: 32"),
        (dict(block_sizes=(16, 8)), "block_vocab=8 is no power of two of at least 16; nearest: 16"),
        (dict(block_sizes=(256, 256)), "a program holds 65536 logits, and the registers at most 32768"),
        (dict(hidden=jnp.zeros((40, 6), jnp.bfloat16)), "both bfloat16 or both float32, not bfloat16 and float32"),
        (dict(hidden=jnp.zeros((0, 6)), targets=jnp.zeros(0, jnp.int32)), "there are no tokens"),
        (dict(grad_filter_eps=1e-6), "grad_filter_eps has no effect .* take impl='pallas_tpu'"),
    ],
    ids=["tokens", "vocab", "both", "dtypes", "empty", "filter"],
)
def test_problems_that_are_refused(change, message):
    (hidden, unembed, targets), _ = problem(40, 6, 300)
    arguments = dict(hidden=hidden, unembed=unembed, targets=targets) | change
    with pytest.raises(ValueError, match=message):
        token_logprob(**arguments, impl="pallas_gpu", interpret=True)


# --- CUDA -------------------------------------------------------------------------------------------------------------


def lowered(n, d, v, dtype, d_q=0, **options):
    """StableHLO for CUDA, forward and backward in hidden, unembed and bias; d_q: of the pair of kl_to, 0 for none."""
    array = jax.ShapeDtypeStruct
    pair = (array((n, d_q), dtype), array((d_q, v), dtype)) if d_q else None

    def loss(hidden, unembed, bias, targets, mask, pair):
        out = token_logprob(
            hidden, unembed, targets, bias=bias, vocab_mask=mask, kl_to=pair, impl="pallas_gpu", **options
        )
        return sum(x.sum() for x in out if x is not None and x.dtype != jnp.int32)

    arguments = (
        array((n, d), dtype), array((d, v), dtype), array((v,), jnp.float32), array((n,), jnp.int32),
        array((v,), jnp.bool_), pair,
    )  # fmt: skip
    checks = [DisabledSafetyCheck.custom_call(TRITON)]
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    return export(step, platforms=["cuda"], disabled_checks=checks)(*arguments).mlir_module()


@pytest.mark.parametrize("options", [{}, EVERYTHING, dict(want=("kl_to",), d_q=1000)], ids=["plain", "all", "kl"])
def test_lowers_for_cuda_at_full_size(options):
    n, d, v = QWEN3_8B
    text = lowered(n, d, v, jnp.bfloat16, **options)
    # The forward pass, and the backward one for the chunks and for the smaller last one.
    assert text.count(TRITON) == 3 and "token_logprob_forward" in text and text.count("token_logprob_dx") >= 2
    shapes = re.findall(r"tensor<((?:\d+x)+)\w+>", text)
    assert max(math.prod(int(x) for x in shape.split("x") if x) for shape in shapes) == d * v


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((1, 5, 1), jnp.float32, EVERYTHING),
        ((5, 64, 97), jnp.bfloat16, EVERYTHING),
        ((1037, 100, 1009), jnp.float32, dict(want=("kl_to",), d_q=9)),
        ((1024, 1000, 262144), jnp.bfloat16, dict(block_sizes=(16, 64))),
    ],
    ids=str,
)
def test_odd_shapes_lower_for_cuda(shape, dtype, options):
    assert TRITON in lowered(*shape, dtype, **options)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((1, 5, 97), jnp.float32, dict(bias=True, masked=0.3)),
        ((300, 100, 1009), jnp.float32, dict(bias=True, masked=0.5, d_q=70)),
        ((300, 100, 1009), jnp.bfloat16, dict(masked=0.5)),
        ((1037, 512, 50257), jnp.bfloat16, dict(bias=True, d_q=256)),
    ],
    ids=str,
)
def test_on_a_gpu(shape, dtype, options):
    """No less exact than the naive form on the same GPU, whose products of float32 may be rounded to tf32."""
    arrays, options = problem(*shape, dtype=dtype, **options)
    statics = dict(want=ALL + ("kl_to",) * ("kl_to" in options), softcap=3.0)
    got = jax.jit(partial(run.__wrapped__, impl="pallas_gpu", **statics))(arrays, options)
    naive, truth = run(arrays, options, impl="reference", **statics), exact(arrays, options, **statics)
    np.testing.assert_array_equal(got[0].top1_id, truth[0].top1_id)

    def errors(form):
        pairs = zip(jax.tree.leaves(form), jax.tree.leaves(truth), strict=True)
        finite = [(np.float64(x)[np.isfinite(y)], y[np.isfinite(y)]) for x, y in pairs]
        return [np.linalg.norm(x - y) / (1 + np.linalg.norm(y)) for x, y in finite]

    for ours, theirs in zip(errors(got), errors(naive), strict=True):
        assert ours < 2 * theirs + 1e-5


def test_auto_on_gpus_is_xla(monkeypatch):
    """Until both have been timed."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    (hidden, unembed, targets), _ = problem(5, 6, 130)
    p = Problem(hidden, unembed.T, targets, None, None, jnp.float32(1), None, None)
    assert api.choose("auto", Statics(), p) is xla.IMPLEMENTATION
