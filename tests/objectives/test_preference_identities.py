"""The identities that the preference cards claim, one by one, in float64."""

from dataclasses import replace

import numpy as np
import pytest

import jaxpo
from tests.oracles.preference_cases import evaluate, make_batch, rollouts
from tests.oracles.units import Batch, sig

PAIR = ("chosen", "rejected")
LOG2 = np.log(2)
N = 8


def batch_of(name: str, seed: int = 5, **settings) -> Batch:
    return make_batch(jaxpo.make(name, **settings).layout, seed)


def loss(name: str, batch: Batch, into=("logp",), **settings) -> float:
    return evaluate(name, batch, into, **settings)[0]


def slopes(name: str, batch: Batch, role: str | None = None, **settings) -> np.ndarray:
    """The gradient in the log-prob of whole answers: that of any of their tokens, which is the same (0 of an empty
    answer)."""
    grad = evaluate(name, batch, **settings)[1]["logp"]
    low, high = (f(np.where(batch.mask, grad, g), 1) for f, g in ((np.min, np.inf), (np.max, -np.inf)))
    some = batch.mask.any(1)
    np.testing.assert_allclose(low[some], high[some], rtol=1e-12, atol=1e-15)
    out = np.where(some, high, 0)
    return out if role is None else out[batch.rows(role)]


def at_reference(batch: Batch) -> Batch:
    return replace(batch, ref=batch.logp, prev=batch.logp, logp_old=batch.logp)


def swapped(batch: Batch) -> Batch:
    """The answers of every pair the other way round."""
    order = np.arange(len(batch.mask)).reshape(-1, 2)[:, ::-1].reshape(-1)
    names = ("mask", "logp", "ref", "prev", "logp_old")
    return replace(
        batch, **{n: getattr(batch, n)[order] for n in names}, extra={k: x[order] for k, x in batch.extra.items()}
    )


def with_extra(batch: Batch, **extra) -> Batch:
    b = len(batch.mask)
    return replace(
        batch, extra={**batch.extra, **{k: np.broadcast_to(np.asarray(x, float), b) for k, x in extra.items()}}
    )


def some(batch: Batch, role: str) -> np.ndarray:
    """[N] which answers are not empty."""
    return batch.mask.any(1)[batch.rows(role)]


def margin(batch: Batch) -> np.ndarray:
    return batch.D("chosen") - batch.D("rejected")


PAIRS = make_batch(PAIR, 5)
SAME = at_reference(PAIRS)


def close(a, b, **tolerance):
    np.testing.assert_allclose(a, b, **{"rtol": 1e-9, "atol": 1e-12, **tolerance})


def same_gradient(one, other, factor: float = 1.0):
    """Of two (name, batch, settings): the first is ``factor`` times the second."""
    a, b = (evaluate(name, batch, **settings)[1]["logp"] for name, batch, settings in (one, other))
    close(a, factor * b)


# ---- dpo and its relatives ----------------------------------------------------------------------------------------


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


def test_slic_without_violations_has_no_gradient():
    full = replace(PAIRS, mask=np.ones_like(PAIRS.mask), logp=np.where((PAIRS.role == "chosen")[:, None], -1.0, -2.0))
    close(evaluate("slic_hinge", full, lam=0.0)[1]["logp"], 0)


def test_slic_regularizer():
    close(loss("slic_hinge", PAIRS, lam=0.3) - loss("slic_hinge", PAIRS, lam=0.0), -0.3 * PAIRS.S("chosen").mean())


def test_hinge_norm_is_a_multiple_of_slic():
    bare = replace(PAIRS, ref=0 * PAIRS.ref)
    close(loss("rso", bare, gamma=0.4, form="hinge-norm"), 0.4 * loss("slic_hinge", PAIRS, delta=1 / 0.4, lam=0.0))


LABELS = make_batch((), 5)


def test_kto_at_the_reference():
    close(loss("kto", with_extra(at_reference(LABELS), label=1), lam_D=1.6), 0.8)
    close(loss("kto", with_extra(at_reference(LABELS), label=0), lam_U=0.6), 0.3)


def test_kto_anchor_is_never_negative_and_has_no_gradient():
    kl = LABELS.role == "kl"
    below = replace(LABELS, ref=np.where(kl[:, None], LABELS.logp + 1, LABELS.ref))
    without = replace(LABELS, role=np.where(kl, "kl", LABELS.role), ref=np.where(kl[:, None], LABELS.logp, LABELS.ref))
    close(loss("kto", below), loss("kto", without))
    assert not evaluate("kto", LABELS)[1]["logp"][kl].any()


def test_kto_gradient():
    own = LABELS.role != "kl"
    drift = LABELS.sums(LABELS.logp - LABELS.ref)
    z0 = max(0, drift[~own].mean())
    s, good = sig(0.1 * (drift - z0)), LABELS.extra["label"] > 0
    expected = np.where(good, -1.5, 0.5) * 0.1 * s * (1 - s) / own.sum() * own * LABELS.mask.any(1)
    close(slopes("kto", LABELS, lam_D=1.5, lam_U=0.5), expected)


def test_kto_of_one_kind_of_label_and_without_kl_rows():
    own = replace(with_extra(LABELS, label=1), role=np.full(len(LABELS.mask), "own"))
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


def test_sigmoid_norm_is_dpo():
    close(loss("rso", PAIRS, gamma=0.3), loss("dpo", PAIRS, beta=0.3))


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


@pytest.mark.parametrize("nll", ("seq_sum", "token_mean"))
def test_rpo_without_nll_is_dpo(nll):
    close(loss("rpo", PAIRS, beta=0.1, eta=0.0, nll=nll), loss("dpo", PAIRS))


def test_rpo_gradient():
    extra = slopes("rpo", PAIRS, "chosen", beta=0.1, eta=0.3) - slopes("dpo", PAIRS, "chosen")
    close(extra, -0.3 * 0.1 / N * some(PAIRS, "chosen"))


def test_logic_of_cpo_and_dpo():
    close(loss("dpa_logic", PAIRS, length_norm=False, beta=0.1), loss("cpo", PAIRS, alpha=0.0), rtol=1e-7)
    nonempty = replace(PAIRS, count=np.repeat(some(PAIRS, "chosen") & some(PAIRS, "rejected"), 2).astype(float))
    nonempty = replace(nonempty, ref=-np.abs(nonempty.ref))  # the log-probs of a policy
    close(loss("dpa_logic", nonempty, length_norm=False, beta=0.1, use_ref=True), loss("dpo", nonempty), rtol=1e-7)


def test_logic_of_orpo():
    close(loss("dpa_logic", PAIRS, program="orpo"), loss("orpo", PAIRS, lam=1.0) - loss("orpo", PAIRS, lam=0.0))


@pytest.mark.parametrize("program", ("ce", "ceunl", "uncpo", "funl"))
def test_logic_at_beta_1(program):
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
def test_mpo_of_all_pairs_or_none(gap):
    close(loss("mpo_mixed", PAIRS, gap=gap), loss("dpo", PAIRS) if gap < 0 else 0)


def test_easy_and_hard_pairs_part_the_data():
    rm = PAIRS.extra["rm"].reshape(-1, 2)
    easy = np.abs(rm[:, 0] - rm[:, 1]) > 0.8
    assert 0 < easy.sum() < N
    hard = replace(PAIRS, count=np.repeat(~easy, 2).astype(float))
    total = easy.mean() * loss("mpo_mixed", PAIRS, gap=0.8) + (~easy).mean() * loss("dpo", hard)
    close(total, loss("dpo", PAIRS))


@pytest.mark.parametrize(("name", "field"), [("sppo", "win"), ("online_ipo", "pref_prob"), ("kto", "label")])
@pytest.mark.parametrize("value", (1.2, np.nan))
def test_labels_are_probabilities(name, field, value):
    batch = with_extra(batch_of(name), **{field: value})
    with pytest.raises(
        ValueError, match=rf"a {field} of {value:g} is outside \[0, 1\], it is a probability or a label"
    ):
        jaxpo.make(name).prepare(rollouts(batch), jaxpo.make(name).init())


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dpo", dict(eps=1.2), r"eps is a share of wrong labels in \[0, 1\), not 1.2"),
        ("rdpo", dict(eps=0.5), r"eps is a share of wrong labels in \[0, 0.5\), not 0.5"),
        ("ipo", dict(tau=0.0), "tau must be a positive number, not 0.0"),
        ("slic_hinge", dict(lam=0.0, target="expert"), "target has no effect here"),
        ("rso", dict(form="hinge-nrom"), "form must be one of sigmoid-norm, hinge-norm, hinge, not 'hinge-nrom'"),
        ("dpa_logic", dict(program="TT / "), "unknown program 'TT / '"),
        ("dpa_logic", dict(program="TT / TX"), "unknown program 'TT / TX'"),
        ("inpo", dict(eta=0.1, tau=0.2), "tau must be at most eta = 0.1, not 0.2"),
        ("dno", dict(variant="prct", scale=2.0), "scale has no effect here"),
        ("mapl", dict(beta=0.3), "beta has no effect here; it belongs to form='dpo'"),
        ("themis", dict(alpha=0.5), "alpha has no effect here; it belongs to form='paper'"),
        ("themis", dict(form="paper", rationale=False), "rationale has no effect here"),
        ("hypo", dict(k=0), "k, the fresh samples of a prompt, must be a whole number of at least 1, not 0"),
        ("opa_dpo", dict(c_a=0.0, rev_anchor_sign=-1), "rev_anchor_sign has no effect here; it belongs to the anchors"),
        ("opa_dpo", dict(rev_anchor_sign=0), "rev_anchor_sign must be 1 or -1, not 0"),
    ],
)
def test_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        jaxpo.make(name, **settings)
