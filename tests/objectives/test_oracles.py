"""Every objective of the group-relative cards against an independent float64 oracle, on batches that hurt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpo
from jaxpo.primitives.selection import row_uniform
from tests.objectives.test_preference_oracles import FAMILY
from tests.oracles import Case, entropy, group_relative, off_policy, trust_region, value_baseline
from tests.oracles.cases import CASES, WIDTH, assert_same, evaluate

NO_COUNTS = [name for name, case in CASES.items() if (case.count == 1).all()]


def priorities(case: Case, stream: int, shape: tuple = ()) -> np.ndarray:
    """What the implementation draws for the rows' seeds."""
    with jax.enable_x64(True):
        return np.asarray(row_uniform(jnp.asarray(case.extra["seed"], jnp.uint32), shape, stream=stream))


def unit_rewards(case: Case) -> Case:
    return case.replace(reward=1 / (1 + np.exp(-case.reward)))


# name, hyperparameters of both, and: state (memory, iteration), what only the oracle is told, changes to the case
PLAIN = [
    ("reinforce_pp", {}),
    ("reinforce_pp", dict(gamma=0.7, kl_coef=0.3, eps_low=0.1, eps_high=0.4, log_ratio_clip=5.0)),
    ("reinforce_pp", dict(kl_coef=0.0)),
    ("reinforce_pp", dict(variant="baseline", kl_coef=0.2)),
    ("reinforce_pp", dict(variant="baseline", kl_coef=0.2, kl_estimator="k3", singleton="raw", gamma=0.9)),
    ("lite_ppo", {}),
    ("lite_ppo", dict(eps_low=0.1, eps_high=0.4, adv_eps=1e-3, singleton="raw", log_ratio_clip=5.0)),
    ("asymre", {}),
    ("asymre", dict(shift=0.2, tau=1.0, singleton="raw")),
    ("adora", dict(max_len=5.0)),
    ("adora", dict(max_len=5.0, rule="vlm", lam=0.3, correct_score=0.1, beta=0.1, agg="token_mean", dual_clip=3.0)),
    ("adora", dict(max_len=4.0, beta=0.0, singleton="raw", agg="seq_sum_const", L_const=9.0, adv_eps=1e-3)),
    ("canon", {}),
    ("canon", dict(metric="length", mu=0.3, alpha=0.7, L_const=10.0, eps_low=0.1, eps_high=0.4, dual_clip=2.0)),
    ("canon", dict(mu=0.5, alpha=0.6, L_const=10.0, singleton="raw", log_ratio_clip=5.0)),
    ("gtpo", {}),
    ("gtpo", dict(entropy_threshold=0.5, entropy_scale=0.3, w_pos=3.0, conflict_norm="none", singleton="raw")),
    ("gtpo", dict(entropy_threshold=5.0, adv_eps=1e-2)),
    ("spo_single_stream", {}),
    ("spo_single_stream", dict(eps_low=0.1, eps_high=0.4, dual_clip=2.0, adv_eps=1e-2, log_ratio_clip=5.0)),
    ("spo_segment", {}),
    ("spo_segment", dict(interval=2, threshold=0.6, beta=0.1, eps_low=0.1, eps_high=0.4, log_ratio_clip=5.0)),
    ("spo_segment", dict(form="tree", threshold=0.5)),
    ("bnpo", {}),
    ("bnpo", dict(min=-1.0, max=2.0, eps_low=0.1, eps_high=0.4, dual_clip=2.0, log_ratio_clip=5.0)),
    ("bnpo", dict(components=True)),
    ("a_grae", {}),
    ("a_grae", dict(alpha=0.4, easy_form="official", agg="token_mean", dual_clip=3.0, singleton="raw", eps_high=0.4)),
    ("a_grae", dict(agg="seq_sum_const", L_const=9.0, adv_eps=1e-3, eps_low=0.1, log_ratio_clip=5.0)),
    ("gspo", {}),
    ("gspo", dict(eps_low=0.1, eps_high=0.3, adv_eps=1e-3, singleton="raw", log_ratio_clip=3.0)),
    ("gspo_token", {}),
    ("gspo_token", dict(eps_low=0.1, eps_high=0.3, adv_eps=1e-3, singleton="raw", log_ratio_clip=3.0)),
    ("cispo", {}),
    ("cispo", dict(eps_low=0.1, eps_high=0.3, agg="seq_mean", adv_eps=1e-3, singleton="raw", log_ratio_clip=3.0)),
    ("rec", {}),
    ("rec", dict(weight="importance_sampling", normalize=True, log_ratio_clip=5.0)),
    ("rec", dict(clip_mode="two-side", weight="advantage", temp=0.7, eps_low=0.1, eps_high=0.4)),
    ("rec", dict(clip_mode="ring", ring_low=0.3, ring_high=0.5, regularizer="k2", coef=0.3)),
    ("rec", dict(clip_mode="none", regularizer="forward-kl", coef=0.3, singleton="raw")),
    ("rec", dict(clip_mode="gspo-one-side", weight="importance_sampling", regularizer="k2")),
    ("opmd", {}),
    ("opmd", dict(tau=0.3, baseline="logavgexp", singleton="raw")),
    ("opmd", dict(form="kimi", tau=0.7)),
    ("opmd", dict(form="kimi", baseline="logavgexp")),
    ("opmd", dict(form="pairwise")),
    ("opmd", dict(form="pairwise", tau=0.3)),
    ("opmd", dict(form="surrogate", coef=0.4)),
    ("bapo", {}),
    ("bapo", dict(target=0.5, low0=0.8, low_max=0.95, high_step=0.1, dual_clip=2.0, adv_eps=1e-3)),
    ("bapo", dict(mode="paper")),
    ("bapo", dict(mode="paper", target=0.7, high_max=1.5, low_step=0.07, singleton="raw", log_ratio_clip=5.0)),
    ("hapo", dict(max_len=5, buffer=3)),
    ("hapo", dict(max_len=5, buffer=3, sign="official", rho=0.5, redistribution=0.4, clip_strength=0.7)),
    ("hapo", dict(max_len=5, buffer=3, penalty=0.0, guard=1.2, dual_clip=2.0, singleton="raw", adv_eps=0.1)),
    ("kl_cov", {}),
    ("kl_cov", dict(ratio=0.1, coef=0.5, adv_eps=1e-3, singleton="raw", log_ratio_clip=5.0)),
    ("mhpo", {}),
    ("mhpo", dict(c=0.7, k_pos=2.0, lam_pos=0.7, k_neg=1.5, lam_neg=1.2, agg="token_mean", singleton="raw")),
    ("ppo_outer_loop", {}),
    ("ppo_outer_loop", dict(eta=0.3, adv_eps=1e-3, singleton="raw", log_ratio_clip=5.0)),
    ("lp_reg", dict(rho=0.2)),
    ("lp_reg", dict(rho=0.5, beta=0.3, eps_low=0.1, eps_high=0.4, adv_eps=1e-3, singleton="raw", log_ratio_clip=5.0)),
]
UNIT = {"bnpo", "a_grae", "spo_single_stream"}
HOME = {
    name: module
    for module in (group_relative, off_policy, trust_region, entropy, value_baseline)
    for name in vars(module)
}


def _label(configuration) -> str:
    name, hyperparameters = configuration
    return name + "".join(f"-{k}={v}" for k, v in hyperparameters.items())


@pytest.mark.parametrize("configuration", PLAIN, ids=_label)
def test_loss_and_gradient_equal_the_oracle(configuration):
    name, hyperparameters = configuration
    for label, case in CASES.items():
        case = unit_rewards(case) if name in UNIT else case
        # the density of a Beta distribution of parameters of 1e6 is a difference of logarithms of 1e7
        rtol = 1e-6 if name == "bnpo" else 1e-9
        expected = getattr(HOME[name], name)(case, **hyperparameters)
        try:
            assert_same(evaluate(name, case, **hyperparameters), expected, rtol=rtol)
        except AssertionError as error:
            raise AssertionError(f"{label}: {error}") from None


@pytest.mark.parametrize("memory", (0.0, 0.2, 0.3, 5.0))
@pytest.mark.parametrize("hyperparameters", ({}, dict(H0=0.5, cap=0.4, threshold=0.3, dual_clip=2.0, eps_high=0.4)))
def test_dcpo_distribution(memory, hyperparameters):
    for case in CASES.values():
        actual = evaluate("dcpo_distribution", case, memory={"entropy": memory}, **hyperparameters)
        assert_same(actual, entropy.dcpo_distribution(case, H=memory, **hyperparameters))


@pytest.mark.parametrize("lam", (0.0, 0.1, 3.0))
def test_r2vpo(lam):
    for case in CASES.values():
        actual = evaluate("r2vpo", case, memory={"lam": lam}, delta=0.05, log_ratio_clip=3.0)
        assert_same(actual, trust_region.r2vpo(case, lam=lam, delta=0.05, log_ratio_clip=3.0))


@pytest.mark.parametrize("iteration", (0, 4, 10))
@pytest.mark.parametrize(
    "hyperparameters",
    ({}, dict(base="gspo"), dict(level="within", N_init=0.3, K_init=0.5, singleton="raw", eps_high=0.4)),
    ids=str,
)
@pytest.mark.parametrize("label", NO_COUNTS)
def test_d3s(iteration, hyperparameters, label):
    case = CASES[label]
    # rewards without ties, so that no two subsets vary the same
    case = case.replace(reward=case.reward + 1e-3 * np.random.default_rng(0).random(len(case.reward)))
    actual = evaluate("d3s", case, iteration=iteration, total=11, **hyperparameters)
    assert_same(actual, entropy.d3s(case, progress=iteration / 10, **hyperparameters))


@pytest.mark.parametrize(
    "hyperparameters", ({}, dict(ratio=0.2, lb=0.05, ub=0.8, eps_low=0.2, eps_high=0.3, log_ratio_clip=5.0)), ids=str
)
@pytest.mark.parametrize("label", CASES)
def test_clip_cov(hyperparameters, label):
    case = CASES[label]
    priority = priorities(case, 2, (WIDTH,))
    assert_same(
        evaluate("clip_cov", case, **hyperparameters), entropy.clip_cov(case, **hyperparameters, priority=priority)
    )


@pytest.mark.parametrize("label", NO_COUNTS)
@pytest.mark.parametrize("normalize", (False, True))
def test_rec_with_drop(label, normalize):
    case, hyperparameters = CASES[label], dict(drop="balance", clip_mode="none", normalize=normalize)
    expected = off_policy.rec(case, **hyperparameters, row_priority=priorities(case, 1))
    assert_same(evaluate("rec", case, **hyperparameters), expected)


def test_every_objective_has_an_oracle():
    here = {name for name, _ in PLAIN} | {"dcpo_distribution", "r2vpo", "d3s", "clip_cov"}
    first = {"reinforce", "rloo", "grpo", "dr_grpo", "dapo"}  # in test_group_relative.py
    elsewhere = {"sft", "policy_gradient"}  # in test_hybrid.py and test_grammar.py
    assert set(jaxpo.names()) - here - first - FAMILY == elsewhere
