"""The identities of objectives with hints and repaired rows."""

import numpy as np
import pytest

from jaxpo.primitives.guidance import (
    first_error,
    first_solvable_stage,
    hint_length,
    hint_ratio,
    hint_weight,
    hinted_advantage,
    pick_refinement,
)
from tests.objectives.guidance.test_oracle import with_hints, with_repairs
from tests.oracles.cases import CASES, assert_same, evaluate

CASE = CASES["unequal groups"]


# ---- ghpo


def test_ghpo_of_prompts_that_are_solved_without_a_hint_is_grpo():
    assert_same(evaluate("ghpo", CASE, w_fmt=0), evaluate("grpo", CASE, adv_eps=1e-4, beta=0.0, agg="token_mean"))


def test_the_first_solvable_stage_is_that_of_all_rows_of_a_prompt():
    accuracy = np.array([[0, 0, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0], [-1, 0, 0]])
    group, count = np.array([5, 5, 7, 7, 9, 9]), np.ones(6)
    np.testing.assert_array_equal(first_solvable_stage(accuracy, group, count), [2, 2, 0, 0, 2, 2])
    left_out = first_solvable_stage(accuracy, group, np.array([1, 1, 0, 1, 1, 1]))
    np.testing.assert_array_equal(left_out, [2, 2, 2, 2, 2, 2])


def test_hints_grow_with_the_ratio_and_round_halves_to_even():
    assert hint_length([0, 1, 2, 5, 6], 0.25).tolist() == [0, 0, 0, 1, 2]
    assert hint_length([0, 1, 3, 5], 0.5).tolist() == [0, 0, 2, 2]
    lengths = np.arange(200)
    for low, high in ((0.25, 0.5), (0.5, 0.75)):
        assert (hint_length(lengths, low) <= hint_length(lengths, high)).all()


# ---- adhint


def test_adhint_without_hinted_rows_is_grpo():
    case = with_hints(CASE, share=0.0)
    assert_same(evaluate("adhint", case), evaluate("grpo", case, beta=0.0, agg="token_mean"))


def test_hint_tokens_of_bad_rows_have_no_gradient():
    case = with_hints(CASE)
    _, grad = evaluate("adhint", case)
    adv = np.asarray(hinted_advantage(case.reward, case.group, case.extra["hinted"], case.count))
    hint = (case.extra["hint_mask"] == 1) & (adv < 0)[:, None]
    assert hint.any() and not grad[hint].any()
    own = (case.extra["hint_mask"] == 0) & case.mask & (adv < 0)[:, None]
    assert grad[own].any()


def test_weights_of_hints_lie_between_0_and_1():
    rng = np.random.default_rng(0)
    mask, hint = np.ones((50, 6)), rng.integers(0, 2, (50, 6))
    entropy = rng.exponential(1, (50, 6)) * rng.integers(0, 2, (50, 6))
    c = np.asarray(hint_weight(rng.normal(size=50), hint, entropy, mask))
    assert (c >= 0).all() and (c <= 1).all() and (c[hint == 0] == 1).all()
    whole = hint_weight(np.ones(1), np.ones((1, 2)), np.array([[0.0, 0.5]]), np.ones((1, 2)))
    assert whole.tolist() == [[1.0, 0.0]]  # a row that is all hint: the others' mean is 0


@pytest.mark.parametrize(("reward", "expected"), ((1.0, 0.1), (0.0, 0.9)))
def test_the_ratio_of_a_hint_at_both_ends(reward, expected):
    ones = np.ones(4)
    ratio = hint_ratio(reward * ones, np.zeros(4), np.array([0, 0, 1, 1]), ones)
    np.testing.assert_allclose(ratio, expected, rtol=1e-6)
    assert float(hint_ratio(ones, ones, ones, ones)[0]) == pytest.approx(0.9)  # hinted rows alone
    assert float(hint_ratio(ones, ones, 0 * ones, ones, noise=5.0)[0]) == 1


# ---- scope


def test_scope_without_a_corrector_is_grpo():
    case = with_repairs(CASE, share=0.0)
    assert_same(evaluate("scope", case), evaluate("grpo", case, beta=0.0, agg="token_mean"))


def test_own_prefix_tokens_keep_their_old_log_probs():
    case = with_repairs(CASE)
    moved = case.replace(logp_old=np.where(case.mask & (case.extra["off_mask"] == 0), case.logp_old + 0.05, np.nan))
    own = (case.extra["off_mask"] == 0) & case.mask
    first, second = evaluate("scope", case)[1], evaluate("scope", moved)[1]
    assert (first != second)[own].any() and np.array_equal(first[~own], second[~own])


def test_the_first_wrong_step():
    score = np.array([[0.9, 0.4, 0.1], [0.2, 0.9, 0.9], [0.5, 0.6, 0.0], [0.9, 0.9, 0.9]])
    assert first_error(score, np.array([3, 3, 2, 3])).tolist() == [1, 0, 2, 3]
    assert first_error(score, np.array([3, 3, 3, 0]), threshold=0.05).tolist() == [3, 3, 2, 0]


# ---- critique_grpo


def test_the_refinement_that_is_picked():
    score = np.array([[0.2, 1.0, 1.0], [0.3, 0.7, 0.7], [2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert pick_refinement(score).tolist() == [1, 1, 1, 0]
    there = np.array([[1, 0, 1], [1, 0, 0], [1, 0, 1], [0, 0, 0]])
    assert pick_refinement(score, there).tolist() == [2, 0, 0, -1]
