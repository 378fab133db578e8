"""The blocked form against the naive one: values and gradients in float64, precision in bfloat16, memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.kernels import TokenLogProb, token_logprob
from tests.oracles.cases import COMPILE_FAST

WANT = ("logp", "entropy", "logsumexp")


def problem(n, d, v, scale=1.0, seed=0):
    """hidden [N, D], unembed [D, V], targets [N] that include the ends of the vocabulary, cotangents of the outputs."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, v, n)
    targets[0], targets[-1] = 0, v - 1
    cotangents = TokenLogProb(*rng.normal(size=(3, n)))
    return scale * rng.normal(size=(n, d)), rng.normal(size=(d, v)), targets.astype(np.int32), cotangents


@partial(jax.jit, static_argnames=("impl", "block_sizes", "softcap"), compiler_options=COMPILE_FAST)
def run(hidden, unembed, targets, cotangents, temperature=1.0, **options):
    """Outputs, and the gradients in hidden and unembed of <cotangents, outputs>."""
    out, pull = jax.vjp(
        lambda h, w: token_logprob(h, w, targets, temperature=temperature, want=WANT, **options), hidden, unembed
    )
    return out, pull(jax.tree.map(lambda g, x: jnp.asarray(g, x.dtype), cotangents, out))


def assert_close(a, b, rtol, atol):
    """``a`` and ``b``: (outputs, gradients) as ``run`` gives them, or a part of that."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "v", "blocks", "softcap"),
    [
        (5, 1, None, None),
        (1, 2, (1, 1), None),
        (5, 97, (5, 1), None),
        (5, 97, (2, 32), 2.5),
        (130, 97, (130, 97), None),
        (5, 128, (9, 32), None),
        (1, 130, (1, 128), 2.5),
        (5, 130, None, None),
        (130, 1000, (64, 97), None),
        (5, 1000, (1, 5000), 2.5),
    ],
    ids=lambda x: str(x),
)
def test_values_and_gradients_equal_the_naive_form(n, v, blocks, softcap):
    with jax.enable_x64(True):
        args = problem(n, 6, v)
        for temperature in (1.0, 0.4):
            got = run(*args, temperature=temperature, softcap=softcap, impl="xla", block_sizes=blocks)
            assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(got))
            assert_close(got, run(*args, temperature=temperature, softcap=softcap, impl="reference"), 1e-10, 1e-11)


def test_float32_and_auto():
    hidden, unembed, targets, cotangents = problem(5, 6, 130)
    args = jnp.float32(hidden), jnp.float32(unembed), targets, cotangents
    got = run(*args)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got))
    assert_close(got, run(*args, impl="xla"), 0, 0)
    assert_close(got, run(*args, impl="reference"), 1e-5, 1e-5)


def test_under_vmap_and_shared_by_every_temperature():
    hidden, unembed, targets, _ = problem(5, 6, 130)
    temperatures = jnp.array([0.5, 1.0, 2.0])

    def grad(temperature):
        def loss(h):
            out = token_logprob(h, jnp.float32(unembed), targets, temperature=temperature, block_sizes=(5, 32))
            return out.logp.sum()

        return jax.grad(loss)(jnp.float32(hidden))

    many = jax.jit(jax.vmap(grad), compiler_options=COMPILE_FAST)(temperatures)
    one = jax.jit(grad, compiler_options=COMPILE_FAST)
    np.testing.assert_allclose(many, [one(t) for t in temperatures], rtol=1e-5, atol=1e-5)


def test_the_temperature_has_no_gradient():
    """It is a setting; a zero would be taken for an answer."""
    hidden, unembed, targets, _ = problem(2, 3, 5)
    slope = jax.grad(lambda t: token_logprob(hidden, unembed, targets, temperature=t).logp.sum())
    assert np.isnan(jax.jit(slope, compiler_options=COMPILE_FAST)(1.0))


def test_in_a_loop_that_is_recomputed():
    """As a training step calls it: a scan of microbatches, the forward pass checkpointed, one output a metric only."""
    hidden, unembed, targets, _ = problem(6, 4, 130)
    hidden, unembed = np.float32(hidden), np.float32(unembed)

    def grad(impl):
        @jax.checkpoint
        def loss(w, h, t):
            out = token_logprob(h, w, t, impl=impl)
            return out.logp.sum() + 0 * jax.lax.stop_gradient(out.entropy.sum())

        def step(total, part):
            return total + jax.grad(loss)(unembed, *part), None

        parts = hidden.reshape(2, 3, 4), targets.reshape(2, 3)
        return jax.jit(lambda: jax.lax.scan(step, jnp.zeros_like(unembed), parts)[0], compiler_options=COMPILE_FAST)()

    np.testing.assert_allclose(grad("xla"), grad("reference"), rtol=1e-5, atol=1e-5)


# --- precision and range ----------------------------------------------------------------------------------------------


def exact(hidden, unembed, targets, cotangents, **options):
    """``run`` of the naive form in float64."""
    with jax.enable_x64(True):
        args = np.float64(hidden), np.float64(unembed), targets, cotangents
        return jax.tree.map(np.asarray, run(*args, impl="reference", **options))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_less_exact_than_the_naive_form(dtype):
    hidden, unembed, targets, cotangents = problem(130, 32, 1000)
    hidden, unembed = jnp.asarray(hidden / 4, dtype), jnp.asarray(unembed, dtype)
    naive = run(hidden, unembed, targets, cotangents, impl="reference")
    truth = jax.tree.leaves(exact(hidden, unembed, targets, cotangents))
    names = (*WANT, "d hidden", "d unembed")
    for blocks in ((130, 97), (40, 1000)):
        got = run(hidden, unembed, targets, cotangents, impl="xla", block_sizes=blocks)
        assert [x.dtype.name for x in jax.tree.leaves(got)] == ["float32"] * 3 + [dtype] * 2
        for name, x, y, z in zip(names, jax.tree.leaves(got), jax.tree.leaves(naive), truth, strict=True):
            ours, theirs = (np.linalg.norm(np.float64(a) - z) / np.linalg.norm(z) for a in (x, y))
            assert ours < 1.5 * theirs + 1e-6, (name, ours, theirs)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_extreme_logits(softcap):
    """Logits of +-1e4, and rows whose largest one is in the first, a middle and the last block."""
    v = 130
    unembed = np.zeros((2, v), np.float32)
    unembed[0], unembed[1, [0, 64, 129]] = np.linspace(-1, 1, v), 1
    hidden = np.array([[1e4, 0], [-1e4, 0], [0, 1e4], [0, -1e4], [0, 0]], np.float32)
    targets = np.array([0, 0, 64, 129, 7], np.int32)
    cotangents = TokenLogProb(*np.ones((3, 5)))
    got = run(hidden, unembed, targets, cotangents, softcap=softcap, impl="xla", block_sizes=(5, 32))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    truth = exact(hidden, unembed, targets, cotangents, softcap=softcap)
    assert_close(got[0], truth[0], 1e-6, 2e-3 if softcap is None else 1e-5)  # float32 near 1e4 is spaced by 1e-3
    if softcap is not None:
        assert np.abs(got[0].logsumexp).max() < 30 + np.log(v) + 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("v", [49_152, 128_256, 151_936, 262_144])
def test_vocabularies_of_real_models(v):
    hidden, unembed, targets, cotangents = problem(3, 2, v)
    hidden, unembed = np.float32(hidden), np.float32(unembed)
    got = run(hidden, unembed, targets, cotangents, impl="xla", block_sizes=(3, 4096))
    assert_close(got, exact(hidden, unembed, targets, cotangents), 2e-5, 2e-5)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "share"), [((2048, 512), 1 / 8), ((64, 16384), 1 / 8), (None, 1 / 4)])
def test_the_gradient_does_not_hold_the_logits(blocks, share):
    """A full [N, V] array of float32 is 128 MiB; the naive form holds several."""
    n, d, v = 2048, 16, 16384
    shapes = (
        jax.ShapeDtypeStruct((n, d), jnp.float32),
        jax.ShapeDtypeStruct((d, v), jnp.float32),
        jax.ShapeDtypeStruct((n,), jnp.int32),
    )

    def loss(h, w, t):
        out = token_logprob(h, w, t, block_sizes=blocks)
        return jnp.sum(out.logp + out.entropy)

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < share * n * v * 4


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 5, 4), (4, 7), (5,)), "takes hidden"),
        (((5, 4), (7,), (5,)), "takes hidden"),
        (((5, 4), (4, 7), (5, 1)), "takes hidden"),
        (((5, 4), (3, 7), (5,)), "do not fit together"),
        (((5, 4), (4, 7), (6,)), "do not fit together"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit(shapes, message):
    h, w, t = shapes
    with pytest.raises(ValueError, match=message):
        token_logprob(np.zeros(h, np.float32), np.zeros(w, np.float32), np.zeros(t, np.int32))


PAIR = np.zeros((5, 3), np.float32), np.zeros((3, 7), np.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(impl="pallas_tpv"), "unknown implementation 'pallas_tpv' of token_logprob: did you mean 'pallas_tpu'"),
        (dict(want=("logp", "entrpy")), "unknown want 'entrpy' of token_logprob: did you mean 'entropy'"),
        (dict(want="logp"), "want must be a sequence"),
        (dict(want=()), "want is empty"),
        (dict(block_sizes=(0, 4)), "block_sizes"),
        (dict(block_sizes=(4, -4)), "block_sizes"),
        (dict(block_sizes=(4, 4), impl="reference"), "block_sizes has no effect"),
        (dict(interpret=True, impl="xla"), "interpret has no effect"),
        (dict(grad_filter_eps=1e-3, impl="xla"), "grad_filter_eps has no effect"),
        (dict(softcap=0.0), "softcap"),
        (dict(temperature=0.0), "temperature"),
        (dict(want=("logp_at_temperature",), second_temperature=-1.0), "second_temperature"),
        (dict(want=("logp_at_temperature",)), "second_temperature must be given together"),
        (dict(second_temperature=2.0), "second_temperature must be given together"),
        (dict(want=("kl_to",)), "kl_to must be given together"),
        (dict(kl_to=PAIR), "kl_to must be given together"),
        (dict(want=("kl_to",), kl_to=PAIR[::-1]), "kl_to must be"),
        (dict(want=("kl_to",), kl_to=(*PAIR, np.zeros(3))), "the bias of kl_to"),
        (dict(bias=np.zeros(5)), "bias"),
        (dict(vocab_mask=np.ones(5, bool)), "vocab_mask"),
        (dict(vocab_mask=np.zeros(7, bool)), "vocab_mask has no entry that is True"),
    ],
    ids=str,
)
def test_options_that_cannot_be_meant(options, message):
    with pytest.raises(ValueError, match=message):
        token_logprob(np.zeros((5, 4), np.float32), np.zeros((4, 7), np.float32), np.zeros(5, np.int32), **options)


@pytest.mark.parametrize("targets", [[0, -1], [7, 0]])
def test_concrete_targets_out_of_range(targets):
    with pytest.raises(ValueError, match=r"targets must be in \[0, 7\)"):
        token_logprob(np.zeros((2, 4), np.float32), np.zeros((4, 7), np.float32), np.array(targets))
    with pytest.raises(ValueError, match="targets must be integers"):
        token_logprob(np.zeros((2, 4), np.float32), np.zeros((4, 7), np.float32), np.zeros(2))
