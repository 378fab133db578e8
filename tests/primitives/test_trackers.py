"""The tracked value of a prompt: a Beta posterior that forgets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.primitives import trackers

forgetting = jax.jit(trackers.forgetting)
init = jax.jit(functools.partial(trackers.tracker_init, rho_min=0.875))


@jax.jit
def moved(alpha, beta, reward, rho):
    """The value before and after an update."""
    return trackers.tracker_value(alpha, beta), trackers.tracker_value(
        *trackers.tracker_update(alpha, beta, reward, rho)
    )


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("reward", (0.0, 1.0, 0.3))
def test_the_beta_update_is_an_exponential_average_with_rate_1_over_rho_times_alpha_plus_beta_plus_1(reward):
    rng = np.random.default_rng(0)
    alpha, beta, rho = rng.uniform(0.5, 9, 50), rng.uniform(0.5, 9, 50), rng.uniform(0.8, 1, 50)
    before, after = moved(alpha, beta, reward, rho)
    eta = 1 / (rho * (alpha + beta) + 1)
    np.testing.assert_allclose(after, before + eta * (reward - before), rtol=1e-12)
    assert np.abs(after - before).mean() > 1e-3


def test_the_first_value_is_the_smoothed_share_of_successes_with_the_weight_of_the_memory():
    successes = np.arange(9.0)
    alpha, beta = init(successes, 8.0)
    np.testing.assert_allclose(alpha / (alpha + beta), (successes + 0.5) / 9, rtol=1e-12)
    np.testing.assert_allclose(alpha + beta, 8, rtol=1e-12)  # 1 / (1 - 0.875): what an endless memory of rho_min weighs
    assert [float(x) for x in init(0.0, 0.0)] == [0.5, 0.5]


def test_an_endless_memory_weighs_1_over_1_minus_rho():
    alpha = beta = jnp.float64(4.0)
    for reward in (1.0, 0.0, 0.0, 1.0, 1.0):
        alpha, beta = trackers.tracker_update(alpha, beta, reward, 0.875)
        assert float(alpha + beta) == pytest.approx(8)


def test_memory_halves_every_d_half_within_its_bounds():
    """0.06 halves it, which is below rho_min."""
    drift = np.array([0.0, 0.001, 0.06 * np.log2(1 / 0.9), 0.06, 9.0])
    np.testing.assert_allclose(forgetting(drift), [0.96, 0.96, 0.9, 0.875, 0.875], rtol=1e-12)
    np.testing.assert_allclose(trackers.forgetting(0.12, d_half=0.06, rho_min=0.0, rho_max=1.0), 0.25, rtol=1e-12)


def test_prompts_of_value_one_half_are_drawn_most_and_none_never():
    value = np.linspace(0, 1, 101)
    weight = np.asarray(trackers.prompt_weights(value))
    assert value[weight.argmax()] == 0.5 and weight.max() == pytest.approx(0.55)
    assert weight.min() == pytest.approx(0.05)
    np.testing.assert_allclose(weight, weight[::-1], rtol=1e-12)
    assert np.asarray(trackers.prompt_weights(np.array([-0.2, 1.2]))).tolist() == [0.05, 0.05]  # rewards outside [0, 1]
