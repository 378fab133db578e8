"""Objectives of the policy's own successes equal their float64 oracles on batches that hurt."""

import pytest

from tests.oracles import successes
from tests.oracles.cases import CASES, assert_equals_oracle
from tests.oracles.families import label, registered

BINARY = {name: case.replace(reward=(case.reward > 0.3).astype(float)) for name, case in CASES.items()}  # NFT's rewards

CONFIGURATIONS = [
    ("rft", {}),
    ("rft", dict(select="first_correct", threshold=0.5, agg="seq_mean")),
    ("rft", dict(select="best", agg="sum_const", L_const=12.0)),
    ("nft", {}),
    ("nft", dict(neg_weight=0.5, clamp_pos=0.5, clamp_neg=0.3, normalize=2, agg="token_mean")),
    ("nft", dict(neg_weight=0, normalize=0, L_const=50.0)),
    ("nft", dict(ratio_type="sequence", clamp_neg=0.2)),
    ("fapo", {}),
    (
        "fapo",
        dict(lam=0.3, eps_low=0.1, eps_high=0.1, max_len=5, buffer=3, penalty=0.7, singleton="raw", dual_clip=3.0),
    ),
    ("policy_cliff", {}),
    ("policy_cliff", dict(alpha=0.3, use_std=False, singleton="raw", agg="seq_mean")),
    ("policy_cliff", dict(alpha=0, adv_eps=1e-2)),
]


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=label)
def test_equals_its_oracle(configuration):
    assert_equals_oracle(successes, configuration, BINARY)


def test_every_objective_of_the_family_is_compared():
    assert registered("successes") == {name for name, _ in CONFIGURATIONS}
