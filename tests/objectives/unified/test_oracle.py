"""The rows of the unified estimator equal their float64 oracles on batches that hurt."""

import pytest

from tests.oracles import unified
from tests.oracles.cases import EXPERT_CASES, assert_equals_oracle
from tests.oracles.families import label, registered

CONFIGURATIONS = [
    *[("upge", dict(method=m)) for m in ("sft", "reinforce", "ppo", "grpo", "cispo", "gspo", "srft_off", "luffy_off")],
    ("upge", dict(method="gspo", agg="seq_mean", eps=0.4, use_std=False, singleton="raw")),
    ("upge", dict(method="luffy_off", gamma=0.7, adv_eps=1e-2, agg="sum_const", L_const=9.0)),
]


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=label)
def test_equals_its_oracle(configuration):
    assert_equals_oracle(unified, configuration, EXPERT_CASES)


def test_every_objective_of_the_family_is_compared():
    assert registered("unified") == {name for name, _ in CONFIGURATIONS}
