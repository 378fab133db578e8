"""The gap between sampler and trainer: weights and rejections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.primitives import mismatch
from tests.oracles.cases import CASES

CASE = CASES["unequal groups"]
MASK = CASE.mask
OLD = CASE.logp_old
BEH = np.where(MASK, OLD - 0.5 * np.random.default_rng(0).normal(size=MASK.shape), np.nan)
GAP = np.where(MASK, OLD - BEH, 0)
LENGTH = np.maximum(MASK.sum(1), 1)
BY_LEVEL = {"token": GAP, "sequence": GAP.sum(1), "geometric": GAP.sum(1) / LENGTH}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def log_weight(level: str, old=OLD, **options) -> np.ndarray:
    return np.asarray(mismatch.log_weight(jnp.asarray(old), jnp.asarray(BEH), jnp.asarray(MASK), level, **options))


@pytest.mark.parametrize("level", mismatch.LEVELS)
def test_the_weight_is_old_over_behaviour_of_a_token_of_the_row_or_its_geometric_mean(level):
    assert np.abs(BY_LEVEL[level]).max() > 0.3
    np.testing.assert_allclose(log_weight(level), BY_LEVEL[level], atol=1e-12)


@pytest.mark.parametrize("level", mismatch.LEVELS)
def test_it_is_clamped_and_1_where_nothing_was_sampled(level):
    far = log_weight(level, np.where(MASK, BEH + 90, np.nan), log_ratio_clip=5.0)
    on = MASK if level == "token" else MASK.any(1)
    assert (far[on] == 5).all() and (far[~on] == 0).all() and (~on).any()


def test_no_gradient_flows_through_it():
    grad = jax.grad(lambda x: mismatch.log_weight(x, jnp.zeros((2, 3)), jnp.ones((2, 3)), "sequence").sum())
    assert (grad(jnp.ones((2, 3))) == 0).all()


def test_truncated_weights_are_cut_and_masked_ones_dropped():
    w = np.exp(GAP)
    assert (w[MASK] > 1.5).any() and (w[MASK] < 0.6).any()
    np.testing.assert_allclose(mismatch.truncated(jnp.asarray(GAP), 1.5), np.minimum(w, 1.5), rtol=1e-12)
    inside = (w >= 0.6) & (w <= 1.5)
    np.testing.assert_allclose(mismatch.masked(jnp.asarray(GAP), 0.6, 1.5), np.where(inside, w, 0), rtol=1e-12)


kept = jax.jit(mismatch.kept, static_argnames=("estimator", "level"))


def kl(estimator: str) -> np.ndarray:
    """[B, T] estimates of KL(behaviour || old) from tokens of the behaviour."""
    d = -GAP
    return {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) + d - 1}[estimator]


@pytest.mark.parametrize("level", mismatch.LEVELS)
@pytest.mark.parametrize("estimator", ("k1", "k2", "k3"))
@pytest.mark.parametrize("low", (None, -0.5, 0.01))
def test_rejection_keeps_what_diverges_by_no_more_than_the_bound(estimator, level, low):
    gap = {"token": lambda x: x, "sequence": lambda x: x.sum(1), "geometric": lambda x: x.sum(1) / LENGTH}[level](
        kl(estimator)
    )
    expected = (gap <= 0.3) & (True if low is None else gap >= low)
    assert expected.any() and not expected.all()
    args = [jnp.asarray(x) for x in (OLD, BEH, MASK)]
    np.testing.assert_array_equal(kept(*args, estimator, level, 0.3, low), expected)


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="level must be one of token, sequence, geometric"):
        log_weight("row")


def test_the_decoupled_loss_is_measured_from_old_and_weighted_by_old_over_behaviour():
    """E_beh[w r A] = E_old[r A] = E_new[A] for r = new / old, w = old / beh: three policies, one expectation."""
    new, old, beh = jax.nn.softmax(jnp.asarray(np.random.default_rng(1).normal(size=(3, 5))))
    adv, on = jnp.arange(5.0), jnp.ones(5)
    w = jnp.exp(mismatch.log_weight(jnp.log(old), jnp.log(beh), on, "token"))
    np.testing.assert_allclose((beh * w * (new / old) * adv).sum(), (new * adv).sum(), rtol=1e-12)
    assert abs(float((beh * (new / old) * adv).sum() - (new * adv).sum())) > 0.1
