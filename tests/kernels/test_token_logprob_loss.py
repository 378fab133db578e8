"""A loss with its gradients from one pass over the logits, against the loss of `token_logprob` and its derivative."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxpo.kernels import token_logprob, token_logprob_loss
from jaxpo.kernels.token_logprob.plan import whole_vocabulary_slices
from tests.oracles.cases import COMPILE_FAST

N, D, V, SLICES = 24, 6, 97, 4
WANT = ("logp", "entropy", "logsumexp", "sum_p2", "top1", "logp_at_temperature")
OPTIONS = dict(temperature=0.7, second_temperature=1.3, softcap=4.0, want=WANT)


def arrays(seed=0):
    """(hidden, unembed, bias), targets, vocab_mask, what the loss reads of a token, and a number it closes over."""
    rng = np.random.default_rng(seed)
    mask = rng.random(V) < 0.7
    targets = rng.choice(np.flatnonzero(mask), N).astype(np.int32)
    return (
        (rng.normal(size=(N, D)), rng.normal(size=(D, V)), rng.normal(size=V)),
        targets,
        mask,
        rng.normal(size=N),
        0.3,
    )


def loss(scale, out, adv):
    """Of a slice: a ratio that is 1, and something of every statistic with a gradient."""
    ratio = jnp.exp(out.logp - jax.lax.stop_gradient(out.logp))
    smooth = scale * jnp.square(out.entropy) + jnp.sin(out.logsumexp) + out.sum_p2 - 0.5 * out.logp_at_temperature
    return jnp.sum(ratio * adv + smooth), dict(entropy=jnp.sum(out.entropy), top1=out.top1_id, logp=out.top1_logp)


def once(scale, adv, targets, mask, hidden, unembed, bias, mesh=None):
    parts = adv.reshape(SLICES, -1)
    options = dict(bias=bias, vocab_mask=mask, mesh=mesh, **OPTIONS)
    value, aux = token_logprob_loss(partial(loss, scale), hidden, unembed, targets, parts, **options)
    return -3 * value, aux


def twice(scale, adv, targets, mask, hidden, unembed, bias):
    value, aux = loss(scale, token_logprob(hidden, unembed, targets, bias=bias, vocab_mask=mask, **OPTIONS), adv)
    return -3 * value, aux


@pytest.mark.parametrize("sizes", [None, (4, 1, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)], ids=str)
def test_value_gradients_and_the_rest_are_those_of_two_passes(sizes):
    axes = ("data", "fsdp", "tensor")
    mesh = None if sizes is None else jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * 3)
    with jax.enable_x64(True):
        inputs, targets, mask, adv, scale = arrays()

        def all_of(f):
            at = partial(jax.value_and_grad(f, argnums=(4, 5, 6), has_aux=True))
            (value, aux), grads = jax.jit(at, compiler_options=COMPILE_FAST)(scale, adv, targets, mask, *inputs)
            rest = aux["entropy"].sum(), aux["top1"].reshape(-1), aux["logp"].reshape(-1)
            return value, rest, grads

        got, want = all_of(partial(once, mesh=mesh)), all_of(twice)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_the_value_alone():
    inputs, targets, mask, adv, scale = arrays()
    got, want = (f(scale, adv, targets, mask, *inputs)[0] for f in (once, twice))
    np.testing.assert_allclose(got, want, rtol=2e-5)


def test_products_of_logits_and_gradients_are_made_once():
    inputs, targets, mask, adv, scale = arrays()

    def products(f, *argnums):
        return str(jax.make_jaxpr(jax.grad(f, argnums, has_aux=True))(scale, adv, targets, mask, *inputs)).count(
            " dot_general["
        )

    assert (products(once, 4, 5), products(once, 4), products(once, 5)) == (3, 2, 2)
    frozen = lambda *x: once(*x[:5], jax.lax.stop_gradient(x[5]), x[6])  # noqa: E731
    assert products(frozen, 4, 5) == 2


def test_bfloat16_gradients_are_as_good_as_those_of_two_passes():
    inputs, targets, mask, adv, scale = arrays(1)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in inputs]
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in rounded]
        exact = jax.device_get(jax.grad(twice, (4, 5), has_aux=True)(scale, adv, targets, mask, *wide)[0])
    got, naive = (jax.grad(f, (4, 5), has_aux=True)(scale, adv, targets, mask, *rounded)[0] for f in (once, twice))
    for g, other, e in zip(got, naive, exact, strict=True):
        assert g.dtype == jnp.bfloat16
        error, of_two = (np.abs(np.asarray(x, np.float64) - e).max() for x in (g, other))
        assert error <= 1.5 * of_two


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(want=("logp", "kl_to")), "'kl_to' cannot be wanted"),
        (dict(want=("logpp",)), "did you mean 'logp'"),
        (dict(parts=np.zeros((5, 1))), "24 tokens cannot be cut into 5 slices"),
        (dict(softcap=-1.0), "softcap must be positive"),
    ],
    ids=str,
)
def test_calls_that_cannot_be_meant(change, message):
    (hidden, unembed, _), targets, *_ = arrays()
    arguments = dict(parts=np.zeros((SLICES, 1))) | change
    with pytest.raises(ValueError, match=message):
        token_logprob_loss(lambda out, part: (jnp.sum(out.logp), None), hidden, unembed, targets, **arguments)


def test_slices_keep_to_the_budget_and_to_units():
    plan = partial(whole_vocabulary_slices, "gpu")
    assert whole_vocabulary_slices("cpu", 64, 1024, 151_936) is None
    assert plan(64, 512, 32_768) == 4  # 8192 tokens at most, whatever the budget
    assert plan(64, 1024, 151_936) == 32  # 2 GiB hold 3533 tokens: two rows
    assert plan(64, 1024, 151_936, 4) is None  # 4 rows do not fit
    assert plan(64, 512, 151_936, 4) == 16
    assert plan(8, 1024, 151_936, token_shards=8) == 8
    assert plan(12, 16, 100, token_shards=8) is None  # a device would have no whole slice
    assert plan(8, 8192, 151_936) is None and plan(8, 8192, 151_936, vocab_shards=4) == 8
