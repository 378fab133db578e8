"""The GPU kernel of the surrogate: interpreted on the CPU, lowered for CUDA, and run where there is a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.export import DisabledSafetyCheck, export

from jaxpo.kernels.policy_surrogate.api import best, policy_surrogate
from tests.kernels.test_policy_surrogate import COEFFICIENTS, assert_equal, run, tokens

TRITON = "__gpu$xla.gpu.triton"
CASES = [
    ((5, 40), dict()),
    ((1, 1), dict(dual=1.5, kl="k1")),
    ((3, 1030), dict(kl="k2", dual=3.0)),
    ((130, 7), dict(kl="k3")),
    ((9, 200), dict(form="detached", kl="k3")),
    ((4, 64), dict(log_ratio_clip=0.3)),
]


def loss(logp, x, low, high, interpret, **options):
    """The weighted losses, and all outputs."""
    y = {name: v for name, v in x.items() if options.get("kl") or name not in ("logp_ref", "kl_weight")} | {
        "logp": logp
    }
    out = policy_surrogate(**y, low=low, high=high, impl="pallas_gpu", interpret=interpret, **options)
    return sum(c * v for c, v in zip(COEFFICIENTS, out[:2], strict=True) if v is not None), tuple(out)


def gpu(x, low, high, interpret=True, **options):
    """As `run` of `test_policy_surrogate`."""
    step = jax.value_and_grad(partial(loss, interpret=interpret, **options), has_aux=True)
    (_, out), grad = jax.jit(step)(x["logp"], x, low, high)
    return out, grad


def per_token(x):
    """Bounds and advantages [B, T]."""
    rng, shape = np.random.default_rng(1), x["logp"].shape
    low, high = jnp.float32(0.7 + 0.2 * rng.random(shape)), jnp.float32(1.1 + 0.2 * rng.random(shape))
    return x | {"adv": jnp.float32(rng.normal(size=shape))}, low, high


@pytest.mark.parametrize(("shape", "options"), CASES, ids=str)
def test_equals_the_composed_primitives(shape, options):
    x = tokens(*shape)
    assert_equal(gpu(x, 0.8, 1.28, **options), run(x, 0.8, 1.28, **options))


def test_bounds_per_token():
    x, low, high = per_token(tokens(3, 513))
    assert_equal(gpu(x, low, high, kl="k3", dual=2.0), run(x, low, high, kl="k3", dual=2.0))


def test_masked_positions_may_hold_anything():
    x = tokens(5, 40)
    dead = x["count"] == 0
    spoiled = {n: jnp.where(dead, jnp.nan, v) if n.startswith("logp") else v for n, v in x.items()}
    got = gpu(spoiled, 0.8, 1.2, kl="k3")
    assert_equal(got, run(x, 0.8, 1.2, kl="k3"))
    assert (got[1][dead] == 0).all()


def test_dtypes_and_auto(monkeypatch):
    with jax.enable_x64(True), pytest.raises(ValueError, match="impl='pallas_gpu' takes no float64"):
        gpu({name: np.float64(v) for name, v in tokens(5, 40).items()}, 0.8, 1.2)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert best(jnp.float32) == "pallas_gpu" and best(jnp.float64) == "xla"


@pytest.mark.parametrize(("shape", "options"), [*CASES, ((512, 8192), dict(kl="k3", dual=3.0))], ids=str)
def test_lowers_for_cuda(shape, options):
    x = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), jax.eval_shape(lambda: arrays(*shape)))
    step = jax.jit(jax.grad(partial(loss, interpret=False, **options), has_aux=True))
    module = export(step, platforms=["cuda"], disabled_checks=[DisabledSafetyCheck.custom_call(TRITON)])
    assert module(x["logp"], x, 0.8, x["logp"]).mlir_module().count(TRITON) == 1


def arrays(b, t):
    """What `tokens` makes, as zeros."""
    return {name: jnp.zeros(v.shape[:1] + (t,) * (v.ndim - 1)) for name, v in tokens(b, 1).items()}


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "options"), [*CASES, ((512, 1000), dict(kl="k3", dual=3.0))], ids=str)
def test_on_a_gpu(shape, options):
    x, low, high = per_token(tokens(*shape))
    assert_equal(gpu(x, low, high, interpret=False, **options), run(x, low, high, **options))
