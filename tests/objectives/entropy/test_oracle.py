"""The objectives that look at entropy equal their float64 oracles on batches that hurt."""

import numpy as np
import pytest

from tests.oracles import entropy
from tests.oracles.cases import CASES, NO_COUNTS, WIDTH, assert_equals_oracle, assert_same, evaluate, priorities
from tests.oracles.families import label, registered

PLAIN = [
    ("gtpo", {}),
    ("gtpo", dict(entropy_threshold=0.5, entropy_scale=0.3, w_pos=3.0, conflict_norm="none", singleton="raw")),
    ("gtpo", dict(entropy_threshold=5.0, adv_eps=1e-2)),
    ("hapo", dict(max_len=5, buffer=3)),
    ("hapo", dict(max_len=5, buffer=3, sign="official", rho=0.5, redistribution=0.4, clip_strength=0.7)),
    ("hapo", dict(penalty=0.0, guard=1.2, dual_clip=2.0, singleton="raw", adv_eps=0.1)),
    ("kl_cov", {}),
    ("kl_cov", dict(ratio=0.1, coef=0.5, adv_eps=1e-3, singleton="raw", log_ratio_clip=5.0)),
    ("lp_reg", dict(rho=0.2)),
    ("lp_reg", dict(rho=0.5, beta=0.3, eps_low=0.1, eps_high=0.4, adv_eps=1e-3, singleton="raw", log_ratio_clip=5.0)),
]


@pytest.mark.parametrize("configuration", PLAIN, ids=label)
def test_loss_and_gradient_equal_the_oracle(configuration):
    assert_equals_oracle(entropy, configuration)


@pytest.mark.parametrize("memory", (0.0, 0.2, 0.3, 5.0))
@pytest.mark.parametrize("hyperparameters", ({}, dict(H0=0.5, cap=0.4, threshold=0.3, dual_clip=2.0, eps_high=0.4)))
def test_dcpo_distribution_equals_its_oracle(memory, hyperparameters):
    for case in CASES.values():
        actual = evaluate("dcpo_distribution", case, memory={"entropy": memory}, **hyperparameters)
        assert_same(actual, entropy.dcpo_distribution(case, H=memory, **hyperparameters))


@pytest.mark.parametrize("iteration", (0, 4, 10))
@pytest.mark.parametrize(
    "hyperparameters",
    ({}, dict(base="gspo"), dict(level="within", N_init=0.3, K_init=0.5, singleton="raw", eps_high=0.4)),
    ids=str,
)
@pytest.mark.parametrize("label", NO_COUNTS)
def test_d3s_equals_its_oracle(iteration, hyperparameters, label):
    case = CASES[label]
    # rewards without ties, so that no two subsets vary the same
    case = case.replace(reward=case.reward + 1e-3 * np.random.default_rng(0).random(len(case.reward)))
    actual = evaluate("d3s", case, iteration=iteration, total=11, **hyperparameters)
    assert_same(actual, entropy.d3s(case, progress=iteration / 10, **hyperparameters))


@pytest.mark.parametrize(
    "hyperparameters", ({}, dict(ratio=0.2, lb=0.05, ub=0.8, eps_low=0.2, eps_high=0.3, log_ratio_clip=5.0)), ids=str
)
@pytest.mark.parametrize("label", CASES)
def test_clip_cov_equals_its_oracle(hyperparameters, label):
    case = CASES[label]
    priority = priorities(case, 2, (WIDTH,))
    assert_same(
        evaluate("clip_cov", case, **hyperparameters), entropy.clip_cov(case, **hyperparameters, priority=priority)
    )


def test_every_objective_of_the_family_is_compared():
    assert {*(name for name, _ in PLAIN), "dcpo_distribution", "d3s", "clip_cov"} == registered("entropy")
