"""`gspo`, `gspo_token`, `cispo`, `bapo`, `mhpo`, `r2vpo` and `ppo_outer_loop` keep the identities of their cards."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpo
from jaxpo.metrics import Mean
from jaxpo.primitives.ratios import bounded_log_ratio
from jaxpo.primitives.surrogates import balanced_bounds, hazard
from tests.oracles import Case
from tests.oracles.cases import CASES, ROWS, WIDTH, assert_same, evaluate, on_policy, prepared, rollouts

CASE = CASES["unequal groups"]
OPEN = dict(eps_low=1e6, eps_high=1e6)  # a clip that never bites


def advantage(case: Case) -> np.ndarray:
    """[B, 1] GRPO advantages."""
    return prepared("grpo", case, beta=0.0).adv[:, None]


def ratio(case: Case) -> np.ndarray:
    return np.exp(np.where(case.mask, case.logp - case.logp_old, 0))


def unclipped(case: Case) -> np.ndarray:
    """Gradient of the token mean of ``-r A``."""
    return -ratio(case) * advantage(case) * case.mask / case.mask.sum()


def one_token_rows(case: Case) -> Case:
    mask = np.arange(WIDTH)[None] == (np.arange(ROWS) % WIDTH)[:, None]
    gap = np.random.default_rng(0).normal(size=mask.shape)
    logp_old = np.where(mask, -1 - gap**2, np.nan)
    return case.replace(mask=mask, logp_old=logp_old, logp=logp_old + 0.4 * gap[::-1])


# ---- gspo, gspo_token ----------------------------------------------------------------------------


def test_gspo_gives_every_token_of_a_row_the_same_gradient_when_unclipped():
    length = np.maximum(CASE.mask.sum(1, keepdims=True), 1)
    s = np.exp(np.log(ratio(CASE)).sum(1, keepdims=True) / length)
    assert s.std() > 0.05
    _, grad = evaluate("gspo", CASE, **OPEN)
    np.testing.assert_allclose(grad, -s * advantage(CASE) * CASE.mask / (length * ROWS), atol=1e-12)


@pytest.mark.parametrize("name", ("gspo", "gspo_token"))
def test_gspo_equals_grpo_when_every_row_has_one_token(name):
    case = one_token_rows(CASE)
    clipped = np.abs(ratio(case)[case.mask] - 1) > 0.2
    assert clipped.any() and not clipped.all()
    assert_same(evaluate(name, case, eps=0.2), evaluate("grpo", case, beta=0.0))


@pytest.mark.parametrize("label", ("unequal groups", "extreme ratios and counts"))
def test_gspo_token_equals_gspo_in_value_and_gradient(label):
    assert_same(evaluate("gspo_token", CASES[label], eps=0.2), evaluate("gspo", CASES[label], eps=0.2))


def test_gspo_token_clips_a_row_as_a_whole():
    _, grad = evaluate("gspo_token", CASE)
    touched = [set(row[mask] != 0) for row, mask in zip(grad, CASE.mask, strict=True)]
    assert all(len(row) <= 1 for row in touched)
    assert {True} in touched and {False} in [t for t, a in zip(touched, advantage(CASE)[:, 0], strict=True) if a != 0]


def test_gspo_token_takes_an_advantage_for_every_token():
    """Here returns-to-go; the row's ratio multiplies each."""
    spelled = dict(advantage="reinforce_pp(kl_coef=0.3)", ratio="sequence_token", surrogate="linear", agg="seq_mean")
    A = prepared("reinforce_pp", CASE, kl_coef=0.3).adv
    assert max(np.ptp(row[mask]) for row, mask in zip(A, CASE.mask, strict=True) if mask.any()) > 0.1
    length = np.maximum(CASE.mask.sum(1, keepdims=True), 1)
    s = np.exp(np.log(ratio(CASE)).sum(1, keepdims=True) / length)
    _, grad = evaluate("policy_gradient", CASE, **spelled)
    np.testing.assert_allclose(grad, -s * A * CASE.mask / (length * ROWS), atol=1e-12)


def test_gspo_token_over_tokens_is_another_objective_of_which_it_warns():
    with pytest.warns(UserWarning, match="no longer GSPO"):
        jaxpo.make("gspo_token", agg="token_mean")


@pytest.mark.parametrize("name", ("gspo", "gspo_token"))
def test_gspo_bounds_rows_of_negative_advantage_by_the_log_clamp_alone(name):
    far = CASE.replace(logp=np.where(CASE.mask, CASE.logp_old + 50, np.nan))
    loss, _ = evaluate(name, far)
    A, rows = advantage(CASE)[:, 0], CASE.mask.any(1)
    expected = -np.where(A > 0, A * (1 + 4e-4), A * math.exp(10))[rows].sum() / ROWS
    np.testing.assert_allclose(loss, expected, rtol=1e-9)


# ---- cispo ---------------------------------------------------------------------------------------


def test_cispo_takes_the_gradient_of_no_token():
    case = CASES["extreme ratios"]
    _, grad = evaluate("cispo", case)
    learns = case.mask & (advantage(case) != 0)
    assert learns.sum() > 30 and np.abs(np.log(ratio(case)[learns])).max() > 30
    assert (grad[learns] != 0).all() and (grad[~learns] == 0).all()


def test_cispo_without_a_cap_has_the_gradient_of_the_unclipped_surrogate():
    np.testing.assert_allclose(evaluate("cispo", CASE, eps_high=1e12)[1], unclipped(CASE), atol=1e-12)


def test_cispo_on_policy_has_the_gradient_of_reinforce_with_the_same_advantages():
    case = on_policy(CASE)
    reinforce = evaluate("reinforce", case.replace(reward=advantage(case)[:, 0]))[1]
    assert np.abs(reinforce).max() > 0.01
    np.testing.assert_allclose(evaluate("cispo", case)[1], reinforce, atol=1e-12)


def test_cispo_reports_the_surrogate_apart_from_its_loss():
    objective = jaxpo.make("cispo")
    with jax.enable_x64(True):
        stats = jaxpo.TokenStats(logp=jnp.asarray(CASE.logp))
        loss, report = jax.jit(lambda batch: jaxpo.evaluate(objective, lambda _: stats, batch))(rollouts(CASE))
        surrogate = float(report["surrogate"].total / report["surrogate"].weight)
    assert surrogate == pytest.approx((ratio(CASE) * advantage(CASE) * CASE.mask).sum() / CASE.mask.sum(), rel=1e-5)
    assert abs(float(loss) + surrogate) > 0.01


# ---- bapo ----------------------------------------------------------------------------------------

CLIP = dict(beta=0.0, agg="token_mean", dual_clip=3.0)


def test_bapo_with_target_0_is_a_plain_clip_with_the_first_bounds():
    assert_same(evaluate("bapo", CASE, target=0.0), evaluate("grpo", CASE, eps_low=0.4, eps_high=0.2, **CLIP))


def test_bapo_with_a_target_out_of_reach_ends_at_both_maxima():
    assert_same(evaluate("bapo", CASE, target=1e9), evaluate("grpo", CASE, eps_low=0.2, eps_high=1.0, **CLIP))


@functools.partial(jax.jit, static_argnames=("share", "step"))
def search(r, adv, target, *, share: bool = False, step: float = 0.05):
    """The bounds that are found: with ``share`` as in the paper, else as released."""
    steps = dict(low=(0.6, 0.8, step), high=(1.2, 2.0, step), low_first=not share, share=share)
    return balanced_bounds(r, adv, jnp.ones(64), target=target, **steps)


def bounds(seed: int, target: float, *, adv=None, **how) -> tuple[float, float]:
    """The bounds for random tokens."""
    rng = np.random.default_rng(seed)
    r, random = np.exp(0.7 * rng.normal(size=64)), rng.normal(size=64)
    low, high = search(r, random if adv is None else adv, target, **how)
    return float(low), float(high)


def test_bapo_lower_bound_ends_at_its_start_or_its_maximum_never_in_between():
    found = [bounds(seed, target) for seed in range(12) for target in (0.7, 1.0, 1.3)]
    low = {round(cl, 6) for cl, _ in found}
    assert low == {0.6, 0.8}
    assert any(1.21 < ch < 1.99 for _, ch in found), "no search ended in between: it was not put to the test"


def test_bapo_paper_raises_the_upper_bound_first():
    found = [bounds(seed, target, share=True) for seed in range(12) for target in (0.4, 0.5, 0.55)]
    assert any(ch > 1.21 for _, ch in found) and any(cl > 0.61 for cl, _ in found)
    assert all(cl < 0.61 or ch > 1.99 for cl, ch in found)


@pytest.mark.parametrize("share,last", ((False, 2.0), (True, 1.8)))
def test_bapo_last_step_is_cut_as_released_and_refused_in_the_paper(share, last):
    """From 1.2 by 0.3 the maximum 2.0 would be passed."""
    low, high = bounds(0, 1e9, share=share, step=0.3)
    assert high == pytest.approx(last) and low == pytest.approx(0.6 if share else 0.8)


def test_bapo_does_not_move_in_a_batch_without_negatives():
    assert bounds(0, 1e9, adv=np.ones(64)) == pytest.approx((0.6, 1.2))


def test_bapo_takes_the_gradient_of_negatives_below_the_lower_bound():
    _, grad = evaluate("bapo", CASE, target=1e9)
    negative = CASE.mask & (advantage(CASE) < 0)
    below, above = negative & (ratio(CASE) < 0.8), negative & (ratio(CASE) > 0.8) & (ratio(CASE) < 3)
    assert below.any() and (grad[below] == 0).all() and (grad[above] != 0).all()


# ---- mhpo ----------------------------------------------------------------------------------------


def test_mhpo_on_policy_damps_by_a_constant():
    case = on_policy(CASE)
    damping = math.exp(-(math.log(2) ** 1.5) - (math.log(2) / 0.8) ** 2)
    assert damping == pytest.approx(0.27, abs=0.01)
    length = np.maximum(case.mask.sum(1, keepdims=True), 1)
    expected = -damping * advantage(case) * case.mask / (length * ROWS)
    np.testing.assert_allclose(evaluate("mhpo", case)[1], expected, atol=1e-12)


def test_mhpo_without_bound_and_hazard_is_the_unclipped_surrogate():
    _, grad = evaluate("mhpo", CASE, c=1e7, lam_pos=1e12, lam_neg=1e12, agg="token_mean")
    np.testing.assert_allclose(grad, unclipped(CASE), rtol=1e-6, atol=1e-12)


def test_mhpo_multiplier_and_gradient_are_bounded_by_exp_c():
    gap = jnp.asarray(np.linspace(-50, 50, 2001))

    def multiplier(x):
        psi = bounded_log_ratio(x, jnp.zeros(()), jnp.ones(()), c=1.5)
        return jnp.exp(psi - hazard(psi, k_pos=1.5, lam_pos=1.0, k_neg=2.0, lam_neg=0.8))

    value, slope = jax.jit(jax.vmap(jax.value_and_grad(multiplier)))(gap)
    assert jnp.max(value) <= math.exp(1.5) and jnp.max(jnp.abs(slope)) <= math.exp(1.5)
    undamped = jnp.max(jnp.exp(bounded_log_ratio(gap, 0.0, jnp.ones(()), c=1.5)))
    assert undamped > 0.99 * math.exp(1.5), "the bound is tight without the hazard"
    case = CASES["extreme ratios"]
    length = np.maximum(case.mask.sum(1, keepdims=True), 1)
    bound = math.exp(1.5) * np.abs(advantage(case)) * case.mask / (length * ROWS)
    assert (np.abs(evaluate("mhpo", case)[1]) <= bound + 1e-12).all()


# ---- r2vpo ---------------------------------------------------------------------------------------


def test_r2vpo_without_its_multiplier_is_the_unclipped_surrogate():
    np.testing.assert_allclose(evaluate("r2vpo", CASE, memory={"lam": 0.0})[1], unclipped(CASE), atol=1e-12)


def test_r2vpo_gradient_is_minus_r_times_advantage_less_twice_lam_times_r_minus_1():
    r, lam = ratio(CASE), 0.7
    expected = -r * (advantage(CASE) - 2 * lam * (r - 1)) * CASE.mask / CASE.mask.sum()
    np.testing.assert_allclose(evaluate("r2vpo", CASE, memory={"lam": lam})[1], expected, atol=1e-12)


def test_r2vpo_on_policy_gradient_does_not_depend_on_lam():
    case = on_policy(CASE)
    grads = [evaluate("r2vpo", case, memory={"lam": lam})[1] for lam in (0.0, 9.0)]
    assert np.abs(grads[0]).max() > 0.01
    np.testing.assert_allclose(grads[1], grads[0], atol=1e-12)


def test_r2vpo_stationary_ratio_is_1_plus_half_of_advantage_over_lam():
    lam = 5.0
    r = np.where(CASE.mask, 1 + advantage(CASE) / (2 * lam), 1)
    assert (r > 0).all() and r.std() > 0.02
    still = CASE.replace(logp=np.where(CASE.mask, CASE.logp_old + np.log(r), np.nan))
    np.testing.assert_allclose(evaluate("r2vpo", still, memory={"lam": lam})[1], 0, atol=1e-12)


@pytest.mark.parametrize("lam", (0.0, 0.001, 1.0))
@pytest.mark.parametrize("variance", (0.0, 0.019, 0.021, 5.0))
def test_r2vpo_multiplier_stays_non_negative_and_grows_iff_the_variance_exceeds_delta(lam, variance):
    objective = jaxpo.make("r2vpo")  # delta 0.02, lr_dual 0.1
    state = objective.init().replace(memory={"lam": jnp.float32(lam)})
    report = {"ratio/excess": Mean.of(jnp.float32(variance - 0.02), jnp.float32(7))}
    after = float(objective.update(state, None, report).memory["lam"])
    assert after == pytest.approx(max(0, lam + 0.1 * (variance - 0.02)), abs=1e-6)
    assert after >= 0 and (after > lam) == (variance > 0.02)


# ---- ppo_outer_loop ------------------------------------------------------------------------------


def test_ppo_outer_loop_with_an_infinite_step_is_the_unclipped_surrogate():
    np.testing.assert_allclose(evaluate("ppo_outer_loop", CASE, eta=math.inf)[1], unclipped(CASE), atol=1e-12)


def test_ppo_outer_loop_penalty_and_its_gradient_vanish_at_the_old_policy():
    case = on_policy(CASE)
    assert_same(evaluate("ppo_outer_loop", case), evaluate("ppo_outer_loop", case, eta=math.inf))


def test_ppo_outer_loop_gradient_of_the_penalty_is_r_minus_1_over_eta():
    difference = evaluate("ppo_outer_loop", CASE, eta=0.25)[1] - unclipped(CASE)
    np.testing.assert_allclose(difference, (ratio(CASE) - 1) / 0.25 * CASE.mask / CASE.mask.sum(), atol=1e-12)
