"""`clip_cov`, `kl_cov`, `gtpo`, `hapo`, `dcpo_distribution` and `d3s` keep the identities of their cards."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpo
from jaxpo.metrics import Mean
from jaxpo.primitives import token_advantages
from jaxpo.primitives.selection import max_variance
from jaxpo.primitives.surrogates import covariance
from jaxpo.rollout.sampling import EntropyTemperature
from tests.oracles import Case
from tests.oracles.cases import CASES, ROWS, assert_same, evaluate, on_policy, prepared

CASE = CASES["unequal groups"]
BINARY = CASES["K=8"]


def advantage(case: Case) -> np.ndarray:
    """[B, 1] GRPO advantages."""
    return prepared("grpo", case, beta=0.0).adv[:, None]


def unclipped(case: Case) -> np.ndarray:
    """Gradient of the token mean of ``-r A``."""
    ratio = np.exp(np.where(case.mask, case.logp - case.logp_old, 0))
    return -ratio * advantage(case) * case.mask / case.mask.sum()


def covariances(case: Case) -> np.ndarray:
    with jax.enable_x64(True):
        on = jnp.asarray(case.mask, float)
        return np.asarray(covariance(jnp.asarray(np.nan_to_num(case.logp)), jnp.asarray(advantage(case)), on))


# ---- clip_cov, kl_cov ----------------------------------------------------------------------------

CLIP_COV = dict(ratio=0.2, eps_low=0.2, eps_high=0.3)


def test_clip_cov_with_an_infinite_lower_bound_is_the_plain_clipped_loss():
    plain = evaluate("grpo", CASE, beta=0.0, agg="token_mean", eps_high=0.3)
    assert_same(evaluate("clip_cov", CASE, lb=math.inf, ub=math.inf, **CLIP_COV), plain)


def test_clip_cov_chosen_tokens_have_exactly_no_gradient_and_stay_in_the_denominator():
    chosen = evaluate("clip_cov", CASE, lb=0.1, ub=5.0, **CLIP_COV)[1]
    plain = evaluate("grpo", CASE, beta=0.0, agg="token_mean", eps_high=0.3)[1]
    cut = (chosen == 0) & (plain != 0)
    assert cut.sum() == min(int(0.2 * CASE.mask.sum()), ((covariances(CASE) > 0.1) & (plain != 0)).sum())
    assert (covariances(CASE)[cut] > 0.1).all() and (covariances(CASE)[cut] < 5).all()
    np.testing.assert_allclose(chosen[~cut], plain[~cut], atol=1e-15)


def test_clip_cov_drops_nothing_when_the_advantage_is_the_same_everywhere():
    assert np.abs(covariances(CASE)).max() > 0.1
    one = CASES["K=1"].replace(reward=np.full(ROWS, 0.7))
    raw = dict(singleton="raw")  # the advantage of every row is 0.7
    plain = evaluate("grpo", one, beta=0.0, agg="token_mean", eps_high=0.3, **raw)
    assert np.abs(plain[1]).max() > 0.001
    assert_same(evaluate("clip_cov", one, lb=0.0, ub=math.inf, **CLIP_COV, **raw), plain)


def test_kl_cov_without_its_coefficient_is_the_unclipped_surrogate_and_looks_at_nothing():
    np.testing.assert_allclose(evaluate("kl_cov", CASE, coef=0.0)[1], unclipped(CASE), atol=1e-12)
    assert jaxpo.make("kl_cov", coef=0.0).asks.peeks == frozenset()


@pytest.mark.parametrize("coef", (1.0, 7.0))
def test_kl_cov_on_policy_gradient_does_not_depend_on_coef(coef):
    case = on_policy(CASE)
    np.testing.assert_allclose(evaluate("kl_cov", case, coef=coef, ratio=0.3)[1], unclipped(case), atol=1e-12)


@pytest.mark.parametrize("ratio", (2e-3, 0.3))
def test_kl_cov_penalises_the_tokens_of_largest_covariance_and_no_more(ratio):
    n = CASE.mask.sum()
    difference = evaluate("kl_cov", CASE, coef=7.0, ratio=ratio)[1] - unclipped(CASE)
    penalised = np.abs(difference) > 1e-9
    assert penalised.sum() == max(1, int(ratio * n))
    np.testing.assert_allclose(np.abs(difference[penalised]), 7 / n)
    cov = covariances(CASE)
    assert cov[penalised].min() >= cov[CASE.mask & ~penalised].max()


# ---- gtpo ----------------------------------------------------------------------------------------

PURE = dict(entropy_threshold=math.inf, entropy_scale=0.0, w_pos=1.0, conflict_norm="none")


def test_gtpo_without_its_weights_is_on_policy_grpo_that_spares_shared_tokens_of_failed_answers():
    case = on_policy(BINARY)
    gtpo = evaluate("gtpo", case, **PURE)[1]
    grpo = evaluate("grpo", case, beta=0.0, adv_eps=1e-4)[1]
    A = advantage(case)
    spared = (gtpo == 0) & (grpo != 0)
    assert spared.sum() > 3 and (spared & (A > 0)).sum() == 0
    np.testing.assert_allclose(gtpo[~spared], grpo[~spared], atol=1e-12)
    first = np.argmax(case.mask, 1)
    for b in np.flatnonzero(case.mask.any(1) & (A[:, 0] < 0)):  # the first token of a failed answer, by hand
        winners = (A[:, 0] > 0) & (case.group == case.group[b]) & case.mask.any(1)
        shared = case.tokens[b, first[b]] in case.tokens[np.arange(ROWS), first][winners]
        assert spared[b, first[b]] or not shared


def test_gtpo_takes_no_account_of_the_old_policy():
    assert_same(evaluate("gtpo", BINARY, **PURE), evaluate("gtpo", on_policy(BINARY), **PURE))


def test_gtpo_with_a_negative_threshold_leaves_out_everything():
    loss, grad = evaluate("gtpo", BINARY, entropy_threshold=-1.0)
    assert loss == 0 and (grad == 0).all()


def test_gtpo_conflicts_go_by_the_sign_before_the_entropy_penalty():
    """A penalty that makes every row negative spares the same tokens."""
    heavy = evaluate("gtpo", BINARY, **{**PURE, "entropy_scale": 100.0})[1]
    spared = evaluate("gtpo", BINARY, **PURE)[1] == 0
    assert (heavy[BINARY.mask & (advantage(BINARY) > 0)] > 0).all() and (advantage(BINARY) > 0).any()
    active = BINARY.mask & (advantage(BINARY) != 0)
    assert (spared & active).any()
    np.testing.assert_array_equal((heavy == 0)[active], spared[active])


def test_gtpo_entropy_penalty_makes_a_row_without_advantage_negative():
    case = CASES["K=4"].replace(reward=np.ones(ROWS))
    rows = np.maximum(case.mask.sum(1, keepdims=True), 1)
    entropy = np.where(case.mask, case.entropy, 0).sum(1, keepdims=True) / rows
    expected = np.where(entropy <= 0.7, 0.1 * entropy, 0) * case.mask / (rows * ROWS)
    assert (expected > 0).any() and (entropy > 0.7).any()
    np.testing.assert_allclose(evaluate("gtpo", case)[1], expected, atol=1e-12)


conflict_weight = jax.jit(token_advantages.conflict_weight, static_argnames="normalize")


def weights(*answers, adv, normalize=False) -> list:
    """`conflict_weight` of answers of one group."""
    tokens = np.zeros((len(answers), 4), int)
    mask = np.arange(4)[None] < np.array([len(a) for a in answers])[:, None]
    tokens[mask] = np.concatenate(answers)
    group = np.zeros(len(answers), int)
    out = conflict_weight(jnp.asarray(tokens), mask, group, np.array(adv), normalize=normalize)
    return [row[: len(a)].tolist() for row, a in zip(np.asarray(out), answers, strict=True)]


def test_gtpo_weights_are_0_1_2_or_4():
    won, lost = weights([5, 1, 2, 9], [5, 1, 3, 9], adv=[1.0, -1.0])
    assert (won, lost) == ([2, 2, 1, 2], [0, 0, 1, 0])
    won, lost = weights([5, 1, 2, 9], [5, 1, 3, 9], adv=[1.0, -1.0], normalize=True)
    assert (won, lost) == ([1, 1, 0.5, 1], [0, 0, 0.5, 0])  # the longer run has 2 tokens
    assert weights([5, 1], [5, 1], adv=[1.0, -1.0]) == [[4, 4], [0, 0]]  # the same answer, judged differently


def test_gtpo_runs_end_at_the_first_token_that_is_not_shared():
    """A token shared after a difference is in no forward run; places of the backward run count from each row's end."""
    won, lost = weights([5, 7, 2], [5, 8, 7, 2], adv=[1.0, -1.0])
    assert (won, lost) == ([2, 2, 2], [0, 1, 0, 0])


def test_gtpo_row_without_advantage_keeps_its_weight_and_makes_no_conflict():
    assert weights([5, 1], [5, 1], [5, 2], adv=[1.0, 0.0, 0.0]) == [[1, 1], [1, 1], [1, 1]]


def test_gtpo_random_weights_take_every_value_and_no_other():
    with jax.enable_x64(True):
        factor = conflict_weight(
            jnp.asarray(BINARY.tokens), BINARY.mask, BINARY.group, advantage(BINARY)[:, 0], normalize=False
        )
    assert set(np.unique(np.asarray(factor)[BINARY.mask])) == {0, 1, 2, 4}


# ---- hapo ----------------------------------------------------------------------------------------

entropy_signal = jax.jit(token_advantages.entropy_signal, static_argnames="official")
token_group_normalized = jax.jit(token_advantages.token_group_normalized)
SHORT = dict(max_len=5, buffer=3)


def test_hapo_without_strengths_and_guard_is_dapo():
    case = CASES["counts"]
    dapo = evaluate("dapo", case, dual_clip=10.0, **SHORT)
    assert_same(evaluate("hapo", case, redistribution=0.0, clip_strength=0.0, guard=0.0, **SHORT), dapo)


def test_hapo_advantages_of_a_group_sum_to_zero_over_its_tokens():
    batch = prepared("hapo", CASES["K=4"], guard=math.inf, penalty=0.0, adv_eps=0.0)
    kept = batch.count > 0
    assert kept.sum() >= 8 and np.abs(batch.adv).max() > 0.5
    for g in np.unique(batch.group):
        member = (batch.group == g) & kept
        assert abs((batch.adv * batch.mask.sum(1))[member].sum()) < 1e-9
    assert np.abs((batch.adv * batch.mask.any(1))[kept].reshape(-1).sum()) > 1e-3, "over rows they do not"


def test_hapo_guard_gives_a_group_of_large_advantages_those_of_grpo():
    """One answer of 1 token in 40 is right: over tokens its advantage is sqrt(39)."""
    reward, count = np.array([1.0, 0, 0, 0]), np.ones(4)
    mask = np.arange(13)[None] < np.array([1, 13, 13, 13])[:, None]
    free, guarded = [
        np.asarray(token_group_normalized(reward, mask, np.zeros(4, int), count, np.full(4, 0.5), guard=g))
        for g in (7.0, 5.0)
    ]
    np.testing.assert_allclose(free[0], math.sqrt(39), rtol=1e-4)
    assert guarded.tolist() == [0.5] * 4


def test_hapo_signal_spans_exactly_minus_1_to_1():
    rng = np.random.default_rng(0)
    entropy, weight = rng.exponential(size=(6, 7)), (rng.random((6, 7)) > 0.2).astype(float)
    h, numbers = entropy_signal(entropy, weight, rho=0.8)
    assert float(h.max()) == 1 and float(h.min()) == -1
    kept = np.sort(np.log(entropy[weight > 0]))
    assert float(numbers["q"]) == pytest.approx(kept[round(0.8 * (len(kept) - 1))], rel=1e-6)
    np.testing.assert_allclose(numbers["s"], np.sqrt(np.mean((kept - float(numbers["q"])) ** 2)), rtol=1e-5)
    anew = token_advantages.entropy_position(jnp.asarray(entropy), numbers)
    np.testing.assert_allclose(anew[weight > 0], h[weight > 0], rtol=1e-6)
    official = entropy_signal(entropy, weight, rho=0.8, official=True)[0]
    assert float(official.min()) == 0  # the released code divides negative numbers by a negative one
    np.testing.assert_allclose(np.abs(h), official, atol=1e-7)


def test_hapo_signal_with_all_tokens_on_one_side_spans_one_side_only():
    h, _ = entropy_signal(np.array([[1.0, 2.0, 4.0]]), np.ones((1, 3)), rho=1.0)
    assert float(h.max()) == 0 and float(h.min()) == -1
    h, _ = entropy_signal(np.full((1, 3), 0.5), np.ones((1, 3)))
    assert np.asarray(h).tolist() == [[0, 0, 0]]


def test_hapo_without_tau_samples_at_t0():
    numbers = dict(q=0.1, s=0.7, high=0.9, low=1.5)
    logits = np.random.default_rng(0).normal(size=(5, 7))
    assert np.ptp(EntropyTemperature(1.3, 0.2, numbers)(logits)) > 0.02
    np.testing.assert_allclose(EntropyTemperature(1.3, 0.0, numbers)(logits), 1.3, rtol=1e-6)
    assert jaxpo.make("hapo", tau=0.0, T0=1.3, max_len=5, buffer=3).protocol.options["tau"] == 0.0


# ---- dcpo_distribution ---------------------------------------------------------------------------

MIXED = CASE.replace(reward=np.where(CASE.reward > 0, CASE.reward, 0.0))


def test_dcpo_distribution_at_the_wanted_entropy_is_grpo():
    plain = evaluate("grpo", MIXED, beta=0.0, agg="token_mean", dual_clip=3.0)
    assert_same(evaluate("dcpo_distribution", MIXED, memory={"entropy": 0.25}), plain)
    assert not np.allclose(evaluate("dcpo_distribution", MIXED, memory={"entropy": 0.2})[1], plain[1])


@pytest.mark.parametrize("entropy,slot", ((0.15, "logp_old_hot"), (0.33, "logp_old_cold")))
def test_dcpo_distribution_advantage_over_1_minus_w_is_grpo_plus_a_c_rho(entropy, slot):
    right = MIXED.reward > 0.05
    a = min(abs(0.25 - entropy), 0.1) / right.mean()
    w = a / (1 + a)
    rho = np.exp(np.where(MIXED.mask, MIXED.extra[slot] - MIXED.logp_old, 0))
    adv = prepared("dcpo_distribution", MIXED, memory={"entropy": entropy}).adv
    expected = (advantage(MIXED) + a * right[:, None] * rho) * MIXED.mask
    np.testing.assert_allclose(adv / (1 - w), expected, atol=1e-9)
    solved = (advantage(MIXED)[:, 0] == 0) & right & MIXED.mask.any(1)
    assert solved.any() and (adv[solved][MIXED.mask[solved]] > 0).all()  # solved groups are pulled too


def test_dcpo_distribution_at_temperature_1_has_weights_of_1():
    same = MIXED.replace(extra={**MIXED.extra, "logp_old_hot": MIXED.logp_old})
    adv = prepared("dcpo_distribution", same, memory={"entropy": 0.15}).adv
    a = 0.1 / (MIXED.reward > 0.05).mean()
    expected = (advantage(MIXED) + a * (MIXED.reward > 0.05)[:, None]) / (1 + a) * MIXED.mask
    np.testing.assert_allclose(adv, expected, atol=1e-9)
    with jax.enable_x64(True):
        logits, tokens = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5))), jnp.arange(4)
        old_hot = jaxpo.make("dcpo_distribution", T_hot=1.0).asks.derived["old_hot"](logits, tokens)
        np.testing.assert_allclose(old_hot, jax.nn.log_softmax(logits)[tokens, tokens], atol=1e-12)


def test_dcpo_distribution_without_a_right_answer_has_no_loss():
    loss, grad = evaluate("dcpo_distribution", CASE.replace(reward=np.zeros(ROWS)), memory={"entropy": 0.2})
    assert loss == 0 and (grad == 0).all()


def test_dcpo_distribution_remembers_the_entropy_of_the_tokens_of_the_step():
    objective = jaxpo.make("dcpo_distribution")
    report = {"entropy/sampled": Mean.of(jnp.array([1.0, 3.0, 9.0]), jnp.array([2.0, 1.0, 0.0]))}
    state = objective.update(objective.init(), None, report)
    assert float(state.memory["entropy"]) == pytest.approx(5 / 3)
    nothing = {"entropy/sampled": Mean.of(jnp.zeros(1), jnp.zeros(1))}
    assert float(objective.update(state, None, nothing).memory["entropy"]) == pytest.approx(5 / 3)


# ---- d3s -----------------------------------------------------------------------------------------


def test_d3s_at_the_end_of_training_is_its_base():
    assert_same(evaluate("d3s", CASE, total=11, iteration=10), evaluate("grpo", CASE, beta=0.0, agg="token_mean"))


def test_d3s_on_gspo_at_the_end_of_training_is_gspo_token_over_tokens():
    with pytest.warns(UserWarning):
        base = evaluate("gspo_token", CASE, agg="token_mean")
    assert_same(evaluate("d3s", CASE, total=11, iteration=10, base="gspo"), base)


best_subset = jax.jit(max_variance)


def selected(x: np.ndarray, n: int, count=None) -> np.ndarray:
    """Shares of the batch's subset of size ``n``."""
    with jax.enable_x64(True):
        count = jnp.ones(len(x)) if count is None else jnp.asarray(count, float)
        group = jnp.zeros(len(x), int)
        return np.asarray(best_subset(jnp.asarray(x), group, count, jnp.full(len(x), float(n))))


@pytest.mark.parametrize("n", (1, 2, 3, 5, 7, 8))
def test_d3s_subset_varies_as_much_as_the_best_by_brute_force(n):
    x = np.random.default_rng(n).normal(size=8)
    best = max(np.var(x[list(subset)]) for subset in itertools.combinations(range(8), n))
    chosen = selected(x, n)
    assert chosen.sum() == n and set(chosen) <= {0, 1}
    np.testing.assert_allclose(np.var(x[chosen > 0]), best, atol=1e-12)


@pytest.mark.parametrize("scale,shift", ((3.0, 0.0), (0.1, 5.0), (1.0, -7.0)))
def test_d3s_subset_does_not_change_under_a_positive_affine_map(scale, shift):
    x = np.random.default_rng(1).normal(size=8)
    np.testing.assert_array_equal(selected(scale * x + shift, 4), selected(x, 4))


def test_d3s_keeps_the_share_of_rows_and_tokens_that_the_schedule_says():
    case = CASES["K=4"]
    for iteration in (0, 5, 10):
        batch = prepared("d3s", case, total=11, iteration=iteration)  # rows 0.5 to 1, tokens 0.2 to 1
        assert batch.count.sum() == round((0.5 + 0.05 * iteration) * ROWS)
        tokens = (batch.mask * batch.count[:, None]).sum()
        kept = (batch.per_token["selected"] * batch.mask * batch.count[:, None]).sum()
        assert kept == pytest.approx(round((0.2 + 0.08 * iteration) * tokens))
    within = prepared("d3s", case, total=11, level="within")
    assert {within.count[case.group == g].sum() for g in case.group} == {2}


def test_d3s_keeps_the_tokens_of_largest_advantage_times_entropy():
    batch = prepared("d3s", CASES["K=4"], total=11)
    live = (batch.mask > 0) & (batch.count[:, None] > 0)
    score = np.abs(batch.adv[:, None]) * batch.entropy_old
    kept = live & (batch.per_token["selected"] > 0)
    assert score[kept].min() >= score[live & ~kept].max()


def test_d3s_keeps_at_least_one_row_and_one_token():
    batch = prepared("d3s", CASES["K=4"], total=11, N_init=1e-6, K_init=1e-6)
    assert batch.count.sum() == 1
    assert (batch.per_token["selected"] * batch.mask * batch.count[:, None]).sum() == 1


def test_d3s_without_any_advantage_has_no_loss():
    loss, grad = evaluate("d3s", CASE.replace(reward=np.ones(ROWS)), total=11, iteration=10)
    assert loss == 0 and (grad == 0).all()
