"""KL estimators, point by point (their expectations: tests/objectives/test_estimators.py)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.primitives.regularizers import KL_ESTIMATORS, kl_estimate, kl_penalty

D = np.array([-40.0, -19.0, -3.0, -0.5, -1e-9, 0.0, 1e-9, 0.5, 3.0, 19.0, 40.0])  # logp - logp_ref


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def _value_and_slope(estimate) -> tuple[np.ndarray, np.ndarray]:
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(lambda d: estimate(d, jnp.zeros_like(d)))))(jnp.asarray(D))
    return np.asarray(value), np.asarray(slope)


@pytest.mark.parametrize(
    "estimator,value,slope",
    [
        ("k1", lambda d: d, lambda d: 1),
        ("k2", lambda d: d * d / 2, lambda d: d),
        ("k3", lambda d: math.exp(-d) + d - 1, lambda d: 1 - math.exp(-d)),
        ("abs", abs, lambda d: math.copysign(1, d)),
    ],
)
def test_estimators_are_their_formulas(estimator, value, slope):
    inside = (np.abs(D) < 20) & (np.abs(D) > 1e-6)
    actual = _value_and_slope(lambda logp, ref: kl_estimate(logp, ref, estimator))
    np.testing.assert_allclose(actual[0][inside], [value(d) for d in D[inside]], rtol=1e-9)
    np.testing.assert_allclose(actual[1][inside], [slope(d) for d in D[inside]], rtol=1e-9)


def test_k2_k3_and_abs_are_never_negative_and_all_vanish_at_the_reference():
    for estimator in KL_ESTIMATORS:
        value, slope = _value_and_slope(lambda logp, ref, e=estimator: kl_estimate(logp, ref, e))
        assert value[D == 0] == 0
        if estimator != "k1":
            assert (value >= 0).all()
        if estimator in ("k2", "k3"):
            assert slope[D == 0] == 0


def test_k3_is_constant_beyond_20_and_never_drives_away_from_the_reference():
    value, slope = _value_and_slope(lambda logp, ref: kl_estimate(logp, ref, "k3"))
    assert value[0] == pytest.approx(math.exp(20) - 20 - 1, rel=1e-9)
    assert value[-1] == pytest.approx(math.exp(-20) + 20 - 1, rel=1e-9)
    assert slope[0] == slope[-1] == 0
    assert (slope * D >= 0).all()


def test_k3_survives_cancellation_in_float32():
    d = jnp.asarray(1e-3, jnp.float32)
    assert float(kl_estimate(d, jnp.zeros_like(d), "k3")) == pytest.approx(1e-6 / 2, rel=2e-2)


@pytest.mark.parametrize("estimator", ("k1", "k3", "abs"))
def test_straight_through_has_the_value_of_the_estimator_and_the_gradient_of_k2(estimator):
    plus = _value_and_slope(lambda logp, ref: kl_penalty(logp, ref, estimator, gradient="k2"))
    np.testing.assert_allclose(
        plus[0], _value_and_slope(lambda logp, ref: kl_estimate(logp, ref, estimator))[0], rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(plus[1], _value_and_slope(lambda logp, ref: kl_estimate(logp, ref, "k2"))[1], rtol=1e-12)
