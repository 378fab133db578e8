"""The group-relative objectives equal their float64 oracles on batches that hurt."""

import numpy as np
import pytest

from tests.oracles import group_relative
from tests.oracles.cases import CASES, UNIT_CASES, WIDTH, assert_equals_oracle, assert_same, evaluate
from tests.oracles.families import label, registered

BY_CASE = [
    ("reinforce", {}),
    ("reinforce", dict(baseline="batch_mean", agg="seq_mean")),
    ("reinforce", dict(baseline="batch_mean", agg="seq_sum")),
    ("rloo", {}),
    ("rloo", dict(beta=0.0, form="ppo")),
    ("rloo", dict(beta=0.3, form="ppo", eps_low=0.1, eps_high=0.4, log_ratio_clip=5.0)),
    ("rloo", dict(beta=0.0, normalize=True)),
    ("rloo", dict(normalize=True, singleton="raw")),
    ("grpo", {}),
    ("grpo", dict(kl_is=True, dual_clip=3.0, agg="token_mean", adv_eps=1e-4)),
    ("grpo", dict(beta=0.0, agg="token_mean", eps_high=0.28)),
    ("grpo", dict(beta=0.0, scale="batch", agg="seq_sum", log_ratio_clip=5.0)),
    ("grpo", dict(beta=0.1, scale="none", singleton="raw", agg="seq_sum_const", L_const=10.0)),
    ("grpo", dict(beta=0.0, singleton="raw", agg="sum_const", L_const=100.0)),
    ("dr_grpo", dict(L_const=WIDTH)),
    ("dr_grpo", dict(L_const=32, eps_low=0.1, eps_high=0.3, singleton="raw", log_ratio_clip=5.0)),
    ("dapo", dict(max_len=5, buffer=3)),
    ("dapo", dict(penalty=0.0)),
    ("dapo", dict(max_len=4, buffer=4, penalty=0.5, dual_clip=10.0, singleton="raw", eps_high=0.4, log_ratio_clip=5.0)),
]
PLAIN = [
    ("reinforce_pp", {}),
    ("reinforce_pp", dict(gamma=0.7, kl_coef=0.3, eps_low=0.1, eps_high=0.4, log_ratio_clip=5.0)),
    ("reinforce_pp", dict(kl_coef=0.0)),
    ("reinforce_pp", dict(variant="baseline", kl_coef=0.2)),
    ("reinforce_pp", dict(variant="baseline", kl_coef=0.2, kl_estimator="k3", singleton="raw", gamma=0.9)),
    ("lite_ppo", {}),
    ("lite_ppo", dict(eps_low=0.1, eps_high=0.4, adv_eps=1e-3, singleton="raw", log_ratio_clip=5.0)),
    ("adora", {}),
    ("adora", dict(rule="vlm", lam=0.3)),
    ("adora", dict(max_len=5.0)),
    ("adora", dict(max_len=5.0, rule="vlm", lam=0.3, correct_score=0.1, beta=0.1, agg="token_mean", dual_clip=3.0)),
    ("adora", dict(max_len=4.0, beta=0.0, singleton="raw", agg="seq_sum_const", L_const=9.0, adv_eps=1e-3)),
    ("canon", {}),
    ("canon", dict(metric="length", mu=0.3, alpha=0.7, L_const=10.0, eps_low=0.1, eps_high=0.4, dual_clip=2.0)),
    ("canon", dict(mu=0.5, alpha=0.6, L_const=10.0, singleton="raw", log_ratio_clip=5.0)),
    ("gdpo", {}),
    ("gdpo", dict(whiten=False, adv_eps=1e-2, eps_low=0.1, eps_high=0.4, log_ratio_clip=5.0)),
    ("bnpo", {}),
    ("bnpo", dict(min=-1.0, max=2.0, eps_low=0.1, eps_high=0.4, dual_clip=2.0, log_ratio_clip=5.0)),
    ("bnpo", dict(components=True)),
    ("a_grae", {}),
    ("a_grae", dict(alpha=0.4, easy_form="official", agg="token_mean", dual_clip=3.0, singleton="raw", eps_high=0.4)),
    ("a_grae", dict(agg="seq_sum_const", L_const=9.0, adv_eps=1e-3, eps_low=0.1, log_ratio_clip=5.0)),
]
UNIT = {"bnpo", "a_grae"}  # of rewards in [0, 1]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("configuration", BY_CASE, ids=label)
def test_loss_and_gradient_equal_the_oracle(configuration, case):
    name, hyperparameters = configuration
    assert_same(evaluate(name, case, **hyperparameters), getattr(group_relative, name)(case, **hyperparameters))


@pytest.mark.parametrize("configuration", PLAIN, ids=label)
def test_loss_and_gradient_equal_the_oracle_in_all_cases(configuration):
    name = configuration[0]
    # the density of a Beta distribution of parameters of 1e6 is a difference of logarithms of 1e7; weights may cancel
    rtol = 1e-5 if name == "bnpo" else 1e-9
    assert_equals_oracle(group_relative, configuration, UNIT_CASES if name in UNIT else CASES, rtol)


@pytest.mark.parametrize("configuration", BY_CASE, ids=label)
def test_gradient_is_exactly_zero_at_masked_tokens_and_uncounted_rows(configuration):
    name, hyperparameters = configuration
    case = CASES["extreme ratios and counts"]
    loss, grad = evaluate(name, case, **hyperparameters)
    assert np.isfinite(loss)
    assert (grad[~case.mask] == 0).all() and (grad[case.count == 0] == 0).all()


@pytest.mark.parametrize(
    "name,hyperparameters",
    [
        ("reinforce", {}),
        ("rloo", {}),
        ("rloo", dict(beta=0.0, form="ppo")),
        ("grpo", {}),
        ("dr_grpo", dict(L_const=WIDTH)),
        ("dapo", dict(max_len=5, buffer=3)),
    ],
)
def test_empty_mask_gives_exactly_zero(name, hyperparameters):
    case = CASES["unequal groups"]
    loss, grad = evaluate(name, case.replace(mask=np.zeros_like(case.mask)), **hyperparameters)
    assert loss == 0 and (grad == 0).all()


def test_every_objective_of_the_family_is_compared():
    assert {name for name, _ in BY_CASE + PLAIN} == registered("group_relative")
