"""Rows without tokens: they count in the number of rows, or leave it; and groups of one row of `gtpo`."""

import numpy as np
import pytest

import jaxpo
from jaxpo.registry import entry
from tests.oracles.cases import CASES, assert_same, evaluate

OPTIONAL = {
    "dr_grpo": {"L_const": 7.0},
    "bnpo": {"min": -9.0, "max": 9.0},
    "a_grae": {},
    **dict.fromkeys(("reinforce", "cispo"), {"agg": "seq_mean"}),
    "grpo": {"agg": "seq_sum_const", "L_const": 7.0},
}
NAMES = [name for name in jaxpo.names() if "empty_rows" in entry(name).parameters]


@pytest.mark.parametrize("name", NAMES)
def test_empty_rows_that_leave_are_no_rows_of_the_mean(name):
    """They contribute nothing either way, so that only the number of rows differs, of all terms."""
    options, label = OPTIONAL.get(name, {}), "K=2" if name == "a_grae" else "counts"
    case = CASES[label]
    case = case.replace(count=np.where(case.mask.any(1), case.count, 3.0))  # the empty ones are drawn three times
    rows, with_tokens = case.count.sum(), case.count[case.mask.any(1)].sum()
    assert 0 < with_tokens <= rows - 3
    count, leave = (evaluate(name, case, **options, empty_rows=x) for x in ("count", "leave"))
    assert count[0] != 0 and np.abs(count[1]).max() > 0
    assert_same(leave, (count[0] * rows / with_tokens, count[1] * rows / with_tokens))


def test_group_mean_without_empty_rows_is_a_mean_over_the_rows_with_tokens_of_each_group():
    case = CASES["unequal groups"]
    full = case.take(np.flatnonzero(case.mask.any(1)))
    spelled = dict(advantage="reward", surrogate="log_prob")
    loss, grad = evaluate("policy_gradient", case, **spelled, agg="group_mean(empty_rows='leave')")
    expected = evaluate("policy_gradient", full, **spelled, agg="group_mean")
    assert_same((loss, grad[case.mask.any(1)]), expected)


def test_a_mean_over_tokens_has_no_such_switch():
    with pytest.raises(ValueError, match="empty_rows has no effect with agg='token_mean'; it belongs to"):
        jaxpo.make("cispo", empty_rows="leave")
    with pytest.raises(ValueError, match="empty_rows must be one of count, leave"):
        jaxpo.make("grpo", empty_rows="skip")


def test_gtpo_keeps_rows_whose_group_is_one_row_and_rows_left_out_for_their_entropy():
    """A group of one has A = 0 and only the entropy's penalty; a row of high entropy has weight 0. Both count as
    rows."""
    case = CASES["K=1"]
    loss, grad = evaluate("gtpo", case, entropy_threshold=0.7, entropy_scale=0.1)
    tokens = case.mask.sum(1)
    H = np.where(case.mask, case.entropy, 0).sum(1) / np.maximum(tokens, 1)
    inside = H <= 0.7
    assert inside.any() and not inside.all() and (tokens == 0).any()
    expected = np.where(case.mask & inside[:, None], 0.1 * (H / np.maximum(tokens, 1))[:, None], 0) / len(tokens)
    assert_same((loss, grad), (expected.sum(), expected))


def test_gtpo_in_a_run_compares_answers_unless_the_reward_is_the_advantage_of_one():
    assert jaxpo.make("gtpo").asks.responses == 2
    assert jaxpo.make("gtpo", singleton="raw").asks.responses == 1
