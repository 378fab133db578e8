"""`rec`, `opmd` and `asymre` keep the identities that their cards claim."""

import jax
import numpy as np
import pytest

from jaxpo.objectives.off_policy import REC_MEMBERS
from jaxpo.primitives.advantages import drop_excess_negatives, log_average_exp
from jaxpo.primitives.surrogates import clip_mask
from tests.oracles import Case
from tests.oracles.cases import CASES, ROWS, assert_same, evaluate, make_case, on_policy, prepared, priorities

CASE = CASES["unequal groups"]
BOLD = make_case(11, (8, 4, 4, 4, 4), stale=1.2)  # ratios in and beyond every clip range
BOLD = BOLD.replace(reward=np.exp(BOLD.reward))  # more negatives than positives
PLAIN = dict(clip_mode="none")
FULL = np.broadcast_to(True, CASE.mask.shape)


def centred(case: Case) -> np.ndarray:
    """[B, 1] rewards less their group's mean, by hand."""
    return np.array([r - case.reward[case.group == g].mean() for r, g in zip(case.reward, case.group, strict=True)])[
        :, None
    ]


def without_holes(case: Case) -> Case:
    """Every row full, so that no row of a group is without tokens."""
    rng = np.random.default_rng(0)
    logp_old = -rng.exponential(1, FULL.shape)
    return case.replace(mask=FULL, logp_old=logp_old, logp=logp_old + 0.3 * rng.normal(size=FULL.shape))


drop = jax.jit(drop_excess_negatives)
log_mean_exp = jax.jit(log_average_exp)

# ---- rec -----------------------------------------------------------------------------------------


def test_rec_one_side_with_is_has_the_gradient_of_the_ppo_clip():
    rec = evaluate("rec", CASE, weight="importance_sampling")[1]
    grpo = evaluate("grpo", CASE, beta=0.0, scale="none", agg="token_mean")[1]
    cut = CASE.mask & (centred(CASE) != 0) & (grpo == 0)
    assert cut.any() and (grpo != 0).any()
    np.testing.assert_allclose(rec, grpo, atol=1e-12)


def test_rec_one_side_with_is_and_the_population_std_is_the_grpo_of_the_paper():
    """Rewards are divided by the population std; dividing them by it beforehand and by nothing after is the same."""
    case = CASES["K=4"]
    spread = np.array([case.reward[case.group == g].std() for g in case.group])
    scaled = case.replace(reward=np.where(spread > 0, case.reward / (spread + 1e-6), 0))
    rec = evaluate("rec", case, weight="importance_sampling", normalize=True)[1]
    grpo = evaluate("grpo", scaled, beta=0.0, scale="none", agg="token_mean")[1]
    np.testing.assert_allclose(rec, grpo, atol=1e-12)


@pytest.mark.parametrize("clip_mode", ("none", "one-side", "two-side", "ring"))
@pytest.mark.parametrize("weight", ("none", "importance_sampling"))
def test_rec_on_policy_gradient_is_the_same_for_every_mask_and_weight(clip_mode, weight):
    case = on_policy(CASE)
    expected = -centred(case) * case.mask / case.mask.sum()
    np.testing.assert_allclose(evaluate("rec", case, clip_mode=clip_mode, weight=weight)[1], expected, atol=1e-12)
    assert not np.allclose(evaluate("rec", CASE, clip_mode="ring", weight="none")[1], expected)


def test_rec_gspo_one_side_on_policy_is_the_mean_over_rows_of_the_same():
    case = on_policy(CASE)
    expected = -centred(case) * case.mask / (np.maximum(case.mask.sum(1, keepdims=True), 1) * ROWS)
    np.testing.assert_allclose(evaluate("rec", case, clip_mode="gspo-one-side")[1], expected, atol=1e-12)


@pytest.mark.parametrize("coef", (0.1, 0.4))
def test_rec_with_forward_kl_equals_asymre_with_the_baseline_shifted_by_minus_coef(coef):
    forward = evaluate("rec", CASE, regularizer="forward-kl", coef=coef, **PLAIN)
    assert_same(forward, evaluate("asymre", CASE, shift=-coef))


def test_rec_weighted_by_advantage_at_an_infinite_temperature_is_plain_reinforce():
    hot = evaluate("rec", CASE, weight="advantage", temp=1e12, **PLAIN)
    assert_same(hot, evaluate("rec", CASE, **PLAIN))
    assert not np.allclose(evaluate("rec", CASE, weight="advantage", temp=1.0 + 1e-9, **PLAIN)[1], hot[1])


def test_rec_advantage_of_zero_passes_both_tests_of_one_side():
    ratio = np.array([1e-3, 0.7, 1.0, 1.3, 1e3])
    assert np.all(clip_mask(ratio, 0.0, "one-side"))
    assert np.asarray(clip_mask(ratio, 1.0, "one-side")).tolist() == [True, True, True, False, False]
    assert np.asarray(clip_mask(ratio, -1.0, "one-side")).tolist() == [False, False, True, True, True]


def test_rec_ring_adds_to_two_side_what_is_so_far_off_that_its_gradient_leads_back():
    ratio = np.array([0.3, 0.7, 1.0, 1.3, 3.5])
    assert np.asarray(clip_mask(ratio, 1.0, "ring")).tolist() == [True, False, True, False, False]
    assert np.asarray(clip_mask(ratio, -1.0, "ring")).tolist() == [False, False, True, False, True]
    assert np.asarray(clip_mask(ratio, -1.0, "two-side")).tolist() == [False, False, True, False, False]


def test_rec_drops_nothing_from_a_group_of_equal_rewards():
    reward, group, count = np.full(5, 0.1), np.zeros(5, int), np.ones(5)
    assert np.all(drop(reward, group, count, np.arange(5.0)))


def test_rec_drop_balances_a_group_by_the_smallest_priorities():
    reward, group, count = np.array([1.0, 0, 0, 0, 0, 1]), np.zeros(6, int), np.ones(6)
    kept = drop(reward, group, count, np.array([0.0, 4, 3, 2, 1, 0]))
    assert np.asarray(kept).tolist() == [True, True, True, False, False, True]


def test_rec_dropped_rows_still_count_in_the_token_denominator():
    case = without_holes(CASES["K=4"])
    case = case.replace(reward=np.isin(np.arange(ROWS), np.unique(case.group, return_index=True)[1]) * 1.0)
    adv = prepared("rec", case, drop="balance", **PLAIN).adv
    dropped = (adv == 0) & (centred(case)[:, 0] != 0)
    assert dropped.sum() == 2 * 6  # of each group of one right and three wrong answers
    _, grad = evaluate("rec", case, drop="balance", **PLAIN)
    np.testing.assert_allclose(grad, -adv[:, None] * case.mask / case.mask.sum(), atol=1e-12)


def negatives_to_drop(case: Case) -> np.ndarray:
    """[B] bool: of each group the negatives of smallest priority that outnumber its positives."""
    priority = priorities(case, 1)
    out = np.zeros(ROWS, bool)
    for g in np.unique(case.group):
        below = np.flatnonzero((case.group == g) & (centred(case)[:, 0] < -1e-12))
        excess = max(0, 2 * len(below) - (case.group == g).sum())
        out[below[np.argsort(priority[below])][:excess]] = True
    return out


def plain_member(name: str, case: Case) -> np.ndarray:
    """Gradient of a named member, from its formula in the paper: ``-A w M / N`` per token, and the regularizer's."""
    gap, A = np.where(case.mask, case.logp - case.logp_old, 0), centred(case)
    r, up, down = np.exp(gap), A >= 0, A <= 0
    two_side = (0.8 <= r) & (r <= 1.2)
    ring = two_side | up & (r <= 0.4) | down & (r >= 3)
    factor, slope = {
        "REC-OneSide-NoIS": (up & (r <= 3) | down & (r >= 0.4), 0),
        "REC-OneSide-IS": (r * (up & (r <= 1.2) | down & (r >= 0.8)), 0),
        "REC-TwoSide-NoIS": (two_side, 0),
        "REC-TwoSide-IS": (r * two_side, 0),
        "REC-Ring-NoIS": (ring, 0),
        "REC-Ring-IS": (r * ring, 0),
        "OPMD": (1, 0.2 * gap),
        "AsymRE": (1, -0.1),
        "RED-Drop": (1, 0),
        "RED-Weight": (np.exp(A), 0),
    }[name]
    if name == "RED-Drop":  # with the mean of the rows that stay
        dropped = negatives_to_drop(case)
        assert dropped.sum() > 3
        rest = [case.reward[(case.group == g) & ~dropped].mean() for g in case.group]
        A = np.where(dropped, 0, case.reward - rest)[:, None]
    return (-A * factor + slope) * case.mask / case.mask.sum()


@pytest.mark.parametrize("name", REC_MEMBERS)
def test_rec_member_by_name_is_its_formula(name):
    case = BOLD
    expected = plain_member(name, case)
    others = [plain_member(other, case) for other in REC_MEMBERS if other != name]
    assert not any(np.allclose(expected, x, atol=1e-6) for x in others)
    np.testing.assert_allclose(evaluate("rec", case, **REC_MEMBERS[name])[1], expected, atol=1e-12)


def test_rec_members_that_are_objectives_of_their_own():
    """And OneSide-IS is GRPO without std: above."""
    assert_same(evaluate("rec", BOLD, **REC_MEMBERS["AsymRE"]), evaluate("asymre", BOLD))
    assert_same(evaluate("rec", BOLD, **REC_MEMBERS["OPMD"]), evaluate("opmd", BOLD, form="surrogate"))
    plain = evaluate("reinforce", on_policy(BOLD).replace(reward=centred(BOLD)[:, 0]))
    assert np.abs(plain[1]).max() > 0.01
    assert_same(evaluate("rec", on_policy(BOLD), **REC_MEMBERS["REC-OneSide-NoIS"]), plain)


def test_rec_without_mask_and_weight_is_reinforce_with_the_group_mean():
    assert_same(evaluate("rec", BOLD, **PLAIN), evaluate("reinforce", BOLD.replace(reward=centred(BOLD)[:, 0])))


# ---- opmd ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", (1.0, 0.25))
def test_opmd_simple_is_reinforce_over_1_plus_tau(tau):
    plain = evaluate("rec", CASE, **PLAIN)
    assert_same(evaluate("opmd", CASE, tau=tau), (plain[0] / (1 + tau), plain[1] / (1 + tau)))


def test_opmd_kimi_on_policy_gradient_is_minus_2_tau_over_rows_times_the_advantage():
    case, tau = on_policy(CASE), 0.7
    expected = -2 * tau / ROWS * centred(case) * case.mask
    np.testing.assert_allclose(evaluate("opmd", case, form="kimi", tau=tau)[1], expected, atol=1e-12)


@pytest.mark.parametrize("label", ("K=2", "K=4", "unequal groups"))
def test_opmd_pairwise_on_policy_gradient_is_minus_2_tau_over_k_groups_and_1_plus_tau_squared(label):
    case, tau = on_policy(CASES[label]), 0.7
    size = np.array([(case.group == g).sum() for g in case.group])[:, None]
    groups = len(np.unique(case.group))
    expected = -2 * tau / (size * groups * (1 + tau) ** 2) * centred(case) * case.mask
    np.testing.assert_allclose(evaluate("opmd", case, form="pairwise", tau=tau)[1], expected, atol=1e-12)


def test_opmd_pairwise_is_invariant_to_a_shift_of_the_rewards_of_a_group():
    moved = CASE.replace(reward=CASE.reward + 3 * np.sin(CASE.group))
    options = dict(form="pairwise", tau=0.7)
    assert_same(evaluate("opmd", moved, **options), evaluate("opmd", CASE, **options))


def test_opmd_log_average_exp_goes_to_the_mean_as_tau_grows_and_to_the_maximum_as_it_shrinks():
    reward, group, count = np.array([0.0, 1, 5, 2]), np.zeros(4, int), np.ones(4)
    np.testing.assert_allclose(log_mean_exp(reward, group, count, tau=1e3), 2.0, atol=0.01)
    np.testing.assert_allclose(log_mean_exp(reward, group, count, tau=1e-2), 5.0, atol=0.02)
    between = log_mean_exp(reward, group, count, tau=1.0)
    np.testing.assert_allclose(between, np.log(np.mean(np.exp(reward))), rtol=1e-6)


def test_opmd_log_average_exp_does_not_overflow():
    reward = np.array([0.0, 1e4])
    np.testing.assert_allclose(log_mean_exp(reward, np.zeros(2, int), np.ones(2), tau=1.0), 1e4 - np.log(2))


# ---- asymre --------------------------------------------------------------------------------------


def test_asymre_without_a_shift_is_plain_rec():
    assert_same(evaluate("asymre", CASE, shift=0.0), evaluate("rec", CASE, **PLAIN))


def test_asymre_shift_moves_the_advantage_of_every_row_by_minus_itself():
    shifted, plain = [prepared("asymre", CASE, shift=shift).adv for shift in (-0.3, 0.0)]
    np.testing.assert_allclose(shifted - plain, 0.3, atol=1e-12)


def test_asymre_pushes_up_the_tokens_of_solved_groups():
    case = CASES["K=4"].replace(reward=np.ones(ROWS))
    np.testing.assert_allclose(evaluate("asymre", case)[1], -0.1 * case.mask / case.mask.sum(), atol=1e-12)


def test_asymre_tau_scales_the_loss_by_1_over_1_plus_tau():
    loss, grad = evaluate("asymre", CASE)
    assert_same(evaluate("asymre", CASE, tau=1.0), (loss / 2, grad / 2))
