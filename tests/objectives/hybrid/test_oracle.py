"""`sft` equals its float64 oracle on batches that hurt."""

import pytest

from tests.oracles import hybrid
from tests.oracles.cases import CASES, assert_same, evaluate
from tests.oracles.families import registered


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(
    "hyperparameters", ({}, dict(agg="seq_mean"), dict(agg="seq_sum_const", L_const=11.0)), ids=str
)
def test_sft_equals_its_oracle(hyperparameters, case):
    assert_same(evaluate("sft", case, **hyperparameters), hybrid.sft(case, **hyperparameters))


def test_every_objective_of_the_family_is_compared():
    assert registered("hybrid") == {"sft"}
