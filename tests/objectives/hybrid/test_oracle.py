"""Objectives with demonstrations equal their float64 oracles on batches that hurt."""

import pytest

from tests.oracles import hybrid
from tests.oracles.cases import CASES, EXPERT_CASES, assert_equals_oracle, assert_same, evaluate
from tests.oracles.families import label, registered

CONFIGURATIONS = [
    ("luffy", {}),
    ("luffy", dict(shaping="none", use_std=True, adv_eps=1e-2, agg="sum_const", L_const=50.0)),
    ("luffy", dict(gamma=2.0, clip=True, eps=0.1, singleton="raw", entropy_coef=0.01, agg="seq_mean")),
    ("luffy", dict(recorded=True, clip=True)),
]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(
    "hyperparameters", ({}, dict(agg="seq_mean"), dict(agg="seq_sum_const", L_const=11.0)), ids=str
)
def test_sft_equals_its_oracle(hyperparameters, case):
    assert_same(evaluate("sft", case, **hyperparameters), hybrid.sft(case, **hyperparameters))


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=label)
def test_equals_its_oracle(configuration):
    assert_equals_oracle(hybrid, configuration, EXPERT_CASES)


def test_every_objective_of_the_family_is_compared():
    assert registered("hybrid") == {"sft", *(name for name, _ in CONFIGURATIONS)}
