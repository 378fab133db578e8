"""The identities of the objectives that learn from the policy's own successes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.primitives.imitation import flaw_detection_reward
from tests.objectives.successes.test_oracle import BINARY
from tests.oracles.cases import CASES, assert_same, evaluate, on_policy
from tests.oracles.groups import grouped

CASE = on_policy(BINARY["unequal groups"])


def rates(case):
    out = np.zeros(len(case.reward))
    for rows in grouped(case).values():
        out[rows] = np.mean([case.reward[b] for b in rows])
    return out


# ---- rft


def test_rft_of_failures_is_nothing_and_of_successes_sft():
    case = BINARY["unequal groups"]
    loss, grad = evaluate("rft", case.replace(reward=np.zeros(len(case.reward))))
    assert loss == 0 and not grad.any()
    assert_same(evaluate("rft", case.replace(reward=np.ones(len(case.reward)))), evaluate("sft", case))


def test_rfts_gradient():
    kept = CASE.mask & (CASE.reward >= 1)[:, None]
    np.testing.assert_allclose(evaluate("rft", CASE)[1], -1.0 * kept / kept.sum(), atol=1e-15)


def test_rft_is_nft_without_its_negatives():
    """On policy, on prompts with both outcomes, with the same constant."""
    q = rates(CASE)
    case = CASE.replace(count=((q > 0) & (q < 1)) * 1.0)
    rft = evaluate("rft", case, agg="sum_const", L_const=1000.0)[1]
    np.testing.assert_allclose(evaluate("nft", case, neg_weight=0, normalize=0)[1], rft, rtol=1e-9, atol=1e-15)


# ---- nft


@pytest.mark.parametrize("normalize", (1, 2))
def test_nft_on_policy_is_a_policy_gradient(normalize):
    q = np.clip(rates(CASE), 0.02, 0.98)
    mixed = (rates(CASE) > 0) & (rates(CASE) < 1)
    A = (CASE.reward - q) / (1 if normalize == 1 else np.sqrt(q * (1 - q)))
    expected = np.where(CASE.mask, -A[:, None] / 1000, 0) * mixed[:, None]
    np.testing.assert_allclose(evaluate("nft", CASE, normalize=normalize)[1], expected, rtol=1e-9, atol=1e-15)


def test_the_negative_loss_of_nft_has_no_value_on_policy_and_yet_a_gradient():
    failed = CASE.replace(count=np.ones(len(CASE.reward)))
    loss, grad = evaluate("nft", failed)
    q = rates(CASE)
    wrong = (CASE.reward == 0) & (q > 0)
    assert loss == pytest.approx(0, abs=1e-15)  # -log 1 of both kinds
    expected = np.where(CASE.mask, q[:, None] / 1000, 0)
    np.testing.assert_allclose(grad[wrong], expected[wrong], rtol=1e-9)


# ---- fapo


def test_fapo_without_flaws_is_grpo_on_plus_and_minus_1():
    case = CASES["unequal groups"]
    signs = case.replace(reward=np.where(case.correct == 1, 1.0, -1.0))
    plain = evaluate("grpo", signs, beta=0.0, agg="token_mean", eps_low=0.2, eps_high=0.28)
    sound = case.replace(extra={**case.extra, "flawed": np.zeros(len(case.reward))})
    assert_same(evaluate("fapo", sound, penalty=0), plain)
    assert_same(evaluate("fapo", case, lam=0, penalty=0), plain)


def test_a_flawed_success_is_worth_something_while_sound_ones_are_rare():
    """With lam 1 its centred advantage is positive while the sound ones are fewer than the failures."""
    base = CASES["K=8"]
    for sound, failed in ((1, 4), (3, 3), (4, 1)):
        flawed = 8 - sound - failed
        kinds = np.array([2] * sound + [0] * failed + [1] * flawed)
        rows = np.flatnonzero(base.group == base.group[0])
        correct, flaw = np.zeros(24), np.zeros(24)
        correct[rows], flaw[rows] = kinds > 0, kinds == 1
        case = on_policy(base.replace(correct=correct, count=(base.group == base.group[0]) * 1.0))
        grad = evaluate("fapo", case.replace(extra={**case.extra, "flawed": flaw}), penalty=0)[1]
        one = next(b for b in rows if flaw[b] and case.mask[b].any())
        assert np.sign(-grad[one][case.mask[one]][0]) == np.sign(failed - sound)


def test_what_the_flaw_finder_earns():
    verdict, truth = jnp.array([1, 1, 0, 0, 1]), jnp.array([1, 0, 0, 1, 1])
    step, true_step, steps = jnp.array([2, 0, -1, -1, 9]), jnp.array([4, -1, -1, 3, 3]), jnp.full(5, 5)
    got = np.asarray(flaw_detection_reward(verdict, truth, step, true_step, steps))
    np.testing.assert_allclose(got, [1 - 2 / 5, -1, 1, -1, -1], rtol=1e-6)


# ---- policy_cliff


def test_the_bound_of_the_policy_cliff():
    """Soft-optimal policies of two rewards differ by at most ``||R1 - R2||_inf / (2 alpha)`` in total variation."""
    rng = np.random.default_rng(0)
    for alpha in (0.05, 0.3, 1.0):
        one = rng.normal(size=(500, 6))
        other = one + rng.uniform(-0.1, 0.1, one.shape)
        p, q = (np.asarray(jax.nn.softmax(jnp.asarray(r / alpha), -1)) for r in (one, other))
        tv, gap = 0.5 * np.abs(p - q).sum(-1), np.abs(one - other).max(-1)
        assert (tv <= gap / (2 * alpha) + 1e-6).all()
    near = np.array([[1.0, 1.0 + 1e-6, 0.0], [1.0 + 1e-6, 1.0, 0.0]])
    assert np.exp(near / 1e-9 - (near / 1e-9).max(-1, keepdims=True)).argmax(-1).tolist() == [1, 0]


def test_one_hot_weights_and_no_entropy_are_reinforce():
    case = CASES["unequal groups"]
    n = len(case.reward)
    one_hot = case.replace(extra={**case.extra, "reward_weights": np.tile([0.0, 1.0, 0.0], (n, 1))})
    alone = case.replace(reward=case.extra["rewards_multi"][:, 1])
    grpo = evaluate(
        "upge", alone.replace(logp_old=alone.logp, extra={**alone.extra, "role": np.zeros(n)}), method="grpo"
    )
    np.testing.assert_allclose(evaluate("policy_cliff", one_hot, alpha=0)[1], grpo[1], rtol=1e-9, atol=1e-15)
