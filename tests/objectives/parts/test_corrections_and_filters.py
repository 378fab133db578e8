"""Filters and corrections do what they say inside an objective that is composed by name."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpo
from tests.oracles.cases import COMPILE_FAST, ROWS, assert_same, make_case, rollouts

CASE = make_case(4)
_rng = np.random.default_rng(0)
GAP = np.where(CASE.mask, 0.6 * _rng.normal(size=CASE.mask.shape), 0)  # log(pi_old / pi_beh)
LENGTH = np.maximum(CASE.mask.sum(1), 1)
WEIGHT = {"token": GAP, "sequence": GAP.sum(1, keepdims=True), "geometric": GAP.sum(1, keepdims=True) / LENGTH[:, None]}
LINEAR = dict(surrogate="linear")  # -r A: a factor of the policy term is a factor of its gradient


def evaluate(case=CASE, gap=GAP, seed=0, **spelled) -> tuple[float, np.ndarray]:
    """Loss and gradient in log-prob, with ``logp_beh = logp_old - gap`` and the rows longer than 4 truncated."""
    objective = jaxpo.make("policy_gradient", **spelled)
    with jax.enable_x64(True):
        batch = rollouts(case).replace(
            logp_beh=jnp.asarray(case.logp_old - gap),
            truncated=jnp.asarray(case.mask.sum(1) > 4),
            seed=jnp.asarray(np.random.default_rng(seed).integers(0, 2**32, len(case.reward), np.uint32)),
        )

        def loss(logp):
            return jaxpo.evaluate(objective, lambda _: jaxpo.TokenStats(logp=logp), batch)[0]

        value, grad = jax.jit(jax.value_and_grad(loss), compiler_options=COMPILE_FAST)(jnp.asarray(case.logp))
        return float(value), np.asarray(grad)


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    """The gradient without any correction."""
    return evaluate(**LINEAR)[1]


# ---- corrections ---------------------------------------------------------------------------------


@pytest.mark.parametrize("level", WEIGHT)
def test_truncated_weight_multiplies_the_policy_term(plain, level):
    w = np.exp(WEIGHT[level])
    assert (w > 1.3).any() and (w < 1.3).any()
    corrected = evaluate(**LINEAR, corrections=f"truncated_weight(level='{level}', cap=1.3)")[1]
    np.testing.assert_allclose(corrected, plain * np.minimum(w, 1.3), atol=1e-12)


@pytest.mark.parametrize("level", WEIGHT)
def test_masked_weight_is_0_outside_its_range_and_leaves_the_denominator_alone(plain, level):
    w = np.exp(WEIGHT[level])
    inside = (w >= 0.7) & (w <= 1.3)
    assert inside.any() and not inside.all()
    corrected = evaluate(**LINEAR, corrections=f"masked_weight(level='{level}', low=0.7, high=1.3)")[1]
    np.testing.assert_allclose(corrected, plain * np.where(inside, w, 0), atol=1e-12)


@pytest.mark.parametrize(("estimator", "low"), (("k1", -0.2), ("k3", None)))
def test_token_rejection_takes_tokens_out_of_the_denominator(plain, estimator, low):
    d = -GAP
    gap = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) + d - 1}[estimator]
    kept = CASE.mask & (gap <= 0.1) & (True if low is None else gap >= low)
    assert 10 < kept.sum() < CASE.mask.sum() - 10
    corrected = evaluate(**LINEAR, corrections=f"token_rejection(estimator='{estimator}', bound=0.1, low={low})")[1]
    np.testing.assert_allclose(corrected, plain * kept * CASE.mask.sum() / kept.sum(), atol=1e-12)


def test_truncated_weight_and_masked_weight_multiply_and_are_1_where_the_sampler_is_the_trainer(plain):
    both = "truncated_weight(cap=1.3), masked_weight(low=0.7, high=1.3)"
    w = np.exp(GAP)
    expected = plain * np.minimum(w, 1.3) * np.where((w >= 0.7) & (w <= 1.3), w, 0)
    np.testing.assert_allclose(evaluate(**LINEAR, corrections=both)[1], expected, atol=1e-12)
    np.testing.assert_allclose(evaluate(gap=0 * GAP, **LINEAR, corrections=both)[1], plain, atol=1e-12)


def test_truncated_weight_does_not_touch_the_regularizers():
    spelled = dict(LINEAR, regularizers="0.3 * kl_to_reference")
    correct = dict(corrections="truncated_weight(cap=1.3)")
    kl = evaluate(**spelled)[1] - evaluate(**LINEAR)[1]
    assert np.abs(kl).max() > 1e-4
    difference = evaluate(**spelled, **correct)[1] - evaluate(**LINEAR, **correct)[1]
    np.testing.assert_allclose(difference, kl, atol=1e-12)


def test_truncated_weight_of_the_decoupled_loss_is_old_over_behaviour_beside_a_clipped_ratio_to_old():
    """arXiv:2110.00641: what is clipped is new / old, whatever the behaviour."""
    clipped = evaluate()[1]
    assert (clipped == 0).sum() > (evaluate(**LINEAR)[1] == 0).sum()
    decoupled = evaluate(corrections="truncated_weight(cap=1e9)")[1]
    np.testing.assert_allclose(decoupled, clipped * np.exp(GAP), atol=1e-12)


# ---- filters -------------------------------------------------------------------------------------


def same_as_on_the_kept_rows_alone(case, kept, **spelled) -> None:
    """With advantages that do not compare rows."""
    assert 0 < kept.sum() < ROWS
    loss, grad = evaluate(case, gap=0, advantage="reward", **spelled)
    without = {k: x for k, x in spelled.items() if k != "filters"}
    assert_same((loss, grad[kept]), evaluate(case.take(kept), gap=0, advantage="reward", **without))
    assert (grad[~kept] == 0).all()


def test_not_truncated_takes_truncated_rows_out_of_every_denominator():
    same_as_on_the_kept_rows_alone(CASE, CASE.mask.sum(1) <= 4, filters="not_truncated", agg="seq_mean")


def test_mixed_groups_takes_solved_and_failed_groups_out_of_every_denominator():
    sizes = {g: (CASE.group == g).sum() for g in CASE.group}
    mixed = np.array([sizes[g] == 1 or np.ptp(CASE.correct[CASE.group == g]) > 0 for g in CASE.group])
    same_as_on_the_kept_rows_alone(CASE, mixed, filters="mixed_groups", agg="seq_mean")


@pytest.mark.parametrize("level", ("sequence", "geometric"))
def test_rejection_takes_rows_out_of_every_denominator(level):
    d = -GAP.sum(1) / (LENGTH if level == "geometric" else 1)
    kept = (d <= 0.2) & (d >= -0.5)
    assert 0 < kept.sum() < ROWS
    filters = f"rejection(level='{level}', bound=0.2, low=-0.5)"
    loss, grad = evaluate(advantage="reward", agg="seq_mean", filters=filters)
    assert_same((loss, grad[kept]), evaluate(CASE.take(kept), gap=0, advantage="reward", agg="seq_mean"))
    assert (grad[~kept] == 0).all()


def kept_rows(filters: str, seed=0) -> np.ndarray:
    objective = jaxpo.make("policy_gradient", filters=filters)
    seeds = jnp.asarray(np.random.default_rng(seed).integers(0, 2**32, ROWS, np.uint32))
    prepare = jax.jit(objective.prepare, compiler_options=COMPILE_FAST)
    batch = prepare(rollouts(CASE).replace(seed=seeds), objective.init())[0]
    assert set(np.unique(batch.count)) == {0, 1}
    return np.asarray(batch.count) > 0


def test_max_variance_keeps_the_half_of_each_group_whose_rewards_vary_most():
    kept = kept_rows("max_variance(keep=0.5)")
    for g in np.unique(CASE.group):
        reward, n = CASE.reward[CASE.group == g], max(1, round((CASE.group == g).sum() / 2))
        assert kept[CASE.group == g].sum() == n
        best = max(np.var(subset) for subset in itertools.combinations(reward, n))
        np.testing.assert_allclose(np.var(reward[kept[CASE.group == g]]), best, rtol=1e-5, atol=1e-9)


def test_random_rows_keeps_half_of_each_group_and_others_with_other_seeds():
    first, second = [kept_rows("random_rows(keep=0.5)", seed) for seed in (0, 1)]
    for g in np.unique(CASE.group):
        n = max(1, round((CASE.group == g).sum() / 2))
        assert first[CASE.group == g].sum() == second[CASE.group == g].sum() == n
    assert (first != second).any()
