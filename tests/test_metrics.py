"""Metrics of slices merge to the metrics of the whole batch, exactly, and say 0 of nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.metrics import Max, Mean, Moments, Sum, merge, results

VALUE = np.array([3.0, -1.0, 4.0, 1.5, -9.0, 2.6], np.float32)
WEIGHT = np.array([1, 0, 2, 1, 0, 3], np.float32)
WRITTEN = np.repeat(VALUE, WEIGHT.astype(int))  # a weight is a multiplicity


def report(value, weight):
    return {
        "mean": Mean.of(value, weight),
        "max": Max.of(value, weight),
        "x": Moments.of(value, weight),
        "total": Sum(jnp.sum(jnp.where(weight > 0, value, 0) * weight)),
    }


def scalars(metrics):
    return {name: float(x) for name, x in results(metrics).items()}


def test_values_and_names():
    got = scalars(report(VALUE, WEIGHT))
    assert got == pytest.approx(
        {"mean": WRITTEN.mean(), "max": 4.0, "x/mean": WRITTEN.mean(), "x/std": WRITTEN.std(), "total": WRITTEN.sum()},
        rel=1e-6,
    )


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_slices_merge_to_the_whole(n):
    # Slices weigh differently, and with 6 of them some weigh nothing.
    stacked = jax.vmap(report)(VALUE.reshape(n, -1), WEIGHT.reshape(n, -1))
    assert scalars(merge(stacked)) == pytest.approx(scalars(report(VALUE, WEIGHT)), rel=1e-6)


def test_merging_twice_is_merging_once():
    stacked = jax.vmap(jax.vmap(report))(VALUE.reshape(3, 2, 1), WEIGHT.reshape(3, 2, 1))
    once = merge(jax.tree.map(lambda x: x.reshape(6), stacked))
    partial = [merge(jax.tree.map(lambda x, i=i: x[i], stacked)) for i in range(3)]
    twice = merge(jax.tree.map(lambda *x: jnp.stack(x), *partial))
    assert scalars(twice) == pytest.approx(scalars(once), rel=1e-6)


def test_of_nothing_is_zero():
    nothing = report(VALUE, np.zeros(6, np.float32))
    assert scalars(nothing) == {"mean": 0, "max": 0, "x/mean": 0, "x/std": 0, "total": 0}
    assert scalars(merge(jax.tree.map(lambda x: jnp.stack([x, x]), nothing)))["max"] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_has_no_weight_is_not_seen(bad):
    assert scalars(report(np.where(WEIGHT > 0, VALUE, bad), WEIGHT)) == scalars(report(VALUE, WEIGHT))


def test_what_counts_and_is_not_finite_stays_visible():
    for bad in (np.nan, np.inf):
        got = scalars(report(np.array([1, bad], np.float32), np.ones(2, np.float32)))
        assert not np.isfinite(got["max"]) and not np.isfinite(got["mean"]) and not np.isfinite(got["x/std"])


def test_no_cancellation_far_from_zero():
    # mean(x^2) - mean(x)^2 is 0 or worse here in float32.
    value = np.float32(1e4) + np.arange(8, dtype=np.float32) / 10
    got = scalars(merge({"x": jax.vmap(Moments.of)(value.reshape(4, 2), np.ones((4, 2), np.float32))}))
    assert got["x/std"] == pytest.approx(value.astype(np.float64).std(), rel=1e-2)


def test_bfloat16_is_added_in_float32():
    ones = jnp.ones(1000, jnp.bfloat16)
    mean = Mean.of(ones, ones)
    assert mean.total.dtype == jnp.float32 and float(mean.total) == 1000  # bfloat16 would stop at 256


def test_value_and_weight_broadcast():
    mean = Mean.of(jnp.array([[1.0], [5.0]]), jnp.array([[1.0, 1.0], [1.0, 0.0]]))
    assert scalars({"m": mean})["m"] == pytest.approx(7 / 3)


@pytest.mark.parametrize("x64", [False, True])
def test_at_least_float32(x64):
    widest = jnp.float64 if x64 else jnp.float32
    with jax.enable_x64(x64):
        for narrow, wide in ((jnp.bfloat16, jnp.float32), (jnp.float32, jnp.float32), (widest, widest), (int, widest)):
            got = results(report(jnp.asarray(VALUE, narrow), jnp.asarray(WEIGHT, narrow)))
            del got["total"]  # is what it was given
            assert {x.dtype for x in got.values()} == {jnp.dtype(wide)}
