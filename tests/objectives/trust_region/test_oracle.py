"""The objectives that change the ratio, the clip or its penalty equal their float64 oracles on batches that hurt."""

import pytest

from tests.oracles import trust_region
from tests.oracles.cases import CASES, assert_equals_oracle, assert_same, evaluate
from tests.oracles.families import label, registered

PLAIN = [
    ("gspo", {}),
    ("gspo", dict(eps_low=0.1, eps_high=0.3, adv_eps=1e-3, singleton="raw", log_ratio_clip=3.0)),
    ("gspo_token", {}),
    ("gspo_token", dict(eps_low=0.1, eps_high=0.3, adv_eps=1e-3, singleton="raw", log_ratio_clip=3.0)),
    ("cispo", {}),
    ("cispo", dict(eps_low=0.1, eps_high=0.3, agg="seq_mean", adv_eps=1e-3, singleton="raw", log_ratio_clip=3.0)),
    ("bapo", {}),
    ("bapo", dict(target=0.5, low0=0.8, low_max=0.95, high_step=0.1, dual_clip=2.0, adv_eps=1e-3)),
    ("bapo", dict(mode="paper")),
    ("bapo", dict(mode="paper", target=0.7, high_max=1.5, low_step=0.07, singleton="raw", log_ratio_clip=5.0)),
    ("mhpo", {}),
    ("mhpo", dict(c=0.7, k_pos=2.0, lam_pos=0.7, k_neg=1.5, lam_neg=1.2, agg="token_mean", singleton="raw")),
    ("ppo_outer_loop", {}),
    ("ppo_outer_loop", dict(eta=0.3, adv_eps=1e-3, singleton="raw", log_ratio_clip=5.0)),
]


@pytest.mark.parametrize("configuration", PLAIN, ids=label)
def test_loss_and_gradient_equal_the_oracle(configuration):
    assert_equals_oracle(trust_region, configuration)


@pytest.mark.parametrize("lam", (0.0, 0.1, 3.0))
def test_r2vpo_equals_its_oracle(lam):
    for case in CASES.values():
        actual = evaluate("r2vpo", case, memory={"lam": lam}, delta=0.05, log_ratio_clip=3.0)
        assert_same(actual, trust_region.r2vpo(case, lam=lam, delta=0.05, log_ratio_clip=3.0))


def test_every_objective_of_the_family_is_compared():
    assert {*(name for name, _ in PLAIN), "r2vpo"} == registered("trust_region")
