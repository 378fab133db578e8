"""`reinforce`, `rloo`, `reinforce_pp`, `grpo`, `dr_grpo` and `dapo` keep the identities that their cards claim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpo
from tests.oracles import Case, group_relative, off_policy, trust_region
from tests.oracles.cases import CASES, ROWS, WIDTH, assert_same, evaluate, make_case, on_policy, prepared
from tests.oracles.groups import group_advantage

CASE = CASES["unequal groups"]
COUNTS = CASES["counts"]

# ---- reinforce -----------------------------------------------------------------------------------


def test_reinforce_gradient_is_minus_advantage_over_tokens():
    case = CASES["unequal groups"]
    _, grad = evaluate("reinforce", case)
    np.testing.assert_allclose(grad, -case.reward[:, None] * case.mask / case.mask.sum(), atol=1e-12)


def test_reinforce_gradient_depends_neither_on_logp_nor_on_logp_old():
    case = CASES["unequal groups"]
    other = CASES["extreme ratios"]
    finite = np.where(case.mask, np.nan_to_num(other.logp, nan=-3.0), np.nan)
    _, grad = evaluate("reinforce", case)
    np.testing.assert_array_equal(grad, evaluate("reinforce", case.replace(logp=finite))[1])
    np.testing.assert_array_equal(grad, evaluate("reinforce", case.replace(logp_old=finite - 40))[1])


def test_reinforce_with_batch_mean_ignores_a_constant_added_to_all_rewards():
    case, hyperparameters = CASES["counts"], dict(baseline="batch_mean", agg="seq_sum")
    assert_same(
        evaluate("reinforce", case, **hyperparameters),
        evaluate("reinforce", case.replace(reward=case.reward + 5.5), **hyperparameters),
    )


def test_reinforce_with_batch_mean_and_a_constant_reward_has_no_gradient():
    case = CASES["unequal groups"].replace(reward=np.full(ROWS, 0.1))
    loss, grad = evaluate("reinforce", case, baseline="batch_mean", agg="seq_sum")
    assert loss == 0 and (grad == 0).all()


def test_reinforce_on_group_centred_rewards_equals_rec_without_clip_and_weight():
    case = CASES["counts"]
    advantage = group_advantage(case, case.reward, scale="none")
    centred = case.replace(reward=np.array([advantage.get(b, 0.0) for b in range(ROWS)]))
    assert_same(evaluate("reinforce", centred), off_policy.rec(case, clip_mode="none"))


# ---- rloo ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", (2, 4, 8))
def test_rloo_advantage_is_k_over_k_minus_1_times_the_centred_reward(k):
    case = CASES[f"K={k}"]
    _, grad = evaluate("rloo", case, beta=0.0)
    group_mean = np.array([case.reward[case.group == g].mean() for g in case.group])
    expected = -k / (k - 1) * (case.reward - group_mean) / ROWS
    np.testing.assert_allclose(grad, expected[:, None] * case.mask, atol=1e-12)


def test_rloo_advantages_sum_to_zero_in_each_group():
    case = CASES["unequal groups"]
    case = case.replace(
        mask=np.arange(WIDTH)[None] == np.zeros((ROWS, 1)), logp=np.full(case.mask.shape, -1.0)
    )  # no empty row
    _, grad = evaluate("rloo", case, beta=0.0)
    for g in np.unique(case.group):
        assert abs(grad[case.group == g].sum()) < 1e-12


def test_rloo_forms_have_the_same_gradient_on_policy():
    case = on_policy(CASES["counts"])
    reinforce, ppo = [evaluate("rloo", case, beta=0.0, **form)[1] for form in ({}, dict(form="ppo"))]
    np.testing.assert_allclose(ppo, reinforce, atol=1e-12)


@pytest.mark.parametrize("singleton", ("zero", "raw"))
def test_rloo_row_without_siblings_gets_zero_or_its_raw_reward(singleton):
    case = CASES["K=1"]
    hyperparameters = {} if singleton == "zero" else dict(singleton="raw")
    _, grad = evaluate("rloo", case, beta=0.0, **hyperparameters)
    expected = 0 if singleton == "zero" else -case.reward[:, None] * case.mask / ROWS
    np.testing.assert_allclose(grad, expected * np.ones_like(grad), atol=1e-15)


def test_rloo_sequence_ratio_is_clamped_before_it_overflows():
    case = CASES["unequal groups"]
    far = case.replace(logp=case.logp_old + 200)  # exp of up to 1200
    loss, grad = evaluate("rloo", far, beta=0.0, form="ppo")
    assert np.isfinite(loss) and (grad == 0).all()


def test_rloo_penalty_uses_logp_old_and_is_a_constant():
    case = CASES["unequal groups"]
    _, grad = evaluate("rloo", case)
    np.testing.assert_array_equal(grad, evaluate("rloo", case.replace(logp=case.logp - 1))[1])
    assert not np.allclose(grad, evaluate("rloo", case.replace(logp_old=case.logp_old * 0.5))[1])


def test_rloo_sums_the_penalty_of_bfloat16_logprobs_in_float32():
    step, width = 2.0**-7, 257  # the sum, 257 / 128, does not fit the 8 bits of a bfloat16
    logp_old = jnp.full((2, width), 1.0, jnp.bfloat16)
    ref = jnp.stack([logp_old[0] - step, logp_old[1]]).astype(jnp.bfloat16)
    batch = jaxpo.Rollouts(
        mask=jnp.ones((2, width)), reward=jnp.zeros(2), group=jnp.zeros(2, jnp.int32), logp_old=logp_old, logp_ref=ref
    )
    objective = jaxpo.make("rloo", beta=1.0)
    grad = jax.jit(jax.grad(lambda logp: jaxpo.evaluate(objective, lambda _: jaxpo.TokenStats(logp=logp), batch)[0]))(
        logp_old.astype(jnp.float32)
    )
    np.testing.assert_allclose(grad[:, 0], [step * width / 2, -step * width / 2], rtol=1e-6)


# ---- reinforce_pp --------------------------------------------------------------------------------

WITH_KL = dict(gamma=0.7, kl_coef=0.3)


@pytest.mark.parametrize("options", (WITH_KL, dict(variant="baseline", kl_coef=0.0)), ids=str)
def test_reinforce_pp_advantages_have_mean_0_and_sample_variance_1_over_masked_tokens(options):
    adv = prepared("reinforce_pp", COUNTS, **options).adv
    drawn = np.repeat(adv, COUNTS.count.astype(int), 0)[np.repeat(COUNTS.mask, COUNTS.count.astype(int), 0)]
    np.testing.assert_allclose([drawn.mean(), drawn.var(ddof=1)], [0, 1], atol=1e-6)


def test_reinforce_pp_without_kl_and_discount_has_one_advantage_a_row():
    adv = prepared("reinforce_pp", CASE, kl_coef=0.0).adv
    first = adv[np.arange(ROWS), np.argmax(CASE.mask, 1)][:, None]
    assert np.std(first) > 0.5
    np.testing.assert_allclose(adv, first * CASE.mask, atol=1e-12)
    with_kl = prepared("reinforce_pp", CASE, **WITH_KL).adv
    assert max(np.ptp(row[mask]) for row, mask in zip(with_kl, CASE.mask, strict=True) if mask.any()) > 0.1


@pytest.mark.parametrize("scale,shift", ((1.0, 50.0), (300.0, 0.0)))
def test_reinforce_pp_without_kl_and_discount_is_invariant_to_shift_and_scale_of_the_rewards(scale, shift):
    moved = CASE.replace(reward=scale * CASE.reward + shift)
    before = prepared("reinforce_pp", CASE, kl_coef=0.0).adv
    np.testing.assert_allclose(prepared("reinforce_pp", moved, kl_coef=0.0).adv, before, atol=1e-7)


def test_reinforce_pp_with_constant_returns_or_a_single_token_is_exactly_zero():
    constant = CASE.replace(reward=np.full(ROWS, 0.1))
    assert (prepared("reinforce_pp", constant, kl_coef=0.0).adv == 0).all()
    one = np.zeros_like(CASE.mask)
    one[3, 2] = True
    assert (prepared("reinforce_pp", CASE.replace(mask=one), kl_coef=0.0).adv == 0).all()


def test_reinforce_pp_baseline_moves_the_kl_from_the_reward_into_the_loss():
    options = dict(variant="baseline", kl_coef=0.2)
    np.testing.assert_array_equal(
        prepared("reinforce_pp", CASE, **options).adv,
        prepared("reinforce_pp", CASE.replace(ref=CASE.ref - 1), **options).adv,
    )
    gap = np.where(CASE.mask, CASE.logp - CASE.ref, 0)
    loss = (
        evaluate("reinforce_pp", CASE, **options)[0]
        - evaluate("reinforce_pp", CASE, variant="baseline", kl_coef=0.0)[0]
    )
    np.testing.assert_allclose(loss, 0.2 * (gap**2 / 2).sum() / CASE.mask.sum(), rtol=1e-9)


# ---- grpo ----------------------------------------------------------------------------------------


def _grpo_advantage(case: Case) -> np.ndarray:
    advantage = group_advantage(case, case.reward)
    return np.array([advantage[b] for b in range(ROWS)])[:, None]


@pytest.mark.parametrize("eps", (1e-3, 0.2, 10.0))
def test_grpo_on_policy_gradient_is_advantage_over_length_and_rows_whatever_eps(eps):
    case = on_policy(CASES["unequal groups"])
    _, grad = evaluate("grpo", case, beta=0.0, eps=eps)
    length = np.maximum(case.mask.sum(1, keepdims=True), 1)
    np.testing.assert_allclose(grad, -_grpo_advantage(case) * case.mask / (length * ROWS), atol=1e-12)


def test_grpo_without_clipping_and_with_token_mean_has_gradient_minus_ratio_times_advantage_over_tokens():
    case = CASES["unequal groups"]
    _, grad = evaluate("grpo", case, beta=0.0, agg="token_mean", eps=1e12)
    ratio = np.exp(np.where(case.mask, case.logp - case.logp_old, 0))
    np.testing.assert_allclose(grad, -ratio * _grpo_advantage(case) * case.mask / case.mask.sum(), atol=1e-12)


@pytest.mark.parametrize("scale,shift", ((7.0, -3.0), (0.01, 0.0), (1.0, 100.0)))
def test_grpo_without_adv_eps_is_invariant_to_a_positive_affine_map_of_the_rewards(scale, shift):
    case = CASES["unequal groups"]
    moved = case.replace(reward=scale * case.reward + shift)
    assert_same(evaluate("grpo", moved, beta=0.0, adv_eps=0.0), evaluate("grpo", case, beta=0.0, adv_eps=0.0))


@pytest.mark.parametrize("hyperparameters", (dict(adv_eps=0.0), dict(eps=0.2)), ids=str)
def test_grpo_group_of_equal_rewards_gets_exactly_nothing(hyperparameters):
    case = CASES["unequal groups"].replace(reward=np.full(ROWS, 0.1))  # the mean of three 0.1 is not 0.1
    loss, grad = evaluate("grpo", case, beta=0.0, **hyperparameters)
    assert loss == 0 and (grad == 0).all()


def test_grpo_equals_gspo_when_every_row_has_one_token():
    case = CASES["unequal groups"]
    one = np.zeros_like(case.mask)
    one[np.arange(ROWS), np.arange(ROWS) % WIDTH] = True
    rng = np.random.default_rng(0)
    logp_old = np.where(one, -rng.exponential(1, one.shape), np.nan)
    case = case.replace(mask=one, logp_old=logp_old, logp=logp_old + 0.4 * rng.normal(size=one.shape))
    assert_same(evaluate("grpo", case, beta=0.0, eps=0.2), trust_region.gspo(case, eps_low=0.2, eps_high=0.2))


def test_grpo_kl_vanishes_with_its_gradient_at_the_reference():
    case = CASES["unequal groups"]
    with_kl, without = [evaluate("grpo", case.replace(ref=case.logp), **beta) for beta in ({}, dict(beta=0.0, eps=0.2))]
    assert_same(with_kl, without)


# ---- dr_grpo -------------------------------------------------------------------------------------


def _centred(case: Case) -> np.ndarray:
    return np.array([case.reward[b] - case.reward[case.group == case.group[b]].mean() for b in range(ROWS)])[:, None]


def test_dr_grpo_on_policy_gradient_does_not_depend_on_length():
    case = on_policy(CASES["unequal groups"])
    _, grad = evaluate("dr_grpo", case, L_const=WIDTH)
    np.testing.assert_allclose(grad, -_centred(case) * case.mask / (ROWS * WIDTH), atol=1e-12)


def test_dr_grpo_equals_grpo_without_std_when_all_rows_are_l_const_long():
    case = CASES["unequal groups"]
    rng = np.random.default_rng(0)
    logp_old = -rng.exponential(1, case.mask.shape)
    case = case.replace(
        mask=np.ones_like(case.mask), logp_old=logp_old, logp=logp_old + 0.4 * rng.normal(size=case.mask.shape)
    )
    assert_same(evaluate("dr_grpo", case, L_const=WIDTH), evaluate("grpo", case, beta=0.0, scale="none"))


@pytest.mark.parametrize("k", (2, 4, 8))
def test_dr_grpo_equals_the_average_of_the_two_advantages_of_canon_for_even_k(k):
    case = on_policy(CASES[f"K={k}"])
    length = case.mask.sum(1)
    halves = [group_relative.canon_advantage(case, length, mu) for mu in (0.0, 1.0)]
    advantage = np.array([(halves[0][b] + halves[1][b]) / 2 for b in range(ROWS)])[:, None]
    _, grad = evaluate("dr_grpo", case, L_const=WIDTH)
    np.testing.assert_allclose(grad, -advantage * case.mask / (ROWS * WIDTH), atol=1e-12)


# ---- dapo ----------------------------------------------------------------------------------------


def test_dapo_without_shaping_equals_grpo_with_clip_higher_and_token_mean_on_mixed_groups():
    case = make_case(9, (8, 4, 4, 2, 2, 2, 2), rewards="binary", mixed=True)
    assert_same(evaluate("dapo", case, penalty=0.0), evaluate("grpo", case, beta=0.0, agg="token_mean", eps_high=0.28))


def test_dapo_equals_the_same_loss_on_the_kept_rows_alone():
    case, hyperparameters = CASES["counts"], dict(max_len=5, buffer=3)
    kept = group_relative.dapo_keeps(case) & (case.count > 0)
    assert 0 < kept.sum() < (case.count > 0).sum()
    loss, grad = evaluate("dapo", case, **hyperparameters)
    alone = evaluate("dapo", case.take(kept), **hyperparameters)
    assert_same((loss, grad[kept]), alone)
    assert (grad[~kept] == 0).all()


def test_dapo_penalty_at_max_len_is_minus_penalty():
    """A right answer of ``max_len`` tokens loses exactly its lead of 1 and ties with the short wrong one."""
    case = on_policy(make_case(10, (2,) * 12, rewards="binary", mixed=True))
    mask = np.zeros_like(case.mask)
    mask[:, :2] = True  # 2 = max_len - buffer: free
    mask[case.correct == 1, :5] = True  # 5 = max_len: costs the whole penalty, 1
    full = case.replace(mask=mask, logp=np.full(mask.shape, -1.0), logp_old=np.full(mask.shape, -1.0))
    loss, grad = evaluate("dapo", full, max_len=5, buffer=3)
    assert loss == 0 and (grad == 0).all()
    longer = mask.copy()
    longer[case.correct == 1] = True  # 6: no more than the penalty
    assert evaluate("dapo", full.replace(mask=longer), max_len=5, buffer=3)[0] == 0


@pytest.mark.parametrize("outcome", (0.0, 1.0))
def test_dapo_filters_before_it_shapes_so_that_solved_and_failed_groups_give_nothing(outcome):
    case = CASES["K=4"]
    case = case.replace(
        correct=np.full(ROWS, outcome), reward=np.full(ROWS, outcome)
    )  # lengths differ, so shaped rewards do
    loss, grad = evaluate("dapo", case, max_len=5, buffer=3)
    assert loss == 0 and (grad == 0).all()


def test_dapo_reads_the_raw_outcome_not_the_reward():
    case = CASES["K=4"].replace(correct=np.ones(ROWS))
    assert len(np.unique(case.reward)) > ROWS / 2
    loss, grad = evaluate("dapo", case, max_len=5, buffer=3)
    assert loss == 0 and (grad == 0).all()
