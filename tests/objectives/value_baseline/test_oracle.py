"""The objectives whose baseline is a value equal their float64 oracles on batches that hurt."""

import pytest

from tests.oracles import value_baseline
from tests.oracles.cases import CASES, UNIT_CASES, assert_equals_oracle
from tests.oracles.families import label, registered

PLAIN = [
    ("spo_single_stream", {}),
    ("spo_single_stream", dict(eps_low=0.1, eps_high=0.4, dual_clip=2.0, adv_eps=1e-2, log_ratio_clip=5.0)),
    ("spo_segment", {}),
    ("spo_segment", dict(interval=2, threshold=0.6, beta=0.1, eps_low=0.1, eps_high=0.4, log_ratio_clip=5.0)),
    ("spo_segment", dict(form="tree", threshold=0.5)),
]


@pytest.mark.parametrize("configuration", PLAIN, ids=label)
def test_loss_and_gradient_equal_the_oracle(configuration):
    cases = UNIT_CASES if configuration[0] == "spo_single_stream" else CASES  # of rewards in [0, 1]
    assert_equals_oracle(value_baseline, configuration, cases)


def test_every_objective_of_the_family_is_compared():
    assert {name for name, _ in PLAIN} == registered("value_baseline")
