"""The objectives of more answers than a pair keep the identities that their cards claim, in float64."""

from dataclasses import replace

import numpy as np
import pytest

from jaxpo.objectives import make
from tests.oracles.preference_cases import (
    GROUPS,
    LOG2,
    PAIRS,
    N,
    at_reference,
    batch_of,
    close,
    evaluate,
    loss,
    margin,
    same_gradient,
    slopes,
    some,
    with_extra,
)

SIX = batch_of("srpo")


def improver_at_reference(batch):
    context = np.char.find(batch.role, "given") >= 0
    return replace(batch, ref=np.where(context[:, None], batch.logp, batch.ref))


def test_srpo_joint_is_ipo_where_the_improver_is_its_reference():
    batch, beta = improver_at_reference(SIX), 0.3
    h = margin(batch)
    close(loss("srpo", batch, beta=beta, alpha=0.0), beta**2 / 4 * np.mean((h - 1 / beta) ** 2))


def test_srpo_improver_at_its_reference():
    close(loss("srpo", improver_at_reference(SIX), alpha=1.0), 0.25)


def test_srpo_is_0_at_its_solution():
    beta, batch = 0.3, at_reference(SIX)
    full = replace(batch, mask=np.ones_like(batch.mask), logp=np.nan_to_num(batch.logp, nan=-1.0))
    ahead = {"chosen_given_rejected": 1 / (2 * beta), "rejected_given_chosen": -1 / (2 * beta)}
    shift = np.array([ahead.get(str(r), 0.0) for r in full.role])[:, None] / full.mask.shape[1]
    solved = replace(full, ref=full.logp - shift)
    close(loss("srpo", solved, beta=beta, alpha=0.4), 0, atol=1e-20)


def test_seppo_where_the_policy_explains_the_anchor_is_dpo():
    lower = np.where((PAIRS.role == "chosen")[:, None], PAIRS.logp - 0.1, PAIRS.ref)
    same_gradient(("seppo", replace(PAIRS, ref=lower), {}), ("dpo", replace(PAIRS, ref=lower), {}))


def test_seppo_flipped_pushes_both_up():
    higher = np.where((PAIRS.role == "chosen")[:, None], PAIRS.logp + 0.1, PAIRS.ref)
    grad = slopes("seppo", replace(PAIRS, ref=higher)).reshape(-1, 2)
    both = some(PAIRS, "chosen") & some(PAIRS, "rejected")
    close(grad[both, 0], grad[both, 1])
    assert (grad[both] < 0).all()


def test_seppo_without_flip_is_dpo():
    close(loss("seppo", PAIRS, flip=False), loss("dpo", PAIRS))


THREE = batch_of("rationale_dpo")


def test_rationale_dpo_of_weight_0():
    close(loss("rationale_dpo", THREE, gamma=0.0), loss("rationale_dpo", THREE, gamma=0.0, term="nll") + LOG2)


def test_rationale_dpo_gradient_of_small_weight():
    gamma = 1e-9
    close(
        slopes("rationale_dpo", THREE, "rationale", gamma=gamma), -gamma / (2 * N) * some(THREE, "rationale"), rtol=1e-6
    )


def test_rationale_orpo_of_weight_0_is_orpo():
    pairs = np.arange(3 * N).reshape(-1, 3)[:, :2].reshape(-1)
    names = ("mask", "logp", "ref", "prev", "logp_old", "count", "group", "role")
    only = replace(THREE, **{n: getattr(THREE, n)[pairs] for n in names}, layout=("chosen", "rejected"))
    only = replace(only, extra={k: x[pairs] for k, x in THREE.extra.items()})
    close(loss("rationale_orpo", THREE, gamma=0.0), loss("orpo", only))


EDITED = batch_of("opa_dpo")


@pytest.mark.parametrize("granularity", ("sequence", "position"))
def test_opa_dpo_at_the_reference(granularity):
    full = replace(at_reference(EDITED), mask=np.ones_like(EDITED.mask))
    full = replace(full, **{n: np.full(full.mask.shape, -0.7) for n in ("logp", "ref")})
    value = loss("opa_dpo", full, c_g=0.7, c_v=0.6, c_ctx=0.5, c_a=0.8, granularity=granularity)
    close(value, (0.7 + 0.6 + 0.5 * (0.7 + 0.6) + 4 * 0.8) * LOG2)


def test_opa_dpo_of_truth_and_original_is_dpo():
    h = EDITED.D("truth") - EDITED.D("original")
    close(loss("opa_dpo", EDITED, c_v=0.0, c_ctx=0.0, c_a=0.0), np.mean(np.log1p(np.exp(-0.1 * h))))


def test_copg_gradient_is_leave_one_out():
    beta, grad = 0.3, slopes("copg", GROUPS, beta=0.3)
    d = GROUPS.sums(GROUPS.logp - GROUPS.ref)
    regularized = GROUPS.extra["reward"] - beta * d
    groups = set(GROUPS.group.tolist())
    for i in range(len(d)):
        others = (GROUPS.group == GROUPS.group[i]) & (np.arange(len(d)) != i)
        expected = -(regularized[i] - regularized[others].mean()) / len(groups) if others.any() else 0.0
        close(grad[i], expected * GROUPS.mask[i].any())


def test_copg_of_two_is_ipo():
    beta = 0.3
    scored = with_extra(PAIRS, reward=np.where(PAIRS.role == "chosen", 0.5, 0.0))
    single = replace(scored, layout=())
    close(
        evaluate("copg", single, beta=beta)[1]["logp"],
        beta / 2 * evaluate("ipo", PAIRS, tau=beta, normalize=False)[1]["logp"],
    )


def test_copg_is_still_at_the_tilted_reference():
    beta = 0.3
    tilt = np.where(GROUPS.mask.any(1), GROUPS.extra["reward"], 0) / beta
    share = tilt[:, None] / np.maximum(GROUPS.mask.sum(1), 1)[:, None]
    solved = with_extra(replace(GROUPS, ref=GROUPS.logp - share), reward=beta * tilt)
    close(evaluate("copg", solved, beta=beta)[1]["logp"], 0)


HYBRID = batch_of("hypo")


def test_hypo_without_kl_is_dpo():
    close(loss("hypo", HYBRID, lam=0.0), np.mean(np.log1p(np.exp(-0.1 * margin(HYBRID)))))


def test_hypo_gradient():
    drift = HYBRID.sums(HYBRID.logp - HYBRID.ref)
    own = HYBRID.role == "own"
    got = slopes("hypo", HYBRID, lam=0.4, rloo=False)[own]
    close(got, (0.4 * drift / own.sum() * HYBRID.mask.any(1))[own])


def test_hypo_of_one_sample_has_no_baseline():
    with pytest.raises(ValueError, match="rloo has no effect with k=1"):
        make("hypo", k=1, lam=0.4, rloo=False)


LEVELS = batch_of("mapl")


def test_mapl_of_equal_scores_and_gaps():
    s = {"chosen": 1.3, "rejected": 0.4, "matching": 0.7, "violating": 0.7, "multi_chosen": 2.0, "multi_rejected": 1.1}
    batch = with_extra(LEVELS, score=np.array([s[str(r)] for r in LEVELS.role]))
    close(loss("mapl", batch, ("score",)), np.log1p(np.exp(-0.9)) + 2 * LOG2)


def test_mapl_alone_is_bradley_terry_or_dpo():
    gap = LEVELS.x("score", "chosen") - LEVELS.x("score", "rejected")
    close(loss("mapl", LEVELS, ("score",), a=0.0, b=0.0), np.mean(np.log1p(np.exp(-gap))))
    h = 0.1 * margin(LEVELS)
    close(loss("mapl", LEVELS, a=0.0, b=0.0, form="dpo"), np.mean(np.log1p(np.exp(-h))))
