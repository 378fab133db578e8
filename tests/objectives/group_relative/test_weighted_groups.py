"""`lite_ppo`, `bnpo`, `gdpo`, `a_grae`, `adora` and `canon` keep the identities of advantages that weigh or halve."""

import functools
import itertools
import math

import jax
import numpy as np
import pytest

import jaxpo
from jaxpo.primitives.advantages import asymmetric, beta_normalized, group_normalized, half_against_half
from tests.oracles import Case
from tests.oracles.cases import CASES, ROWS, assert_same, evaluate, on_policy, prepared, rollouts

CASE = CASES["unequal groups"]
asymmetric = jax.jit(asymmetric, static_argnames="easy_form")
beta_normalized = jax.jit(beta_normalized)
half_against_half = jax.jit(half_against_half, static_argnames="damp")
population_normalized = jax.jit(functools.partial(group_normalized, ddof=0, adv_eps=0.0))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def spread(case: Case) -> np.ndarray:
    """[B] sample std of the row's group."""
    return np.array(
        [np.std(case.reward[case.group == g], ddof=1) if (case.group == g).sum() > 1 else 0.0 for g in case.group]
    )


# ---- lite_ppo ------------------------------------------------------------------------------------


def test_lite_ppo_on_a_single_group_is_grpo():
    one = CASE.replace(group=np.zeros_like(CASE.group))
    np.testing.assert_allclose(prepared("lite_ppo", one).adv, prepared("grpo", one, beta=0.0).adv, atol=1e-12)
    assert_same(evaluate("lite_ppo", one), evaluate("grpo", one, beta=0.0, agg="token_mean"))


def test_lite_ppo_advantages_of_a_group_sum_to_zero():
    adv = prepared("lite_ppo", CASE).adv
    assert np.abs(adv).max() > 0.5
    for g in np.unique(CASE.group):
        assert abs(adv[CASE.group == g].sum()) < 1e-12


def test_lite_ppo_ratio_of_two_advantages_does_not_depend_on_the_spreads_of_their_groups():
    adv = prepared("lite_ppo", CASE).adv
    centred = np.array([r - CASE.reward[CASE.group == g].mean() for r, g in zip(CASE.reward, CASE.group, strict=True)])
    moves = spread(CASE) > 0.1
    assert np.ptp(spread(CASE)[moves]) > 0.1
    np.testing.assert_allclose(adv[moves] / centred[moves], 1 / (CASE.reward.std(ddof=1) + 1e-6), rtol=1e-9)


def test_lite_ppo_learns_nothing_from_equal_rewards_or_from_solved_groups():
    assert (prepared("lite_ppo", CASE.replace(reward=np.full(ROWS, 0.1))).adv == 0).all()
    case = CASES["K=4"]
    solved = np.array([np.ptp(case.reward[case.group == g]) == 0 for g in case.group])
    adv = prepared("lite_ppo", case).adv
    assert solved.any() and (adv[solved] == 0).all() and (adv[~solved] != 0).all()


# ---- bnpo ----------------------------------------------------------------------------------------


def successes(*rates: float, k: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Binary rewards of groups of ``k`` with the given success rates: reward, group, count."""
    reward = np.concatenate([np.arange(k) < round(p * k) for p in rates]).astype(float)
    return reward, np.repeat(np.arange(len(rates)), k), np.ones(len(reward))


def density_weights(*rates: float) -> np.ndarray:
    """What each group's centred reward is multiplied by."""
    reward, group, count = successes(*rates)
    adv = np.asarray(beta_normalized(reward, group, count)).reshape(len(rates), -1)
    return (adv / (reward.reshape(len(rates), -1) - np.array(rates)[:, None]))[:, 0]


def test_bnpo_on_a_single_group_is_reinforce_with_the_group_mean():
    reward, group, count = successes(0.25)
    np.testing.assert_allclose(beta_normalized(reward, group, count), reward - 0.25, atol=1e-12)


def test_bnpo_advantages_of_a_group_sum_to_zero():
    adv = prepared("bnpo", CASES["K=8"]).adv
    assert np.abs(adv).max() > 0.1
    for g in np.unique(CASES["K=8"].group):
        assert abs(adv[CASES["K=8"].group == g].sum()) < 1e-12


def test_bnpo_weighs_symmetric_success_rates_the_same():
    """They give alpha = beta, so that the density is symmetric around 1/2; others do not."""
    w = density_weights(0.25, 0.75, 0.5, 0.5, 0.5)
    np.testing.assert_allclose(w[0], w[1], rtol=1e-9)
    assert w[0] > 1.2 * w[2], "a rate that is rare in the batch weighs more"
    w = density_weights(0.25, 0.75, 0.25, 0.25, 0.25)
    assert abs(w[0] / w[1] - 1) > 0.1


def test_bnpo_groups_without_variance_get_exactly_nothing_whatever_their_weight():
    reward, group, count = successes(0.0, 1.0, 0.5, 0.375)
    adv = np.asarray(beta_normalized(reward, group, count)).reshape(4, -1)
    assert (adv[:2] == 0).all() and (adv[2:] != 0).all()


def test_bnpo_of_equal_success_rates_is_finite():
    reward, group, count = successes(0.5, 0.5, 0.5)
    adv = np.asarray(beta_normalized(reward, group, count))
    assert np.isfinite(adv).all() and (adv != 0).all()


def test_bnpo_weight_of_a_rate_that_the_batch_makes_all_but_impossible_is_capped_at_a_million():
    reward = np.concatenate([[0, 1e-4], *[[0.5 - d, 0.5 + d] for d in (0.1, 0.2, 0.3)] * 6])
    group = np.repeat(np.arange(19), 2)
    adv = np.asarray(beta_normalized(reward, group, np.ones(38)))
    np.testing.assert_allclose(adv[:2], [-50, 50], rtol=1e-9)  # 1e6 times what centring leaves


def test_bnpo_of_components_is_the_mean_of_their_advantages():
    one = [prepared("bnpo", CASE.replace(reward=CASE.extra["rewards_multi"][:, r])).adv for r in range(3)]
    weighted = np.stack(one, 1) * CASE.extra["reward_weights"]
    np.testing.assert_allclose(prepared("bnpo", CASE, components=True).adv, weighted.mean(1), rtol=1e-6, atol=1e-9)


def test_bnpo_refuses_rewards_outside_the_range_it_was_told():
    objective = jaxpo.make("bnpo", min=-1.0, max=1.0)
    with pytest.raises(ValueError, match=r"outside \[-1, 1\]"):
        objective.prepare(rollouts(CASE.replace(reward=np.full(ROWS, 1.5))), objective.init())


# ---- gdpo ----------------------------------------------------------------------------------------


def several(*columns, weights):
    """The case with these rewards [B] and their weights."""
    extra = dict(rewards_multi=np.stack(columns, 1), reward_weights=np.broadcast_to(weights, (ROWS, len(columns))))
    return CASE.replace(extra={**CASE.extra, **extra})


def test_gdpo_of_one_reward_is_grpo():
    one = prepared("gdpo", several(CASE.reward, weights=[2.0]), whiten=False).adv
    np.testing.assert_allclose(one, 2 * prepared("grpo", CASE, beta=0.0, adv_eps=1e-4).adv, rtol=1e-9)


def test_gdpo_does_not_let_a_reward_of_small_spread_drown():
    other = CASE.extra["rewards_multi"][:, 0]
    small, large = (several(CASE.reward, x * other, weights=[1.0, 1.0]) for x in (1.0, 1000.0))
    adv = [prepared("gdpo", case, adv_eps=0.0).adv for case in (small, large)]
    np.testing.assert_allclose(*adv, rtol=1e-6, atol=1e-9)


def test_gdpo_of_a_negative_weight_turns_the_advantage():
    up, down = (prepared("gdpo", several(CASE.reward, weights=[w])).adv for w in (1.0, -1.0))
    np.testing.assert_allclose(up, -np.asarray(down), atol=1e-12)


def test_gdpo_takes_no_notice_of_what_a_reward_that_abstains_says():
    abstains = np.arange(ROWS) % 3 == 0
    weights = np.stack([np.ones(ROWS), ~abstains], 1)
    a, b = (several(CASE.reward, np.where(abstains, x, CASE.reward), weights=weights) for x in (0.0, 99.0))
    np.testing.assert_array_equal(*(prepared("gdpo", case).adv for case in (a, b)))


def test_bnpo_of_components_asks_the_range_of_them_and_not_of_their_sum():
    objective = jaxpo.make("bnpo", components=True)
    objective.prepare(rollouts(CASE.replace(reward=np.full(ROWS, 1.5))), objective.init())
    with pytest.raises(ValueError, match=r"a reward of 1.5 is outside \[0, 1\]"):
        objective.prepare(rollouts(several(np.full(ROWS, 1.5), weights=[1.0])), objective.init())


# ---- a_grae --------------------------------------------------------------------------------------

RATES = successes(0.25, 0.5, 0.875, 0.0, 1.0)


def re_weighted(alpha: float, rates=RATES) -> np.ndarray:
    reward, group, count = rates
    adv = population_normalized(reward, group, count)
    return np.asarray(asymmetric(adv, reward, group, count, alpha=alpha))


def test_a_grae_with_alpha_to_zero_damps_nothing():
    omega = 2.625 / 5
    np.testing.assert_allclose(re_weighted(1e-9), re_weighted(omega), atol=1e-12)
    assert not np.allclose(re_weighted(1e-9), re_weighted(1.0))


def test_a_grae_negative_advantages_do_not_depend_on_alpha_and_positives_are_damped_by_omega_over_alpha():
    free, damped = re_weighted(1e-9), re_weighted(0.75)
    assert (free < 0).any() and (free > 0).any()
    np.testing.assert_allclose(damped[free < 0], free[free < 0], atol=1e-15)
    np.testing.assert_allclose(damped[free > 0] / free[free > 0], 2.625 / 5 / 0.75, atol=1e-12)


def test_a_grae_sum_of_a_group_is_k_times_omega_root_1_minus_p_plus_1_minus_omega_root_p():
    omega = 2.625 / 5
    sums = np.abs(re_weighted(1e-9)).reshape(5, 8).sum(1)
    for total, p in zip(sums, (0.25, 0.5, 0.875), strict=False):
        np.testing.assert_allclose(total, 8 * (omega * np.sqrt(1 - p) + (1 - omega) * np.sqrt(p)), rtol=1e-12)
    assert (sums[3:] == 0).all()


def test_a_grae_learns_from_negatives_alone_while_nothing_succeeds():
    """omega = 0 takes rewards that are 0 everywhere; one success in many groups comes near."""
    adv = re_weighted(1.0, successes(0.125, 0.0, 0.0, 0.0))
    free = re_weighted(1e-9, successes(0.125, 0.0, 0.0, 0.0))
    assert adv.max() == pytest.approx(free.max() * 0.125 / 4) and adv.min() == free.min() < 0


def test_a_grae_objective_uses_them():
    case = CASES["K=8"]
    case = case.replace(reward=case.correct)
    omega = case.reward.mean()  # groups of one size
    free, damped = prepared("a_grae", case, alpha=1e-9).adv, prepared("a_grae", case, alpha=1.0).adv
    assert 0.1 < omega < 0.9 and (free > 0).any()
    np.testing.assert_allclose(damped, np.where(free > 0, omega * free, free), atol=1e-12)


# ---- adora ---------------------------------------------------------------------------------------

SHORT = dict(max_len=5.0)


def test_adora_with_lam_1_is_grpo():
    assert_same(evaluate("adora", CASE, lam=1.0, **SHORT), evaluate("grpo", CASE, beta=0.001))


@pytest.mark.parametrize("rule", ("llm", "vlm"))
def test_adora_weight_is_one_number_a_group(rule):
    case = CASES["K=4"]
    adv, plain = prepared("adora", case, rule=rule, **SHORT).adv, prepared("grpo", case, beta=0.0).adv
    factor = np.divide(adv, plain, out=np.full(ROWS, np.nan), where=plain != 0)
    factors = {g: set(factor[(case.group == g) & (plain != 0)].round(9)) for g in case.group}
    assert {frozenset(f) for f in factors.values()} >= {frozenset({0.1}), frozenset({1.0})}
    assert all(len(f) <= 1 for f in factors.values())


def even(batch):
    """A rule of one's own."""
    return batch.group % 2 == 0


def test_adora_takes_a_rule_of_ones_own():
    adv, plain = prepared("adora", CASE, rule=even, lam=0.25).adv, prepared("grpo", CASE, beta=0.0).adv
    np.testing.assert_allclose(adv, plain * np.where(CASE.group % 2 == 0, 1, 0.25), atol=1e-12)


def test_adora_without_a_length_compares_all_wrong_answers():
    """Which shows where some are as long as the budget: the longest right answer is not longer than they are."""
    free, endless, short = (
        prepared("adora", CASES["K=4"], max_len=n, correct_score=0.1).adv for n in (None, math.inf, 5.0)
    )
    np.testing.assert_array_equal(free, endless)
    assert not np.allclose(free, short)


def test_adora_keeps_the_ranking_within_a_group():
    adv = prepared("adora", CASE, **SHORT).adv
    assert not np.allclose(adv, prepared("grpo", CASE, beta=0.0).adv)
    for g in np.unique(CASE.group):
        rows = np.flatnonzero(CASE.group == g)
        if spread(CASE)[rows[0]] > 1e-9:
            np.testing.assert_array_equal(np.argsort(adv[rows]), np.argsort(CASE.reward[rows]))


def test_adora_rules_differ_on_one_sided_groups_only():
    case = CASES["K=4"].replace(reward=np.where(CASES["K=4"].correct > 0, 0.7, 0.2) + 0.01 * np.arange(ROWS))
    llm, vlm = [prepared("adora", case, rule=rule, **SHORT).adv for rule in ("llm", "vlm")]
    differ = ~np.isclose(llm, vlm)
    assert differ.any()
    for g in np.unique(case.group):
        rows = case.group == g
        wrong = (case.reward <= 0.5) & (case.mask.sum(1) < 5) & rows
        one_sided = not wrong.any() or not (rows & (case.reward > 0.5)).any()
        assert one_sided or not differ[rows].any()


# ---- canon ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ("K=2", "K=4", "K=8"))
@pytest.mark.parametrize("metric", ("entropy", "length"))
def test_canon_halfway_is_the_centred_reward_in_even_groups(label, metric):
    case = CASES[label]
    adv = prepared("canon", case, mu=0.5, metric=metric).adv
    np.testing.assert_allclose(adv, prepared("grpo", case, beta=0.0, scale="none").adv, atol=1e-12)


def test_canon_halfway_is_dr_grpo():
    case = on_policy(CASES["K=4"])
    assert_same(evaluate("canon", case, mu=0.5), evaluate("dr_grpo", case, L_const=8192.0))


def test_canon_halfway_is_not_the_centred_reward_in_odd_groups():
    reward, metric = np.array([0.0, 1.0, 5.0]), np.arange(3.0)
    adv = half_against_half(reward, metric, np.zeros(3, int), np.ones(3), mu=0.5)
    assert np.abs(np.asarray(adv) - (reward - 2)).max() > 0.1


def test_canon_mu_of_0_and_1_compare_with_the_own_and_the_other_half():
    reward, metric = np.array([0.0, 1.0, 5.0, 2.0]), np.array([4.0, 1.0, 2.0, 3.0])  # halves {1, 5}, {2, 0}
    intra, inter = [half_against_half(reward, metric, np.zeros(4, int), np.ones(4), mu=mu) for mu in (0.0, 1.0)]
    np.testing.assert_allclose(intra, [0 - 1, 1 - 3, 5 - 3, 2 - 1])
    np.testing.assert_allclose(inter, [0 - 3, 1 - 1, 5 - 1, 2 - 3])


def test_canon_with_a_random_metric_leaves_half_of_the_others_out():
    """Averaged over all orders the baseline of mu = 1 is the mean of the other answers."""
    reward, group, count = np.array([0.0, 1.0, 5.0, 2.0]), np.zeros(4, int), np.ones(4)
    orders = [half_against_half(reward, np.array(p, float), group, count) for p in itertools.permutations(range(4))]
    np.testing.assert_allclose(np.mean(orders, 0), reward - (reward.sum() - reward) / 3, atol=1e-12)
    assert len(np.unique(np.round(orders, 9)[:, 0])) == 3


def test_canon_breaks_ties_of_the_metric_by_row_order():
    reward = np.array([0.0, 1.0, 5.0, 2.0])
    adv = half_against_half(reward, np.ones(4), np.zeros(4, int), np.ones(4), mu=1.0)
    np.testing.assert_allclose(adv, [0 - 3.5, 1 - 3.5, 5 - 0.5, 2 - 0.5])


@pytest.mark.parametrize("mu", (0.0, 0.5, 1.0))
def test_canon_gives_a_row_alone_nothing_or_its_raw_reward(mu):
    case = CASES["K=1"]
    assert (prepared("canon", case, mu=mu).adv == 0).all()
    np.testing.assert_array_equal(prepared("canon", case, mu=mu, singleton="raw").adv, case.reward)


def test_canon_alpha_damps_the_long_half_or_the_one_of_low_entropy():
    reward, metric = np.array([0.0, 1.0, 5.0, 2.0]), np.array([4.0, 1.0, 2.0, 3.0])  # lower half {1, 5}
    options = dict(mu=1.0, alpha=0.5)
    upper, lower = [
        half_against_half(reward, metric, np.zeros(4, int), np.ones(4), damp=damp, **options)
        for damp in ("upper", "lower")
    ]
    np.testing.assert_allclose(upper, [0.5 * 0 - 3, 1 - 0.5 * 1, 5 - 0.5 * 1, 0.5 * 2 - 3])
    np.testing.assert_allclose(lower, [0 - 0.5 * 3, 0.5 * 1 - 1, 0.5 * 5 - 1, 2 - 0.5 * 3])
    batch_of_length, batch_of_entropy = [
        prepared("canon", CASES["K=4"], metric=metric, alpha=0.5).adv for metric in ("length", "entropy")
    ]
    assert not np.allclose(batch_of_length, batch_of_entropy)


def test_canon_mu_follows_the_accuracy_or_a_cosine():
    case = CASES["K=8"]
    inter, intra = [prepared("canon", case, mu=mu).adv for mu in (1.0, 0.0)]
    p = case.reward.mean()
    for schedule, mu in (("accuracy", p), ("inverse_accuracy", 1 - p)):
        adv = prepared("canon", case, mu_schedule=schedule).adv
        np.testing.assert_allclose(adv, mu * inter + (1 - mu) * intra, atol=1e-12)
    for iteration, mu in ((0, 1.0), (1, 0.75), (2, 0.25), (3, 1.0)):
        adv = prepared("canon", case, mu_schedule="cosine", mu_period=3, iteration=iteration).adv
        np.testing.assert_allclose(adv, mu * inter + (1 - mu) * intra, atol=1e-6)
