"""The blocked form against the naive one: values and gradients in float64, precision in bfloat16, memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.kernels import LogProbStats, token_logprob
from tests.oracles.cases import COMPILE_FAST


def problem(n, d, v, scale=1.0, seed=0):
    """hidden [N, D], unembed [D, V], targets [N] that include the ends of the vocabulary, cotangents of the outputs."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, v, n)
    targets[0], targets[-1] = 0, v - 1
    cotangents = LogProbStats(*rng.normal(size=(3, n)))
    return scale * rng.normal(size=(n, d)), rng.normal(size=(d, v)), targets.astype(np.int32), cotangents


@partial(jax.jit, static_argnames=("impl", "block_vocab", "softcap"), compiler_options=COMPILE_FAST)
def run(hidden, unembed, targets, cotangents, temperature=1.0, **options):
    """Outputs, and the gradients in hidden and unembed of <cotangents, outputs>."""
    out, pull = jax.vjp(lambda h, w: token_logprob(h, w, targets, temperature=temperature, **options), hidden, unembed)
    return out, pull(jax.tree.map(lambda g, x: jnp.asarray(g, x.dtype), cotangents, out))


def assert_close(a, b, rtol, atol):
    """``a`` and ``b``: (outputs, gradients) as ``run`` gives them, or a part of that."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "v", "block", "softcap"),
    [
        (5, 1, None, None),
        (1, 2, 1, None),
        (5, 97, 1, None),
        (5, 97, 32, 2.5),
        (130, 97, 97, None),
        (5, 128, 32, None),
        (1, 130, 128, 2.5),
        (5, 130, None, None),
        (130, 1000, 97, None),
        (5, 1000, 5000, 2.5),
    ],
    ids=lambda x: str(x),
)
def test_values_and_gradients_equal_the_naive_form(n, v, block, softcap):
    with jax.enable_x64(True):
        args = problem(n, 6, v)
        for temperature in (1.0, 0.4):
            got = run(*args, temperature=temperature, softcap=softcap, impl="xla", block_vocab=block)
            assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(got))
            assert_close(got, run(*args, temperature=temperature, softcap=softcap, impl="reference"), 1e-10, 1e-11)


def test_each_output_has_its_own_gradient():
    """One cotangent at a time, so that no two errors can cancel; the closed forms are written out."""
    with jax.enable_x64(True):
        hidden, unembed, targets, _ = problem(5, 6, 97)
        z = hidden @ unembed / 0.7
        p = np.exp(z - z.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        entropy = -(p * np.log(p)).sum(-1, keepdims=True)
        of = {"logp": np.eye(97)[targets] - p, "entropy": -p * (np.log(p) + entropy), "logsumexp": p}
        for name, dz in of.items():
            g = LogProbStats(*(np.full(5, float(name == field)) for field in LogProbStats._fields))
            out, grads = run(hidden, unembed, targets, g, temperature=0.7, impl="xla", block_vocab=32)
            assert_close(grads, (dz @ unembed.T / 0.7, hidden.T @ dz / 0.7), 1e-10, 1e-12)
        np.testing.assert_allclose(out.entropy, entropy[:, 0], rtol=1e-12)


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
        return jax.grad(
            lambda h: token_logprob(
                h, jnp.float32(unembed), targets, temperature=temperature, block_vocab=32
            ).logp.sum()
        )(jnp.float32(hidden))

    many = jax.jit(jax.vmap(grad), compiler_options=COMPILE_FAST)(temperatures)
    one = jax.jit(grad, compiler_options=COMPILE_FAST)
    np.testing.assert_allclose(many, [one(t) for t in temperatures], rtol=1e-5, atol=1e-5)


# --- precision and range ----------------------------------------------------------------------------------------------


def test_bfloat16_is_no_less_exact_than_the_naive_form():
    hidden, unembed, targets, cotangents = problem(130, 32, 1000)
    hidden, unembed = jnp.bfloat16(hidden / 4), jnp.bfloat16(unembed)
    got = run(hidden, unembed, targets, cotangents, impl="xla", block_vocab=97)
    naive = run(hidden, unembed, targets, cotangents, impl="reference")
    assert [x.dtype.name for x in jax.tree.leaves(got)] == ["float32"] * 3 + ["bfloat16"] * 2
    with jax.enable_x64(True):
        exact = jax.tree.map(
            np.asarray, run(np.float64(hidden), np.float64(unembed), targets, cotangents, impl="reference")
        )
    errors = [
        [
            np.linalg.norm(np.float64(x) - y) / np.linalg.norm(y)
            for x, y in zip(jax.tree.leaves(form), jax.tree.leaves(exact), strict=True)
        ]
        for form in (got, naive)
    ]
    for ours, theirs, name in zip(*errors, ("logp", "entropy", "logsumexp", "d hidden", "d unembed"), strict=True):
        assert ours < 1.5 * theirs + 1e-6, (name, ours, theirs)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_extreme_logits(softcap):
    """Logits of +-1e4, and rows whose largest one is in the first, a middle and the last block."""
    v = 130
    unembed = np.zeros((2, v), np.float32)
    unembed[0], unembed[1, [0, 64, 129]] = np.linspace(-1, 1, v), 1
    hidden = np.array([[1e4, 0], [-1e4, 0], [0, 1e4], [0, -1e4], [0, 0]], np.float32)
    targets = np.array([0, 0, 64, 129, 7], np.int32)
    cotangents = LogProbStats(*np.ones((3, 5)))
    got = run(hidden, unembed, targets, cotangents, softcap=softcap, impl="xla", block_vocab=32)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    with jax.enable_x64(True):
        exact = jax.tree.map(
            np.asarray,
            run(np.float64(hidden), np.float64(unembed), targets, cotangents, softcap=softcap, impl="reference"),
        )
    assert_close(got[0], exact[0], 1e-6, 2e-3 if softcap is None else 1e-5)  # float32 near 1e4 is spaced by 1e-3
    if softcap is not None:
        assert np.abs(got[0].logsumexp).max() < 30 + np.log(v) + 1e-3


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block", "share"), [(512, 1 / 8), (None, 1 / 4)])
def test_the_gradient_does_not_hold_the_logits(block, share):
    """A full [N, V] array of float32 is 128 MiB; the naive form holds several."""
    n, d, v = 2048, 16, 16384
    shapes = (
        jax.ShapeDtypeStruct((n, d), jnp.float32),
        jax.ShapeDtypeStruct((d, v), jnp.float32),
        jax.ShapeDtypeStruct((n,), jnp.int32),
    )

    def loss(h, w, t):
        out = token_logprob(h, w, t, block_vocab=block)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(impl="pallas"), "unknown implementation 'pallas' of token_logprob: known: auto, xla, reference"),
        (dict(block_vocab=0), "block_vocab"),
        (dict(block_vocab=-4), "block_vocab"),
        (dict(block_vocab=4, impl="reference"), "block_vocab"),  # an option without effect
        (dict(softcap=0.0), "softcap"),
        (dict(temperature=0.0), "temperature"),
    ],
    ids=str,
)
def test_options_that_cannot_be_meant(options, message):
    with pytest.raises(ValueError, match=message):
        token_logprob(np.zeros((5, 4), np.float32), np.zeros((4, 7), np.float32), np.zeros(5, np.int32), **options)
