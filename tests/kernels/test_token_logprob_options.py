"""Everything that can be wanted, every option, and that nothing is computed which is not wanted."""

import logging
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.kernels import TokenLogProb, token_logprob, token_logprob_grad
from jaxpo.kernels.token_logprob import api
from jaxpo.kernels.token_logprob.plan import BLOCK_BYTES, plan, rows_of_whole_vocabulary
from tests.oracles.cases import COMPILE_FAST

ALL = ("logp", "entropy", "logsumexp", "top1", "sum_p2", "logp_at_temperature", "kl_to")
N, D, V = 7, 6, 97
SMOOTH = ("logp", "entropy", "logsumexp", "sum_p2", "logp_at_temperature", "kl")


@cache
def arrays(n=N, v=V, seed=0):
    """hidden, unembed, bias, targets, vocab_mask, the other pair, and cotangents by the name of the output."""
    rng = np.random.default_rng(seed)
    mask = rng.random(v) < 0.7
    targets = rng.choice(np.flatnonzero(mask), n)
    if n > 3:
        mask[-1], targets[0], targets[1] = True, v - 1, np.flatnonzero(mask)[0]
    kl_to = rng.normal(size=(n, 4)), rng.normal(size=(4, v)), rng.normal(size=v)
    inputs = rng.normal(size=(n, D)), rng.normal(size=(D, v)), rng.normal(size=v)
    return inputs, targets.astype(np.int32), mask, kl_to, dict(zip(SMOOTH, rng.normal(size=(6, n)), strict=True))


@partial(jax.jit, static_argnames=("want", "options"), compiler_options=COMPILE_FAST)
def run(inputs, targets, traced, g, want, options=()):
    """Outputs, and gradients of <g, outputs> in hidden, unembed and bias (None = none). ``g``: name -> cotangent."""

    def f(inputs):
        hidden, unembed, bias = inputs
        out = token_logprob(hidden, unembed, targets, bias=bias, want=want, **traced, **dict(options))
        return sum(jnp.sum(jnp.asarray(x, jnp.float32) * getattr(out, name)) for name, x in g.items()), out

    return jax.grad(f, has_aux=True)(inputs)[::-1]


def assert_close(a, b, tolerance=1e-10):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))


def naive(options):
    """The options of the same call of the naive form."""
    return (*[(k, x) for k, x in options if k not in ("impl", "block_sizes")], ("impl", "reference"))


# --- values and gradients ---------------------------------------------------------------------------------------------

BLOCKS = [(N, V), (N, 32), (3, V), (2, 40)]


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_everything_at_once_equals_the_naive_form(blocks):
    with jax.enable_x64(True):
        inputs, targets, mask, kl_to, g = arrays()
        traced = dict(temperature=0.7, second_temperature=1.3, vocab_mask=mask, kl_to=kl_to)
        options = (("softcap", 3.0), ("impl", "xla"), ("block_sizes", blocks))
        assert_close(
            run(inputs, targets, traced, g, ALL, options), run(inputs, targets, traced, g, ALL, naive(options))
        )


@pytest.mark.parametrize("used", [("bias",), ("vocab_mask",), ("softcap",), ("bias", "softcap")], ids=str)
def test_options_one_at_a_time(used):
    with jax.enable_x64(True):
        (hidden, unembed, bias), targets, mask, _, g = arrays()
        inputs = hidden, unembed, bias if "bias" in used else None
        traced = dict(vocab_mask=mask) if "vocab_mask" in used else {}
        options = (("impl", "xla"), ("block_sizes", (4, 32)), *((("softcap", 2.0),) if "softcap" in used else ()))
        g = {name: g[name] for name in ("logp", "entropy")}
        want = ("logp", "entropy")
        assert_close(
            run(inputs, targets, traced, g, want, options), run(inputs, targets, traced, g, want, naive(options))
        )


def closed_forms():
    """Output and dz (in units of tempered logits) by name, written out in numpy; temperature 0.7, and 1.3 as second."""
    (hidden, unembed, bias), targets, _, (hidden_q, unembed_q, bias_q), _ = arrays()

    def softmax(z):
        p = np.exp(z - z.max(-1, keepdims=True))
        return p / p.sum(-1, keepdims=True)

    z, row, onehot = hidden @ unembed + bias, np.arange(N), np.eye(V)[targets]
    p, p2, q = softmax(z / 0.7), softmax(z / 1.3), softmax((hidden_q @ unembed_q + bias_q) / 0.7)
    entropy = -(p * np.log(p)).sum(-1)
    kl, square = (p * np.log(p / q)).sum(-1), (p * p).sum(-1)
    return {
        "logp": (np.log(p)[row, targets], onehot - p),
        "entropy": (entropy, -p * (np.log(p) + entropy[:, None])),
        "logsumexp": (np.log(np.exp(z / 0.7).sum(-1)), p),
        "sum_p2": (square, 2 * p * (p - square[:, None])),
        "logp_at_temperature": (np.log(p2)[row, targets], (onehot - p2) * 0.7 / 1.3),
        "kl": (kl, p * (np.log(p / q) - kl[:, None])),
        "top1_id": (z.argmax(-1), None),
        "top1_logp": (np.log(p).max(-1), None),
    }


@pytest.mark.parametrize("name", SMOOTH)
def test_each_output_has_its_own_gradient(name):
    """One cotangent at a time, so that no two errors can cancel."""
    with jax.enable_x64(True):
        inputs, targets, _, kl_to, g = arrays()
        traced = dict(temperature=0.7, second_temperature=1.3, kl_to=kl_to)
        out, (dhidden, dunembed, dbias) = run(
            inputs, targets, traced, {name: g[name]}, ALL, (("impl", "xla"), ("block_sizes", (N, 32)))
        )
        of = closed_forms()
        dz = np.float32(g[name])[:, None] * of[name][1] / 0.7
        assert_close((dhidden, dunembed, dbias), (dz @ inputs[1].T, inputs[0].T @ dz, dz.sum(0)))
        for field, (value, _) in of.items():
            np.testing.assert_allclose(getattr(out, field), value, rtol=1e-10, err_msg=field)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_statistic_is_no_less_exact_than_the_naive_form(dtype):
    inputs, targets, mask, kl_to, g = arrays(33, 301)
    inputs, kl_to = jax.tree.map(lambda x: jnp.asarray(x / 2, dtype), (inputs, kl_to))
    traced = dict(temperature=0.7, second_temperature=1.3, vocab_mask=mask, kl_to=kl_to)
    options = (("impl", "xla"), ("block_sizes", (16, 64)))
    got, other = (run(inputs, targets, traced, g, ALL, o) for o in (options, naive(options)))
    with jax.enable_x64(True):
        wide, kl_to = jax.tree.map(np.float64, (inputs, kl_to))
        truth = jax.tree.map(np.asarray, run(wide, targets, traced | dict(kl_to=kl_to), g, ALL, naive(options)))
    for (path, x), y, z in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(other), jax.tree.leaves(truth), strict=True
    ):
        ours, theirs = (np.linalg.norm(np.float64(a) - z) / np.linalg.norm(z) for a in (x, y))
        assert ours < 1.5 * theirs + 1e-6, (jax.tree_util.keystr(path), ours, theirs)


def test_a_pair_that_is_the_same_has_no_divergence():
    (hidden, unembed, _), targets, *_ = arrays()
    hidden, unembed = np.float32(hidden), np.float32(unembed)
    out = token_logprob(hidden, unembed, targets, want=("kl_to",), kl_to=(hidden, unembed), block_sizes=(N, 32))
    np.testing.assert_allclose(out.kl, 0, atol=1e-6)


def test_tied_embeddings_get_both_gradients():
    with jax.enable_x64(True):
        (_, unembed, _), targets, *_ = arrays()

        def loss(table, impl):
            out = token_logprob(jnp.tanh(table[targets]), table.T, targets[::-1], impl=impl)
            return jnp.sum(out.logp + out.entropy)

        grad = jax.jit(jax.grad(loss), static_argnums=1, compiler_options=COMPILE_FAST)
        a, b = (grad(jnp.asarray(unembed.T), impl) for impl in ("xla", "reference"))
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["xla", "reference"])
def test_targets_that_cannot_be_hit(impl):
    """Masked, negative or beyond the end (traced, so that nobody could look): logp -inf, no gradient, no NaN."""
    with jax.enable_x64(True):
        inputs, targets, mask, _, g = arrays()
        mask = mask.copy()
        targets = targets.copy()
        targets[2:5] = np.flatnonzero(~mask)[0], -1, V
        g = {name: g[name] for name in ("logp", "logp_at_temperature")}
        want, traced = ("logp", "logp_at_temperature"), dict(vocab_mask=mask, second_temperature=2.0)
        out, grads = run(inputs, targets, traced, g, want, (("impl", impl),))
        for x in (out.logp, out.logp_at_temperature):
            assert (np.flatnonzero(np.isneginf(x)) == [2, 3, 4]).all() and not np.isnan(x).any()
        assert (grads[0][2:5] == 0).all() and all(np.isfinite(x).all() for x in grads)
        keep = np.r_[0, 1, 5, 6]
        rest = {name: x[keep] for name, x in g.items()}
        few = run((inputs[0][keep], *inputs[1:]), targets[keep], traced, rest, want, (("impl", impl),))
        assert_close(grads[1:], few[1][1:])
        assert (np.asarray(grads[1])[:, ~mask] == 0).all() and (np.asarray(grads[2])[~mask] == 0).all()


def test_one_entry_left():
    """All probability on one entry: every statistic is exact, and nothing can be learned."""
    inputs, _, _, kl_to, g = arrays()
    inputs, kl_to = jax.tree.map(np.float32, (inputs, kl_to))
    mask = np.arange(V) == 70
    traced = dict(second_temperature=1.3, vocab_mask=mask, kl_to=kl_to)
    options = (("impl", "xla"), ("block_sizes", (N, 32)))
    g = {k: x for k, x in g.items() if k != "logsumexp"}
    out, grads = run(inputs, np.full(N, 70, np.int32), traced, g, ALL, options)
    for name in ("logp", "entropy", "logp_at_temperature", "kl", "top1_logp"):
        np.testing.assert_allclose(getattr(out, name), 0, atol=2e-6, err_msg=name)
    assert (out.top1_id == 70).all() and (out.sum_p2 == 1).all()
    assert all(np.abs(x).max() < 1e-5 for x in grads)


def test_the_first_of_equals_is_the_top():
    hidden, unembed = np.ones((2, 1), np.float32), np.zeros((1, V), np.float32)
    unembed[0, [40, 60, 96]] = 1
    out = token_logprob(hidden, unembed, np.zeros(2, np.int32), want=("top1",), block_sizes=(2, 32))
    assert (out.top1_id == 40).all() and out.top1_id.dtype == jnp.int32


@pytest.mark.parametrize("n", [0, 1])
def test_no_token_and_one(n):
    (hidden, unembed, bias), targets, _, kl_to, g = arrays()
    inputs = hidden[:n], unembed, bias
    traced = dict(second_temperature=1.3, kl_to=(kl_to[0][:n], *kl_to[1:]))
    with jax.enable_x64(True):
        g = {name: x[:n] for name, x in g.items()}
        got = run(inputs, targets[:n], traced, g, ALL, (("impl", "xla"),))
        assert_close(got, run(inputs, targets[:n], traced, g, ALL, (("impl", "reference"),)))
        assert n or all((x == 0).all() for x in got[1])


def test_no_weight_no_gradient():
    inputs, targets, mask, kl_to, g = arrays()
    traced = dict(second_temperature=1.3, kl_to=kl_to, vocab_mask=mask)
    _, grads = run(inputs, targets, traced, {name: 0 * x for name, x in g.items()}, ALL, (("impl", "xla"),))
    assert all((x == 0).all() for x in grads)


# --- only what is wanted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["xla", "reference"])
@pytest.mark.parametrize("want", ALL)
def test_the_other_fields_are_none(impl, want):
    (hidden, unembed, _), targets, _, kl_to, _ = arrays()
    options = {"logp_at_temperature": dict(second_temperature=2.0), "kl_to": dict(kl_to=kl_to)}.get(want, {})
    out = jax.eval_shape(lambda: token_logprob(hidden, unembed, targets, want=(want,), impl=impl, **options))
    fields = {"top1": {"top1_id", "top1_logp"}, "kl_to": {"kl"}}.get(want, {want})
    assert {name for name, x in zip(TokenLogProb._fields, out, strict=True) if x is not None} == fields


def products(f, *args):
    """Matrix products in the program of ``f``, which has no loops here (one block)."""
    return str(jax.make_jaxpr(f)(*args)).count(" dot_general[")


def test_products_that_nobody_needs_are_not_done():
    """Of 2 N D V operations each: forward 1, its repetition 1, and one for each gradient that is asked for."""
    (hidden, unembed, _), targets, *_ = arrays()

    def loss(h, w, want=("logp", "entropy")):
        out = token_logprob(h, w, targets, want=want, impl="xla", block_sizes=(N, V))
        return sum(jnp.sum(x) for x in out if x is not None)

    assert products(loss, hidden, unembed) == 1
    assert products(jax.grad(loss, (0, 1)), hidden, unembed) == 4
    assert products(jax.grad(loss, 0), hidden, unembed) == products(jax.grad(loss, 1), hidden, unembed) == 3
    frozen = jax.grad(lambda h, w: loss(h, jax.lax.stop_gradient(w)), (0, 1))
    assert products(frozen, hidden, unembed) == 3
    assert products(jax.jit(frozen), hidden, unembed) == 3
    lora = partial(loss, want=("logp",))
    assert products(jax.grad(lora, 0), hidden, unembed) == 2
    assert products(jax.grad(lora, (0, 1)), hidden, unembed) == 4
    assert products(lambda h, w: token_logprob_grad(h, w, targets, jnp.ones(N)), hidden, unembed) == 3
    assert products(lambda h, w: token_logprob_grad(h, w, targets, jnp.ones(N), frozen=True), hidden, unembed) == 2


def test_frozen_table_gives_the_same_gradient():
    with jax.enable_x64(True):
        (hidden, unembed, bias), targets, mask, _, g = arrays()

        def grad(impl, **options):
            def loss(h):
                out = token_logprob(h, unembed, targets, bias=bias, vocab_mask=mask, softcap=3.0, impl=impl, **options)
                return jnp.sum(g["logp"] * out.logp)

            return jax.jit(jax.grad(loss), compiler_options=COMPILE_FAST)(hidden)

        truth = grad("reference", want=("logp",))
        for want in (("logp",), ("logp", "top1"), ("logp", "entropy")):
            np.testing.assert_allclose(grad("xla", want=want, block_sizes=(3, 32)), truth, rtol=1e-10, atol=1e-12)


def test_auto_falls_back_with_a_reason(monkeypatch, caplog):
    """Where the Pallas form of the platform does not take a problem, and only when it was not asked for by name."""
    monkeypatch.setattr(api, "BY_PLATFORM", {"cpu": "pallas_tpu"})
    (hidden, unembed, _), targets, *_ = arrays()
    hidden, unembed = jnp.bfloat16(hidden), jnp.float32(unembed)  # which it does not mix
    with caplog.at_level(logging.INFO):
        token_logprob(hidden, unembed, targets)
        assert "xla in place of pallas_tpu: give the mesh" in caplog.text  # here there are eight devices
        monkeypatch.setattr(api, "on_one_device", lambda: True)
        out = token_logprob(hidden, unembed, targets)
    assert "xla in place of pallas_tpu: hidden and unembed" in caplog.text
    np.testing.assert_array_equal(out.logp, token_logprob(hidden, unembed, targets, impl="xla").logp)
    with pytest.raises(ValueError, match="impl='pallas_tpu' does not take this problem: hidden and unembed"):
        token_logprob(hidden, unembed, targets, impl="pallas_tpu")


# --- the cotangent is known -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("block", [None, 3])
def test_known_cotangent_equals_the_two_passes(block, frozen):
    with jax.enable_x64(True):
        inputs, targets, mask, _, g = arrays()
        options = dict(temperature=0.7, softcap=3.0, vocab_mask=mask)
        want = ("logp", "entropy", "logsumexp", "top1", "sum_p2")
        traced = dict(temperature=0.7, vocab_mask=mask)
        truth = run(inputs, targets, traced, dict(logp=g["logp"]), want, (("softcap", 3.0), ("impl", "reference")))
        out, grads = token_logprob_grad(
            *inputs[:2], targets, np.float32(g["logp"]), bias=inputs[2], want=want, block_tokens=block, frozen=frozen,
            **options,
        )  # fmt: skip
        assert_close(out, truth[0])
        np.testing.assert_allclose(grads.hidden, truth[1][0], rtol=1e-10, atol=1e-12)
        if frozen:
            assert grads.unembed is None and grads.bias is None
        else:
            assert_close((grads.unembed, grads.bias), truth[1][1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(want=("kl_to",)), "'kl_to' cannot be wanted"),
        (dict(want=("logp_at_temperature",)), "'logp_at_temperature' cannot be wanted"),
        (dict(block_tokens=0), "block_tokens must be positive"),
        (dict(g_logp=np.ones(3)), "g_logp"),
    ],
    ids=str,
)
def test_options_of_the_known_form(options, message):
    (hidden, unembed, _), targets, *_ = arrays()
    with pytest.raises(ValueError, match=message):
        token_logprob_grad(hidden, unembed, targets, **{"g_logp": np.ones(N), **options})


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", BLOCK_BYTES)
@pytest.mark.parametrize("n", [1, 1000, 16_384, 100_001])
@pytest.mark.parametrize("v", [97, 32_768, 151_936, 2_000_000])
def test_blocks_stay_within_the_budget(platform, n, v):
    blocks = plan(platform, n, v, jnp.float32)
    assert 1 <= blocks.tokens <= n and 1 <= blocks.vocab <= v
    assert 4 * blocks.tokens * blocks.vocab <= max(BLOCK_BYTES[platform], 4 * n * 128)
    if platform == "cpu":
        assert blocks.tokens == n
    elif v < 200_000:
        assert blocks.vocab == v and blocks.tokens >= min(n, 2048) / 2 and blocks.tokens <= 8192
    assert 1 <= rows_of_whole_vocabulary(platform, n, v, jnp.float32) <= n


def test_platforms_that_have_no_plan():
    with pytest.raises(ValueError, match="'npu'; known: cpu, gpu, tpu"):
        plan("npu", 1, 1, jnp.float32)
