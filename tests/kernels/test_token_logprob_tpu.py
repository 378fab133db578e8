"""The TPU kernels, interpreted on the CPU, against the naive form in float64; and the choice of blocks."""

import dataclasses
import math
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxpo.kernels import TokenLogProb, token_logprob
from jaxpo.kernels.token_logprob import chips, pallas_tpu
from jaxpo.kernels.token_logprob.core import Problem, Rows, Statics
from tests.oracles.cases import COMPILE_FAST

FIELDS = {"top1": ("top1_id", "top1_logp"), "kl_to": ("kl",)}
ALL = ("logp", "entropy", "logsumexp", "top1", "sum_p2", "logp_at_temperature")


def problem(n, d, v, bias=False, masked=0.0, d_q=0, dtype=np.float32, seed=0):
    """hidden, unembed, targets (the ends of the vocabulary among them) and the array options; d_q: hidden size of the
    pair of kl_to, 0 for none."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, v, n)
    targets[0], targets[-1] = 0, v - 1
    options = {"bias": rng.normal(size=v).astype(np.float32) if bias else None}
    if masked:
        options["vocab_mask"] = (rng.random(v) > masked) | (np.arange(v) == v // 2)
    if d_q:
        pair = jnp.asarray(rng.normal(size=(n, d_q)), dtype), jnp.asarray(rng.normal(size=(d_q, v)), dtype)
        options["kl_to"] = (*pair, options["bias"][::-1].copy()) if bias else pair
    hidden = jnp.asarray(2 / math.sqrt(d) * rng.normal(size=(n, d)), dtype)
    return (hidden, jnp.asarray(rng.normal(size=(d, v)), dtype), targets.astype(np.int32)), options


@partial(jax.jit, static_argnames=("want", "softcap", "impl", "block_sizes", "grad_filter_eps"))
def run(arrays, options, **statics):
    """Outputs, and the gradients in hidden, unembed and bias of <cotangents, outputs>; logp of -inf counts 0."""
    hidden, unembed, targets = arrays
    bias, rest = options["bias"], {name: x for name, x in options.items() if name != "bias"}
    if "logp_at_temperature" in statics["want"]:
        rest["second_temperature"] = 1.3
    interpret = {"interpret": True} if statics["impl"] == "pallas_tpu" else {}

    def f(hidden, unembed, bias):
        out = token_logprob(hidden, unembed, targets, bias=bias, temperature=0.7, **rest, **statics, **interpret)
        rng = np.random.default_rng(1)
        finite = [jnp.where(jnp.isfinite(x), x, 0) for x in out if x is not None and x.dtype != jnp.int32]
        return sum(jnp.sum(rng.normal(size=x.shape).astype(x.dtype) * x) for x in finite), out

    wrt = (0, 1) if bias is None else (0, 1, 2)
    (_, out), grads = jax.value_and_grad(f, wrt, has_aux=True)(hidden, unembed, bias)
    return out, grads


def exact(arrays, options, **statics):
    """The same in float64 by the naive form, as numpy arrays."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64) if x.dtype.kind == "f" else x, options)
        hidden, unembed, targets = arrays
        arrays = np.asarray(hidden, np.float64), np.asarray(unembed, np.float64), targets
        statics.pop("block_sizes", None), statics.pop("grad_filter_eps", None)
        return jax.tree.map(np.asarray, run(arrays, wide, **statics | {"impl": "reference"}))


def assert_close(a, b, tolerance=2e-5):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        scale = max(1.0, np.abs(y[np.isfinite(y)]).max(initial=0.0))
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "block_sizes", "softcap", "options"),
    [
        ((1, 4, 1), None, None, {}),
        ((1, 5, 97), None, 3.0, dict(bias=True, masked=0.3)),
        ((5, 6, 130), (16, 128), None, {}),
        ((40, 6, 300), (16, 128), 3.0, dict(bias=True, masked=0.5)),
        ((33, 6, 256), (32, 128), None, dict(bias=True)),
        ((32, 7, 129), (16, 128), None, dict(masked=0.9)),
        ((40, 6, 300), (16, 128), 3.0, dict(bias=True, masked=0.5, d_q=9)),
        ((1, 5, 97), None, None, dict(d_q=5)),
    ],
    ids=str,
)
def test_values_and_gradients_equal_the_naive_form(shape, block_sizes, softcap, options):
    arrays, options = problem(*shape, **options)
    statics = dict(want=ALL + ("kl_to",) * ("kl_to" in options), softcap=softcap, block_sizes=block_sizes)
    got = run(arrays, options, impl="pallas_tpu", **statics)
    assert got[0].top1_id.dtype == jnp.int32 and all(x.dtype == np.float32 for x in jax.tree.leaves(got[1]))
    assert_close(got, exact(arrays, options, **statics))


@pytest.mark.parametrize("want", [*ALL[:3], *ALL[4:], ("logp", "top1"), "kl_to"], ids=str)
def test_each_output_alone(want):
    """No two errors can cancel, and nothing else is computed."""
    want = (want,) if isinstance(want, str) else want
    arrays, options = problem(20, 6, 200, bias=True, d_q=7 * ("kl_to" in want))
    statics = dict(want=want, softcap=3.0, block_sizes=(16, 128))
    out, grads = run(arrays, options, impl="pallas_tpu", **statics)
    fields = {field for name in want for field in FIELDS.get(name, (name,))}
    assert {name for name, x in out._asdict().items() if x is not None} == fields
    assert_close((out, grads), exact(arrays, options, **statics))


@pytest.mark.parametrize("seed", range(4))
def test_odd_shapes(seed):
    rng = np.random.default_rng(seed)
    n, d, v = rng.integers(1, 70), rng.integers(1, 20), rng.integers(1, 500)
    arrays, options = problem(n, d, v, masked=rng.choice([0, 0.5]), seed=seed)
    statics = dict(want=("logp", "entropy"), softcap=None, block_sizes=(16, 128))
    assert_close(run(arrays, options, impl="pallas_tpu", **statics), exact(arrays, options, **statics))


@pytest.mark.parametrize("depth", [256, 128])
def test_hidden_in_parts(depth, monkeypatch):
    monkeypatch.setattr(chips, "plan", lambda *_: chips.Blocks(16, 128, depth))
    arrays, options = problem(20, 512, 300, bias=True, d_q=100)
    statics = dict(want=(*ALL, "kl_to"), softcap=3.0)
    got = jax.jit(partial(run.__wrapped__, impl="pallas_tpu", **statics))(arrays, options)
    assert_close(got, exact(arrays, options, **statics), 5e-5)


def test_bfloat16_is_no_less_exact_than_the_naive_form():
    arrays, options = problem(40, 32, 300, dtype=jnp.bfloat16)
    statics = dict(want=("logp", "entropy", "logsumexp"), softcap=None)
    got = run(arrays, options, impl="pallas_tpu", block_sizes=(16, 128), **statics)
    naive, truth = run(arrays, options, impl="reference", **statics), exact(arrays, options, **statics)
    assert [x.dtype.name for x in jax.tree.leaves(got)] == ["float32"] * 3 + ["bfloat16"] * 2

    def errors(form):
        pairs = zip(jax.tree.leaves(form), jax.tree.leaves(truth), strict=True)
        return [np.linalg.norm(np.float64(x) - y) / np.linalg.norm(y) for x, y in pairs]

    for ours, theirs in zip(errors(got), errors(naive), strict=True):
        assert ours < 1.5 * theirs + 1e-6


def test_over_a_mesh():
    """Shards of 65 rows of the vocabulary, whose last block of 128 reaches beyond them."""
    arrays, options = problem(32, 6, 260, bias=True)
    mesh = Mesh(np.array(jax.devices()).reshape(1, 2, 4), ("data", "fsdp", "tensor"))
    statics = dict(want=ALL, softcap=3.0)
    got = jax.jit(partial(run.__wrapped__, impl="pallas_tpu", mesh=mesh, **statics))(arrays, options)
    assert_close(got, exact(arrays, options, **statics))


def test_targets_that_hit_nothing():
    """Masked out, negative, and beyond the vocabulary but inside its last block: logp -inf, no gradient."""
    (hidden, unembed, _), _ = problem(5, 6, 130)
    mask = np.arange(130) != 7
    targets = jnp.array([7, -1, 130, 200, 3])

    def f(hidden, targets):
        out = token_logprob(
            hidden, unembed, targets, vocab_mask=mask, want=("logp",), impl="pallas_tpu", interpret=True
        )
        return jnp.sum(jnp.where(out.logp > -jnp.inf, out.logp, 0)), out.logp

    (_, logp), grad = jax.jit(jax.value_and_grad(f, has_aux=True))(hidden, targets)
    assert (logp[:4] == -jnp.inf).all() and jnp.isfinite(logp[4])
    assert (grad[:4] == 0).all() and (grad[4] != 0).any()


def test_extreme_logits():
    """Logits of +-1e4; rows whose largest one is in the first and in the last block."""
    unembed = np.zeros((2, 300), np.float32)
    unembed[0], unembed[1, [0, 299]] = np.linspace(-1, 1, 300), 1
    hidden = np.array([[1e4, 0], [-1e4, 0], [0, 1e4], [0, -1e4], [0, 0]], np.float32)
    arrays = jnp.asarray(hidden), jnp.asarray(unembed), np.array([0, 0, 299, 0, 7], np.int32)
    statics = dict(want=ALL, softcap=None, block_sizes=(16, 128))
    got = run(arrays, {"bias": None}, impl="pallas_tpu", **statics)
    assert_close(got, exact(arrays, {"bias": None}, **statics), 1e-3)  # float32 near 1e4 is spaced by 1e-3


# --- what is computed -------------------------------------------------------------------------------------------------


def test_a_frozen_table_has_no_product():
    (hidden, unembed, targets), _ = problem(5, 6, 130)

    def loss(hidden, unembed):
        return token_logprob(hidden, unembed, targets, impl="pallas_tpu", interpret=True).entropy.sum()

    both, one = (str(jax.make_jaxpr(jax.grad(loss, wrt))(hidden, unembed)) for wrt in ((0, 1), 0))
    assert "token_logprob_dhidden" in both and "token_logprob_dtable" in both
    assert "token_logprob_dhidden" in one and "token_logprob_dtable" not in one


def test_small_gradients_are_left_out_within_the_stated_bound():
    """Rows that are certain of their target have no gradient to speak of; the others have."""
    n, d, v, eps = 60, 8, 250, 1e-3
    (hidden, unembed, targets), options = problem(n, d, v, bias=True)
    p = Problem(hidden, unembed.T, targets, jnp.asarray(options["bias"]), None, jnp.float32(1), None, None)
    z = hidden @ unembed + options["bias"]
    lse = jax.nn.logsumexp(z, -1)
    certain = jnp.arange(n) < 32  # whole tiles of 16 tokens
    g = jnp.where(certain, 1e-4, 1.0)
    rows = Rows(lse=lse, hit=g, one=-g)
    statics = Statics(block_tokens=16, block_vocab=128, grads=frozenset({"hidden", "table", "bias"}), interpret=True)

    @partial(jax.jit, compiler_options=COMPILE_FAST)
    def both():
        filtered = pallas_tpu.backward(dataclasses.replace(statics, grad_filter_eps=eps), p, rows)
        return filtered, pallas_tpu.backward(statics, p, rows)

    some, all_ = both()
    assert (some.hidden[:32] == 0).all() and (all_.hidden[:32] != 0).any()
    np.testing.assert_array_equal(some.hidden[32:], all_.hidden[32:])
    assert (jnp.abs(some.hidden - all_.hidden) <= eps * jnp.abs(unembed).sum(1)).all()
    assert (some.table != all_.table).any()
    assert (jnp.abs(some.table - all_.table) <= eps * jnp.abs(hidden).sum(0) + 1e-6).all()
    np.testing.assert_array_equal(some.bias, all_.bias)


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chip", chips.CHIPS.values(), ids=lambda chip: chip.name)
@pytest.mark.parametrize("d", [1024, 4096, 8192])
def test_blocks_fit_the_chip_and_keep_it_busy(chip, d):
    for kernel, outer in (("forward", 0), ("dhidden", 0), ("dtable", 1)):
        blocks = chips.plan(kernel, 16384, d, 151936, 2, chip)
        assert blocks[outer] > chip.flops_per_byte
        assert d % blocks.depth == 0 and chips.vmem_bytes(kernel, blocks, d, 2) < chip.vmem
        assert blocks.tokens % chips.SUBLANES == 0 and blocks.vocab % chips.LANES == 0


def test_hidden_is_cut_where_it_does_not_fit():
    v5p = chips.CHIPS["v5p"]
    assert chips.plan("forward", 16384, 8192, 151936, 2, v5p).depth == 8192
    for kernel in ("dhidden", "dtable"):
        assert chips.plan(kernel, 16384, 16384, 151936, 2, v5p).depth < 16384
    with pytest.raises(ValueError, match="no blocks of hidden size 16384 fit the 64 MiB .* with the block sizes given"):
        chips.plan("dhidden", 16384, 16384, 151936, 2, v5p, 1024, 512)


def test_few_tokens_are_not_padded_to_a_block():
    v6e = chips.CHIPS["v6e"]
    assert chips.plan("forward", 1, 64, 97, 2, v6e)[:2] == (1, 97)
    tokens = chips.plan("forward", 1100, 64, 97, 2, v6e).tokens
    assert -(-1100 // tokens) == 2 and 2 * tokens - 1100 < 2 * chips.SUBLANES


def test_chips_are_found_by_kind(monkeypatch):
    def on(kind):
        monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
        return chips.current_chip().name

    assert [on("TPU v5 lite"), on("TPU v5"), on("TPU v6 lite"), on("cpu")] == ["v5e", "v5p", "v6e", "v5p"]
    with pytest.raises(ValueError, match="no block sizes for chip 'TPU v3'; known: v5e, v5p, v6e"):
        on("TPU v3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(block_sizes=(20, 128)), "block_tokens=20 is no multiple of 16; nearest: 16"),
        (dict(block_sizes=(16, 200)), "block_vocab=200 is no multiple of 128; nearest: 256"),
        (dict(hidden=jnp.zeros((40, 6), jnp.bfloat16)), "both bfloat16 or both float32, not bfloat16 and float32"),
        (dict(hidden=jnp.zeros((0, 6)), targets=jnp.zeros(0, jnp.int32)), "there are no tokens"),
    ],
    ids=["tokens", "vocab", "dtypes", "empty"],
)
def test_problems_that_are_refused(change, message):
    (hidden, unembed, targets), _ = problem(40, 6, 300)
    arguments = dict(hidden=hidden, unembed=unembed, targets=targets) | change
    with pytest.raises(ValueError, match=message):
        token_logprob(**arguments, impl="pallas_tpu", interpret=True)


def test_every_field_has_a_test():
    assert {field for name in (*ALL, "kl_to") for field in FIELDS.get(name, (name,))} == set(TokenLogProb._fields)
