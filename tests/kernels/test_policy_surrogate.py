"""The one-pass surrogate against the composed primitives: values, gradients, metrics; plain and interpreted Pallas."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxpo.kernels.policy_surrogate.api import best, policy_surrogate
from jaxpo.primitives import ratios, regularizers, surrogates

IMPLS = {"xla": {}, "pallas_tpu": {"interpret": True}, "reference": {}}
COEFFICIENTS = 1.5, 0.3  # cotangents of policy and kl


def tokens(b, t, seed=0, far=1.0):
    """[B, T] arrays with ragged rows, the first of them empty (b > 1); ratios on both sides of any bound."""
    rng = np.random.default_rng(seed)
    logp = -rng.exponential(size=(b, t)) - 0.01
    mask = np.arange(t) < rng.integers(1, t + 1, b)[:, None]
    if b > 1:
        mask[0] = False
    x = dict(
        logp=logp,
        logp_old=logp + far * rng.normal(scale=0.5, size=(b, t)),
        logp_ref=logp + far * rng.normal(scale=0.5, size=(b, t)),
        adv=rng.normal(size=b),
        weight=mask * rng.random((b, t)),
        count=mask * 2.0,
        kl_weight=mask * rng.random((b, t)),
    )
    return {name: jnp.float32(value) for name, value in x.items()}


def composed(x, *, low, high, form="clipped", dual=None, log_ratio_clip=20.0, kl=None):
    """(policy, kl or None, tokens, clipped, ratio, surrogate) by the primitives."""
    adv = jnp.broadcast_to(x["adv"][:, None] if x["adv"].ndim == 1 else x["adv"], x["logp"].shape)
    log_ratio = ratios.token_log_ratio(x["logp"], x["logp_old"], x["count"], log_ratio_clip=log_ratio_clip)
    r = jnp.exp(log_ratio)
    if form == "clipped":
        loss = surrogates.clipped(r, adv, low, high, dual)
        cut = surrogates.is_clipped(r, adv, low, high, dual)
    else:
        loss = surrogates.detached_weight(jnp.clip(r, low, high), adv, x["logp"])
        cut = jnp.zeros_like(r)
    penalty = None
    if kl:
        penalty = jnp.sum(x["kl_weight"] * regularizers.kl_estimate(x["logp"], x["logp_ref"], kl))
    k3 = partial(regularizers.kl_estimate, estimator="k3")
    means = [jnp.ones_like(r), cut, r, r * adv, k3(x["logp"], x["logp_old"])]
    means += [k3(x["logp"], x["logp_ref"])] if kl else []
    metrics = (jnp.sum(jnp.where(x["count"] > 0, x["count"] * y, 0)) for y in means)
    return jnp.sum(x["weight"] * loss), penalty, *metrics


@partial(jax.jit, static_argnames=("impl", "form", "dual", "kl", "log_ratio_clip"))
def run(x, low, high, impl=None, **options):
    """Outputs and the gradient in logp of the weighted losses; impl None = the primitives."""

    def f(logp):
        y = {**x, "logp": logp}
        if impl is None:
            out = composed(y, low=low, high=high, **options)
        else:
            y = y if options.get("kl") else {n: v for n, v in y.items() if n not in ("logp_ref", "kl_weight")}
            out = policy_surrogate(**y, low=low, high=high, impl=impl, **IMPLS[impl], **options)
        return sum(c * v for c, v in zip(COEFFICIENTS, out[:2], strict=True) if v is not None), tuple(out)

    (_, out), grad = jax.value_and_grad(f, has_aux=True)(x["logp"])
    return out, grad


def assert_equal(got, want):
    for i, (a, b) in enumerate(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6, err_msg=str(i))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(dual=1.5),
        dict(kl="k1"),
        dict(kl="k2", dual=3.0),
        dict(kl="k3"),
        dict(form="detached", kl="k3"),
        dict(log_ratio_clip=0.3),
    ],
    ids=str,
)
def test_equals_the_composed_primitives(impl, options):
    x = tokens(5, 40)
    assert_equal(run(x, 0.8, 1.28, impl=impl, **options), run(x, 0.8, 1.28, **options))


@pytest.mark.parametrize("impl", ["xla", "pallas_tpu"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 513), (130, 7)], ids=str)
def test_shapes_that_no_block_divides_and_bounds_per_token(impl, shape):
    x = tokens(*shape)
    rng = np.random.default_rng(1)
    low, high = jnp.float32(0.7 + 0.2 * rng.random(shape)), jnp.float32(1.1 + 0.2 * rng.random(shape))
    x["adv"] = jnp.float32(rng.normal(size=shape))
    assert_equal(run(x, low, high, impl=impl, kl="k3", dual=2.0), run(x, low, high, kl="k3", dual=2.0))


@pytest.mark.parametrize("impl", ["xla", "pallas_tpu"])
def test_masked_positions_may_hold_anything(impl):
    x = tokens(5, 40)
    dead = x["count"] == 0
    spoiled = {n: jnp.where(dead, jnp.nan, v) if n.startswith("logp") else v for n, v in x.items()}
    got, want = (run(y, 0.8, 1.2, impl=impl, kl="k3") for y in (spoiled, x))
    assert_equal(got, want)
    assert (got[1][dead] == 0).all()


@pytest.mark.parametrize("impl", ["xla", "pallas_tpu"])
def test_far_off_policy_stays_finite(impl):
    x = tokens(5, 40, far=200.0)
    got = run(x, 0.8, 1.2, impl=impl, kl="k3")
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(got))
    assert_equal(got, run(x, 0.8, 1.2, kl="k3"))


def test_float64_stays():
    with jax.enable_x64(True):
        x = {name: np.float64(v) for name, v in tokens(5, 40).items()}
        got, want = run(x, 0.8, 1.2, impl="xla", kl="k3"), run(x, 0.8, 1.2, kl="k3")
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
        with pytest.raises(ValueError, match="takes no float64"):
            run(x, 0.8, 1.2, impl="pallas_tpu", kl="k3")


def test_auto(monkeypatch):
    """The kernel on TPUs, where no compiler would have to cut it into pieces."""
    x = jnp.zeros((8, 2))
    assert best(x.dtype) == "xla"
    monkeypatch.setitem(best.__globals__, "target_platform", lambda: "tpu")
    assert best(x.dtype) == "xla"  # eight devices
    seen = []
    mesh, spec = Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data")
    jax.shard_map(lambda x: seen.append(best(x.dtype)) or x, mesh=mesh, in_specs=spec, out_specs=spec)(x)
    assert seen == ["pallas_tpu"]
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert best(x.dtype) == "pallas_tpu" and best(np.dtype("float64")) == "xla"


def test_a_small_kl_does_not_cancel():
    x = tokens(2, 8)
    x["logp_ref"] = x["logp"] + 1e-4
    got = run(x, 0.8, 1.2, impl="pallas_tpu", kl="k3")[0][1]
    np.testing.assert_allclose(got, 5e-9 * x["kl_weight"].sum(), rtol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(form="clip"), "unknown form 'clip'; known: clipped, detached"),
        (dict(kl="k4"), "unknown kl 'k4'"),
        (dict(impl="cuda"), "unknown impl 'cuda'"),
        (dict(dual=0.5), "dual=0.5 must be above 1"),
        (dict(dual=2.0, form="detached"), "belongs to form='clipped'"),
        (dict(kl="k3", logp_ref=None), "must be given together"),
        (dict(log_ratio_clip=0.0), "log_ratio_clip must be positive"),
        (dict(interpret=True, impl="xla"), "no effect with impl='xla'"),
        (dict(weight=jnp.ones((5, 1))), "weight (5, 1) does not fit logp (5, 40)"),
        (dict(low=jnp.ones((5, 3))), "low (5, 3) does not fit"),
        (dict(adv=jnp.ones(4)), "adv (4, 1) does not fit"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_calls_that_cannot_be_meant(change, message):
    x = tokens(5, 40)
    arguments = dict(x, low=0.8, high=1.2, kl="k1") | change
    with pytest.raises(ValueError) as error:
        policy_surrogate(**arguments)
    assert message in str(error.value)
