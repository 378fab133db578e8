"""`spo_single_stream` and `spo_segment` keep the identities that their cards claim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpo
from jaxpo.primitives.token_advantages import cutpoints, segment_advantage
from tests.oracles import Case
from tests.oracles.cases import CASES, ROWS, assert_same, evaluate, prepared, rollouts

CASE = CASES["unequal groups"].replace(reward=CASES["unequal groups"].correct)


# ---- spo_single_stream (its tracker: tests/primitives/test_trackers.py) --------------------------


def test_spo_single_stream_advantages_do_not_depend_on_a_constant_added_to_all_values():
    extra = {**CASE.extra, "tracker_value": CASE.extra["tracker_value"] + 0.3}
    before = prepared("spo_single_stream", CASE).adv
    assert before.std() > 0.9
    np.testing.assert_allclose(prepared("spo_single_stream", CASE.replace(extra=extra)).adv, before, atol=1e-9)


def test_spo_single_stream_advantages_have_mean_0_and_sample_variance_1_and_the_order_of_reward_less_value():
    adv = prepared("spo_single_stream", CASE).adv
    np.testing.assert_allclose([adv.mean(), adv.var(ddof=1)], [0, 1], atol=1e-6)
    np.testing.assert_array_equal(np.argsort(adv), np.argsort(CASE.reward - CASE.extra["tracker_value"]))


def test_spo_single_stream_learns_nothing_from_a_batch_that_is_as_good_as_expected():
    extra = {**CASE.extra, "tracker_value": np.full(ROWS, 0.3)}
    loss, grad = evaluate("spo_single_stream", CASE.replace(reward=np.full(ROWS, 0.5), extra=extra))
    assert loss == 0 and (grad == 0).all()


@pytest.mark.parametrize("reward", (-1.0, 2.0))
def test_spo_single_stream_refuses_rewards_outside_0_and_1(reward):
    batch = rollouts(CASE.replace(reward=np.full(ROWS, reward)))
    objective = jaxpo.make("spo_single_stream")
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        objective.prepare(batch, objective.init())


# ---- spo_segment ---------------------------------------------------------------------------------


@jax.jit
def raw(reward, mc_value, logp_old, mask):
    """Raw segment advantages and cutpoints, at every other token of probability below 0.6."""
    options = dict(interval=2, threshold=0.6)
    return (segment_advantage(reward, mc_value, logp_old, mask, **options), cutpoints(logp_old, mask, **options))


def segments(case: Case) -> tuple[np.ndarray, np.ndarray]:
    with jax.enable_x64(True):
        out = raw(*[jnp.asarray(x) for x in (case.reward, case.extra["mc_value"], case.logp_old, case.mask)])
        return np.asarray(out[0]), np.asarray(out[1])


def test_spo_segment_advantages_telescope_to_the_reward_less_the_value_at_the_first_cutpoint():
    adv, cuts = segments(CASE)
    several = cuts.sum(1) > 1
    assert several.sum() > 5
    first = np.argmax(cuts, 1)
    expected = CASE.reward - CASE.extra["mc_value"][np.arange(ROWS), first]
    np.testing.assert_allclose((adv * cuts).sum(1)[cuts.any(1)], expected[cuts.any(1)], atol=1e-12)


def test_spo_segment_tokens_of_a_segment_share_its_advantage_and_those_before_the_first_cutpoint_have_none():
    adv, cuts = segments(CASE)
    sure = np.exp(np.nan_to_num(CASE.logp_old)) > 0.6
    before = np.cumsum(cuts, 1) == 0
    assert (adv[before | sure | ~CASE.mask] == 0).all()
    segment = np.cumsum(cuts, 1)
    for b in range(ROWS):
        for s in range(1, segment[b].max() + 1):
            values = adv[b][(segment[b] == s) & CASE.mask[b] & ~sure[b]]
            assert len(set(values)) == 1


def test_spo_segment_cutpoints_are_every_interval_th_improbable_token():
    _, cuts = segments(CASE)
    for b in range(ROWS):
        low = [t for t in range(CASE.mask.shape[1]) if CASE.mask[b, t] and np.exp(CASE.logp_old[b, t]) < 0.6]
        assert np.flatnonzero(cuts[b]).tolist() == low[::2]


def test_spo_segment_sure_tokens_have_no_gradient_and_leave_the_denominator():
    options = dict(interval=2, threshold=0.6)
    sure = CASE.mask & (np.exp(np.nan_to_num(CASE.logp_old)) > 0.6)
    assert sure.sum() > 5
    _, grad = evaluate("spo_segment", CASE, **options)
    assert (grad[sure] == 0).all() and (grad[CASE.mask & ~sure] != 0).any()
    without = CASE.replace(mask=CASE.mask & ~sure)
    assert_same(evaluate("spo_segment", CASE, **options), evaluate("spo_segment", without, **options))


def test_spo_segment_of_a_tree_of_depth_1_is_the_whitened_group_reward():
    """The edges of one level are whole answers; with every token counted as improbable this is REINFORCE++-baseline."""
    centred = np.array([r - CASE.reward[CASE.group == g].mean() for r, g in zip(CASE.reward, CASE.group, strict=True)])
    tree = CASE.replace(extra={**CASE.extra, "edge_adv": centred})
    plain = evaluate("reinforce_pp", CASE, variant="baseline", kl_coef=0.0, log_ratio_clip=10.0)
    assert np.abs(plain[1]).max() > 0.001
    assert_same(evaluate("spo_segment", tree, form="tree", threshold=1.1), plain)


@pytest.mark.parametrize("p", (0.95, 1.0))
def test_spo_segment_of_answers_without_an_improbable_token_is_exactly_zero(p):
    sure = CASE.replace(logp_old=np.where(CASE.mask, np.log(p), np.nan))
    assert (prepared("spo_segment", sure).adv == 0).all()
    loss, grad = evaluate("spo_segment", sure)
    assert loss == 0 and (grad == 0).all()
