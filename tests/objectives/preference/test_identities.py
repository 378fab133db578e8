"""The objectives of pairs and of labelled answers keep the identities that their cards claim, in float64."""

from dataclasses import replace

import numpy as np
import pytest

from tests.oracles.preference_cases import (
    GROUPS,
    LOG2,
    PAIRS,
    SAME,
    N,
    at_reference,
    close,
    evaluate,
    loss,
    margin,
    same_gradient,
    slopes,
    some,
    swapped,
    with_extra,
)
from tests.oracles.units import Batch, sig

PAIR = ("chosen", "rejected")


@pytest.mark.parametrize("eps", (0.0, 0.3))
def test_dpo_at_the_reference_is_log_2(eps):
    close(loss("dpo", SAME, eps=eps), LOG2)


def test_dpo_gradient():
    z, eps = 0.1 * margin(PAIRS), 0.3
    slope = -0.1 * (sig(-z) - eps) / N
    close(slopes("dpo", PAIRS, "chosen", eps=eps), slope * some(PAIRS, "chosen"))
    close(slopes("dpo", PAIRS, "rejected", eps=eps), -slope * some(PAIRS, "rejected"))


def test_dpo_swapped_is_the_other_label():
    close(loss("dpo", swapped(PAIRS), eps=0.3), loss("dpo", PAIRS, eps=0.7))


def test_dpo_smoothing_adds_the_mean_margin():
    close(loss("dpo", PAIRS, eps=0.3) - loss("dpo", PAIRS, eps=0.0), 0.3 * np.mean(0.1 * margin(PAIRS)))


def test_ipo_is_0_at_its_target():
    target = np.where(PAIRS.role == "chosen", 1 / (2 * 0.1), 0)[:, None]
    full = replace(PAIRS, mask=np.ones_like(PAIRS.mask), logp=np.nan_to_num(PAIRS.logp, nan=-1.0))
    aimed = replace(full, ref=full.logp - target)  # every token, so that the mean over tokens is the target
    value, grads = evaluate("ipo", aimed)
    close(value, 0, atol=1e-20), close(grads["logp"], 0)


def test_ipo_gradient_at_the_reference():
    close(slopes("ipo", SAME, "chosen", tau=0.5, normalize=False), -1 / (0.5 * N) * some(SAME, "chosen"))


def test_ipo_over_both_orders_aims_at_the_soft_label():
    p, tau = 0.7, 0.5
    both = p * slopes("ipo", PAIRS, tau=tau, normalize=False)
    other = slopes("ipo", swapped(PAIRS), tau=tau, normalize=False).reshape(-1, 2)[:, ::-1].reshape(-1)
    expected = 2 * (margin(PAIRS) - (p - 0.5) / tau) / N
    close((both + (1 - p) * other)[PAIRS.rows("chosen")], expected * some(PAIRS, "chosen"))


def test_slic_hinge_without_violations_has_no_gradient():
    logp = np.where((PAIRS.role == "chosen")[:, None], -1.0, np.full_like(PAIRS.logp, -2.0))
    full = replace(PAIRS, mask=np.ones_like(PAIRS.mask), logp=logp)
    close(evaluate("slic_hinge", full, lam=0.0)[1]["logp"], 0)


def test_slic_hinge_regularizer():
    close(loss("slic_hinge", PAIRS, lam=0.3) - loss("slic_hinge", PAIRS, lam=0.0), -0.3 * PAIRS.S("chosen").mean())


def test_kto_at_the_reference():
    close(loss("kto", with_extra(at_reference(GROUPS), label=1), lam_D=1.6), 0.8)
    close(loss("kto", with_extra(at_reference(GROUPS), label=0), lam_U=0.6), 0.3)


def test_kto_anchor_is_never_negative_and_has_no_gradient():
    kl = GROUPS.role == "kl"
    below = replace(GROUPS, ref=np.where(kl[:, None], GROUPS.logp + 1, GROUPS.ref))
    without = replace(GROUPS, role=np.where(kl, "kl", GROUPS.role), ref=np.where(kl[:, None], GROUPS.logp, GROUPS.ref))
    close(loss("kto", below), loss("kto", without))
    assert not evaluate("kto", GROUPS)[1]["logp"][kl].any()


def test_kto_gradient():
    own = GROUPS.role != "kl"
    drift = GROUPS.sums(GROUPS.logp - GROUPS.ref)
    z0 = max(0, drift[~own].mean())
    s, good = sig(0.1 * (drift - z0)), GROUPS.extra["label"] > 0
    expected = np.where(good, -1.5, 0.5) * 0.1 * s * (1 - s) / own.sum() * own * GROUPS.mask.any(1)
    close(slopes("kto", GROUPS, lam_D=1.5, lam_U=0.5), expected)


def test_kto_of_one_kind_of_label_and_without_kl_rows():
    own = replace(with_extra(GROUPS, label=1), role=np.full(len(GROUPS.mask), "own"))
    drift = own.sums(own.logp - own.ref)
    close(loss("kto", own), np.mean(1 - sig(0.1 * drift)))


def averaged(batch: Batch) -> Batch:
    """Every token of a row its average: equal averages need no more than equal rows."""
    return replace(batch, mask=np.ones_like(batch.mask), logp=np.full(batch.mask.shape, -0.7))


def test_orpo_of_equal_averages():
    even = averaged(PAIRS)
    close(loss("orpo", even, lam=0.3), 0.7 + 0.3 * LOG2)


def test_orpo_without_odds_is_sft():
    chosen = PAIRS.rows("chosen")
    close(loss("orpo", PAIRS, lam=0.0), PAIRS.token_mean(-PAIRS.logp, chosen))


def test_orpo_is_a_ratio_of_odds():
    kept = some(PAIRS, "chosen") & some(PAIRS, "rejected")
    w, l = (np.exp(PAIRS.S(r) / PAIRS.n(r))[kept] for r in PAIR)  # noqa: E741
    only = replace(PAIRS, count=np.repeat(kept, 2).astype(float))
    ratio = np.log(1 + l / (1 - l) / (w / (1 - w)))
    close(loss("orpo", only, lam=1.0) - loss("orpo", only, lam=0.0), ratio.mean())


def test_simpo_of_single_tokens_is_cpo():
    single = replace(
        PAIRS, mask=np.broadcast_to(np.arange(5) == 0, PAIRS.mask.shape), logp=np.nan_to_num(PAIRS.logp, nan=-1.0)
    )
    close(loss("simpo", single, beta=0.3, gamma=0.0), loss("cpo", single, beta=0.3, alpha=0.0))


def test_simpo_of_equal_averages():
    close(loss("simpo", averaged(PAIRS), gamma=0.8), np.log(1 + np.exp(0.8)))


def test_cpo_without_nll_is_reference_free_dpo():
    close(loss("cpo", PAIRS, alpha=0.0, eps=0.2), loss("dpo", PAIRS, eps=0.2, reference_free=True))


def test_cpo_adds_the_token_mean():
    nll = PAIRS.token_mean(-PAIRS.logp, PAIRS.rows("chosen"))
    close(loss("cpo", PAIRS, alpha=0.7) - loss("cpo", PAIRS, alpha=0.0), 0.7 * nll)


def test_sppo_half():
    close(loss("sppo", PAIRS, beta=0.1, half=False), 2 * loss("sppo", PAIRS, beta=0.1))


def test_sppo_gradient_at_the_reference():
    for role, sign in zip(PAIR, (-1, 1), strict=True):
        close(slopes("sppo", SAME, role, beta=0.1, hard=True), sign / (2 * 0.1 * N) * some(SAME, role))


def test_sppo_is_gpo_of_centered_win_rates():
    scored = with_extra(replace(PAIRS, prev=PAIRS.ref), pref_score=PAIRS.extra["win"] - 0.5)
    close(loss("sppo", PAIRS, beta=0.1), loss("gpo", scored, beta=0.1))


def test_rso_with_sigmoid_norm_is_dpo():
    close(loss("rso", PAIRS, gamma=0.3), loss("dpo", PAIRS, beta=0.3))


def test_rso_with_hinge_norm_is_a_multiple_of_slic_hinge():
    bare = replace(PAIRS, ref=0 * PAIRS.ref)
    close(loss("rso", bare, gamma=0.4, form="hinge-norm"), 0.4 * loss("slic_hinge", PAIRS, delta=1 / 0.4, lam=0.0))


def test_rdpo_without_flips_is_dpo():
    same_gradient(("rdpo", PAIRS, dict(eps=0.0)), ("dpo", PAIRS, {}))


def test_rdpo_is_unbiased():
    eps = 0.3
    each = [replace(PAIRS, count=np.repeat(np.arange(N) == i, 2).astype(float)) for i in range(N)]
    for pair in each:
        flips = (1 - eps) * loss("rdpo", pair, eps=eps) + eps * loss("rdpo", swapped(pair), eps=eps)
        close(flips, loss("dpo", pair))


def test_rdpo_gradient():
    z, eps = 0.1 * margin(PAIRS), 0.3
    weight = ((1 - eps) * sig(-z) + eps * sig(z)) / (1 - 2 * eps)
    assert (weight > 0).all()
    close(slopes("rdpo", PAIRS, "chosen", eps=eps), -0.1 * weight / N * some(PAIRS, "chosen"))


def test_rdpo_minus_dpo():
    eps = 0.3
    close(loss("rdpo", PAIRS, eps=eps) - loss("dpo", PAIRS), -eps / (1 - 2 * eps) * np.mean(0.1 * margin(PAIRS)))


def test_rpo_without_nll_is_dpo():
    close(loss("rpo", PAIRS, beta=0.1, eta=0.0), loss("dpo", PAIRS))


def test_rpo_gradient():
    extra = slopes("rpo", PAIRS, "chosen", beta=0.1, eta=0.3) - slopes("dpo", PAIRS, "chosen")
    close(extra, -0.3 * 0.1 / N * some(PAIRS, "chosen"))


def test_dpa_logic_of_cpo_and_dpo():
    close(loss("dpa_logic", PAIRS, length_norm=False, beta=0.1), loss("cpo", PAIRS, alpha=0.0), rtol=1e-7)
    nonempty = replace(PAIRS, count=np.repeat(some(PAIRS, "chosen") & some(PAIRS, "rejected"), 2).astype(float))
    nonempty = replace(nonempty, ref=-np.abs(nonempty.ref))  # the log-probs of a policy
    close(loss("dpa_logic", nonempty, length_norm=False, beta=0.1, use_ref=True), loss("dpo", nonempty), rtol=1e-7)


def test_dpa_logic_of_orpo():
    close(loss("dpa_logic", PAIRS, program="orpo"), loss("orpo", PAIRS, lam=1.0) - loss("orpo", PAIRS, lam=0.0))


@pytest.mark.parametrize("program", ("ce", "ceunl", "uncpo", "funl"))
def test_dpa_logic_at_beta_1(program):
    kept = some(PAIRS, "chosen") & some(PAIRS, "rejected")
    only = replace(PAIRS, count=np.repeat(kept, 2).astype(float))
    w, l = (np.exp(PAIRS.S(r) / PAIRS.n(r))[kept] for r in PAIR)  # noqa: E741
    expected = {
        "ce": -np.log(w),
        "ceunl": -(np.log(w) + np.log(1 - l)),
        "uncpo": -np.log(1 - (1 - w) * l),
        "funl": -np.log(1 - l),
    }[program]
    close(loss("dpa_logic", only, program=program), expected.mean())
    assert 0 < np.exp(-loss("dpa_logic", only, program=program)) < 1  # the sets part the worlds: a probability


@pytest.mark.parametrize("gap", (-1.0, 1e9))
def test_mpo_mixed_of_all_pairs_or_none(gap):
    close(loss("mpo_mixed", PAIRS, gap=gap), loss("dpo", PAIRS) if gap < 0 else 0)


def test_mpo_mixed_easy_and_hard_pairs_part_the_data():
    rm = PAIRS.extra["rm"].reshape(-1, 2)
    easy = np.abs(rm[:, 0] - rm[:, 1]) > 0.8
    assert 0 < easy.sum() < N
    hard = replace(PAIRS, count=np.repeat(~easy, 2).astype(float))
    total = easy.mean() * loss("mpo_mixed", PAIRS, gap=0.8) + (~easy).mean() * loss("dpo", hard)
    close(total, loss("dpo", PAIRS))
