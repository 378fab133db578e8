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
    ("srft", {}),
    ("srft", dict(c_sft=0.3, c_rl=0.4, success=0.3, use_std=False, singleton="raw", agg="sum_const", L_const=40.0)),
    ("chord", dict(mu=0.3)),
    ("chord", dict(mu=1.0, phi="none")),
    ("chord", dict(mu=0.4, phi="is", eps_low=0.1, eps_high=0.3, adv_eps=1e-2, singleton="raw", agg="seq_mean")),
    ("hpt", {}),
    ("hpt", dict(gate=1, rl_coef=0.5, sft_coef=0.3, clip=True, eps=0.1, use_std=True, rl_agg="token_mean")),
    ("hpt", dict(gate=-1, singleton="raw", L_const=30.0)),
    ("hpt", dict(gate=9)),
    ("ahpo", {}),
    ("ahpo", dict(r_hat=1, norm="shared", eps_low=0.1, eps_high=0.3, use_std=False, singleton="raw")),
    ("ahpo", dict(static_coef=0.5, agg="seq_mean", adv_eps=1e-2)),
    ("dypo", {}),
    ("dypo", dict(alpha=0.2, beta_gal=0.3, gamma_sft=0.7, beta_kl=0.1, level="token", sft_norm="mean")),
    ("dypo", dict(alpha=1, eps_low=0.1, eps_high=0.3, adv_eps=1e-2, beta_kl=0.05)),
    ("dypo", dict(alpha=0, fail=0.2, success=0.8)),
]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(
    "hyperparameters", ({}, dict(agg="seq_mean"), dict(agg="seq_sum_const", L_const=11.0)), ids=str
)
def test_sft_equals_its_oracle(hyperparameters, case):
    assert_same(evaluate("sft", case, **hyperparameters), hybrid.sft(case, **hyperparameters))


@pytest.mark.parametrize("iteration", (0, 100, 200, 317, 600, 1000))
def test_chord_follows_its_schedule(iteration):
    case = EXPERT_CASES["unequal groups"]
    assert_same(evaluate("chord", case, iteration=iteration), hybrid.chord(case, iteration=iteration))


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=label)
def test_equals_its_oracle(configuration):
    assert_equals_oracle(hybrid, configuration, EXPERT_CASES)


def test_every_objective_of_the_family_is_compared():
    assert registered("hybrid") == {"sft", *(name for name, _ in CONFIGURATIONS)}
