"""The identities of the objectives that mix demonstrations with reinforcement learning."""

import math

import numpy as np
import pytest

from tests.oracles.cases import CASES, EXPERT_CASES, assert_same, evaluate, on_policy, with_experts
from tests.oracles.groups import group_advantage
from tests.oracles.hybrid import EXPERT, nll, part

CASE = EXPERT_CASES["unequal groups"]
EXPERTS = CASE.extra["role"] == EXPERT
TOKENS = CASE.mask.sum()


def gradient(name, case=CASE, **options):
    return evaluate(name, case, **options)[1]


# ---- luffy


def test_luffy_pushes_expert_tokens_most_where_their_probability_is_gamma():
    gamma, A = 0.1, group_advantage(CASE, CASE.reward, scale="none")
    grad, p = gradient("luffy", gamma=gamma), np.exp(CASE.logp)
    for b in np.flatnonzero(EXPERTS):
        for t in np.flatnonzero(CASE.mask[b]):
            factor = p[b, t] * gamma / (p[b, t] + gamma) ** 2
            assert grad[b, t] == pytest.approx(-A[b] * factor / TOKENS, rel=1e-9, abs=1e-15) and factor <= 0.25
    assert gamma * gamma / (gamma + gamma) ** 2 == 0.25


def test_luffy_of_a_large_gamma_is_the_plain_probability():
    wide = gradient("luffy", gamma=1e9)[EXPERTS] * 1e9
    np.testing.assert_allclose(wide, gradient("luffy", shaping="none")[EXPERTS], rtol=1e-6, atol=1e-15)


def test_luffy_on_policy_is_reinforce_on_own_rows():
    case = with_experts(on_policy(CASES["unequal groups"]))
    A = group_advantage(case, case.reward, scale="none")
    own = case.extra["role"] != EXPERT
    expected = np.array([[-A[b] if on else 0.0 for on in row] for b, row in enumerate(case.mask)]) / case.mask.sum()
    np.testing.assert_allclose(gradient("luffy", case)[own], expected[own], rtol=1e-9, atol=1e-15)


# ---- srft


def test_srft_pushes_failed_and_solved_own_rows():
    H = [np.mean(CASE.entropy[b][CASE.mask[b]]) if CASE.mask[b].any() else 0.0 for b in range(len(CASE.reward))]
    grad = gradient("srft", success=0.3)
    for b in np.flatnonzero(~EXPERTS):
        expected = -0.1 * math.exp(H[b]) if CASE.reward[b] >= 0.3 else 1.0
        np.testing.assert_allclose(grad[b], CASE.mask[b] * expected / TOKENS, rtol=1e-9, atol=1e-15)


def test_the_two_weights_of_srft_have_one_product():
    """``w_sft w_rl = c_sft c_rl`` for every row: what a row is imitated less for, it is reinforced more for."""
    more = CASE.replace(entropy=CASE.entropy + 1.0)
    sft = [
        gradient("srft", case, c_rl=0.0)[EXPERTS] - gradient("srft", case, c_rl=0.0, c_sft=0.0)[EXPERTS]
        for case in (CASE, more)
    ]
    rl = [gradient("srft", case, success=-1e9)[~EXPERTS] for case in (CASE, more)]
    np.testing.assert_allclose(sft[1], sft[0] / math.e, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(rl[1], rl[0] * math.e, rtol=1e-9, atol=1e-15)


# ---- chord


def test_chord_without_imitation_is_grpo_and_with_nothing_else_is_sft():
    own = with_experts(CASES["unequal groups"], share=0.0)
    assert_same(evaluate("chord", own, mu=0.0), evaluate("grpo", own, beta=0.0, agg="token_mean"))
    assert_same(evaluate("chord", CASE, mu=1.0, phi="none"), nll(part(CASE, True)))


def test_chord_weighs_a_demonstrated_token_by_p_times_1_minus_p():
    grad, p = gradient("chord", mu=0.3), np.exp(CASE.logp)
    n = (CASE.mask & EXPERTS[:, None]).sum()
    expected = np.where(CASE.mask, -0.3 * p * (1 - p) / n, 0)
    np.testing.assert_allclose(grad[EXPERTS], expected[EXPERTS], rtol=1e-9, atol=1e-15)
    assert (p * (1 - p))[CASE.mask].max() <= 0.25


def test_chords_is_has_the_gradient_of_the_probability():
    grad, p = gradient("chord", mu=1.0, phi="is"), np.exp(CASE.logp)
    n = (CASE.mask & EXPERTS[:, None]).sum()
    np.testing.assert_allclose(grad[EXPERTS], np.where(CASE.mask, -p / n, 0)[EXPERTS], rtol=1e-9, atol=1e-15)


# ---- hpt


def test_hpt_at_its_two_ends():
    loss, grad = nll(part(CASE, True))
    assert_same(evaluate("hpt", CASE, gate=99, sft_coef=0.3), (0.3 * loss, 0.3 * grad))
    for coef in (0.3, 2.0):
        assert_same(evaluate("hpt", CASE, gate=-1, sft_coef=coef), evaluate("hpt", CASE, gate=-1))
    assert not gradient("hpt", gate=-1)[EXPERTS].any()


def test_a_gate_moves_whole_prompts():
    reward = np.where(np.isin(CASE.group, CASE.group[:6]), 1.0, 0.0)
    grad = gradient("hpt", CASE.replace(reward=reward + 1e-3 * np.arange(len(reward))), success=0.9, L_const=1.0)
    solved = np.array([any((CASE.group == g) & ~EXPERTS & (reward > 0)) for g in CASE.group])
    assert not grad[solved & EXPERTS].any() and not grad[~solved & ~EXPERTS].any()
    assert grad[~solved & EXPERTS].any()


# ---- ahpo


def test_ahpo_at_its_ends():
    plain = evaluate("ahpo", CASE, static_coef=0.0)
    assert_same(evaluate("ahpo", CASE, r_hat=0), plain)
    assert_same(evaluate("ahpo", CASE, r_hat=99), evaluate("ahpo", CASE, static_coef=1.0))
    own = with_experts(CASES["unequal groups"], share=0.0)
    assert_same(evaluate("ahpo", own), evaluate("grpo", own, beta=0.0, agg="token_mean"))


# ---- dypo


def test_dypo_of_a_policy_at_its_reference_is_the_log_of_two():
    """For any data: the mean over prompts in the middle of ``log 2``."""
    case = with_experts(CASES["K=8"].replace(ref=CASES["K=8"].logp, reward=np.tile([0.0, 0.5], 12)), share=0.0)
    loss, _ = evaluate("dypo", case, alpha=0)
    assert loss == pytest.approx(math.log(2), rel=1e-12)


def test_dypo_of_solved_prompts_is_nothing_and_of_failed_ones_imitation():
    solved, failed = (CASE.replace(reward=np.full(len(CASE.reward), x)) for x in (1.0, 0.0))
    loss, grad = evaluate("dypo", solved)
    assert loss == 0 and not grad.any()
    grad = gradient("dypo", failed)
    assert not grad[~EXPERTS].any() and (grad[EXPERTS] <= 0).all() and grad[EXPERTS].any()


def test_one_pair_of_dypo():
    case = with_experts(CASES["K=2"], share=0.0)
    case = case.replace(count=(case.group == case.group[0]) * 1.0, reward=np.arange(len(case.reward)) * 0.01 + 0.1)
    first, second = np.flatnonzero(case.count)
    grad = gradient("dypo", case, alpha=0, beta_gal=0.7)
    S = [np.where(case.mask, case.logp - case.ref, 0).sum(1)[b] for b in (second, first)]
    w = 0.7 * (1 - 1 / (1 + math.exp(-0.7 * (S[0] - S[1]))))
    np.testing.assert_allclose(grad[second], -w * case.mask[second], rtol=1e-9)
    np.testing.assert_allclose(grad[first], w * case.mask[first], rtol=1e-9)
