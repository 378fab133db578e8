"""Calibration of stated probabilities, against loops in plain Python."""

import jax
import numpy as np
import pytest

from jaxpo.primitives import preference_diagnostics as diagnostics


def by_hand(p, outcome, bins):
    held = [[] for _ in range(bins)]
    for stated, won in zip(p.tolist(), outcome.tolist(), strict=True):
        confidence, right = (stated, won) if stated > 0.5 else (1 - stated, 1 - won)
        right = 0.5 if stated == 0.5 else right
        held[min(int((confidence - 0.5) / 0.5 * bins), bins - 1)].append((confidence, right))
    error = 0.0
    for pairs in held:
        if pairs:
            mean = np.mean(pairs, 0)
            error += len(pairs) / len(p) * abs(mean[0] - mean[1])
    return error, [len(pairs) / len(p) for pairs in held]


@pytest.mark.parametrize("bins", (1, 7, 10))
def test_expected_calibration_error(bins):
    rng = np.random.default_rng(0)
    p, outcome = rng.random(200), rng.integers(0, 2, 200).astype(float)
    p[:3] = (0.0, 1.0, 0.5)
    with jax.enable_x64(True):
        confidence, right = diagnostics.confident(p, outcome)
        error, shares = by_hand(p, outcome, bins)
        assert float(diagnostics.expected_calibration_error(confidence, right, bins)) == pytest.approx(error, abs=1e-12)
        np.testing.assert_allclose(diagnostics.reliability(confidence, right, bins)[2], shares, atol=1e-12)


def test_who_says_what_happens_is_calibrated_and_who_is_sure_is_not():
    with jax.enable_x64(True):
        p = np.array([0.8] * 5 + [0.3] * 10)
        outcome = np.array([1, 1, 1, 1, 0] + [1] * 3 + [0] * 7)
        calibrated = diagnostics.confident(p, outcome)
        assert float(diagnostics.expected_calibration_error(*calibrated)) == pytest.approx(0, abs=1e-12)
        sure = diagnostics.confident(np.ones(15), outcome)
        assert float(diagnostics.expected_calibration_error(*sure)) == pytest.approx(8 / 15)
    stated, accuracy, share = diagnostics.reliability(*diagnostics.confident(np.ones(4), np.ones(4)))
    assert share.tolist() == [0] * 9 + [1] and accuracy[-1] == 1 and np.isfinite(stated).all()


def test_soft_outcomes_of_either_order_are_the_same():
    p, outcome = np.array([0.2, 0.7]), np.array([0.4, 0.6])
    a, b = (np.stack(diagnostics.confident(*x)) for x in ((p, outcome), (1 - p, 1 - outcome)))
    np.testing.assert_allclose(a, b, atol=1e-6)
