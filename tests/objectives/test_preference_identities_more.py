"""The identities of the cards with more than a pair, of Nash learning and of reward models, one by one, in float64."""

from dataclasses import replace

import numpy as np
import pytest

from tests.objectives.test_preference_identities import (
    LOG2,
    PAIRS,
    SAME,
    N,
    at_reference,
    batch_of,
    close,
    loss,
    margin,
    same_gradient,
    slopes,
    some,
    swapped,
    with_extra,
)
from tests.oracles.preference_cases import evaluate, make_batch

# ---- srpo, seppo, rationales, opa, copg, hypo, mapl ---------------------------------------------------------------

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


def test_rationale_of_weight_0():
    close(loss("rationale_dpo", THREE, gamma=0.0), loss("rationale_dpo", THREE, gamma=0.0, term="nll") + LOG2)


def test_rationale_gradient_of_small_weight():
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
def test_opa_at_the_reference(granularity):
    full = replace(at_reference(EDITED), mask=np.ones_like(EDITED.mask))
    full = replace(full, **{n: np.full(full.mask.shape, -0.7) for n in ("logp", "ref")})
    value = loss("opa_dpo", full, c_g=0.7, c_v=0.6, c_ctx=0.5, c_a=0.8, granularity=granularity)
    close(value, (0.7 + 0.6 + 0.5 * (0.7 + 0.6) + 4 * 0.8) * LOG2)


def test_opa_of_truth_and_original_is_dpo():
    h = EDITED.D("truth") - EDITED.D("original")
    close(loss("opa_dpo", EDITED, c_v=0.0, c_ctx=0.0, c_a=0.0), np.mean(np.log1p(np.exp(-0.1 * h))))


GROUPS = make_batch((), 5)


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
    batch = batch_of("hypo", k=1)
    close(loss("hypo", batch, k=1, lam=0.4), loss("hypo", batch, k=1, lam=0.4, rloo=False))


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


# ---- Nash learning ------------------------------------------------------------------------------------------------


def test_online_ipo_is_a_regression_to_the_soft_label():
    p, tau = PAIRS.x("pref_prob"), 0.4
    constant = np.mean((1 - (2 * p - 1) ** 2) / (4 * tau**2))
    close(loss("online_ipo", PAIRS, tau=tau), np.mean((margin(PAIRS) - (p - 0.5) / tau) ** 2) + constant)


def test_online_ipo_expanded_is_tau_times_square():
    same_gradient(("online_ipo", PAIRS, dict(tau=0.4, form="expanded")), ("online_ipo", PAIRS, dict(tau=0.4)), 0.4)


def test_online_ipo_of_sure_labels_is_ipo():
    sure = with_extra(PAIRS, pref_prob=1.0)
    close(loss("online_ipo", sure, tau=0.4), loss("ipo", PAIRS, tau=0.4, normalize=False))


def test_ipo_md_has_the_loss_of_online_ipo():
    close(loss("ipo_md", PAIRS, tau=0.4), loss("online_ipo", PAIRS, tau=0.4, form="expanded"))


def test_online_ipo_is_the_self_play_policy_gradient():
    """All pairs of 4 one-token answers, weighed by their probability under pi: the gradient in the logits."""
    rng, tau = np.random.default_rng(0), 0.7
    theta, ref = rng.normal(size=(2, 4))
    pi, log_ref = np.exp(theta) / np.exp(theta).sum(), ref - np.log(np.exp(ref).sum())
    P = 0.5 + (lambda x: (x - x.T) / 4)(rng.random((4, 4)))  # noqa: N806
    log_pi, jacobian = np.log(pi), np.eye(4) - pi  # d log pi_y / d theta
    pairs = [(i, j) for i in range(4) for j in range(4)]
    weight = np.array([pi[i] * pi[j] for i, j in pairs])

    def table(rows):
        base = make_batch(("chosen", "rejected") if len(rows) == 32 else (), 0)
        mask = np.ones((len(rows), 1), bool)
        column = lambda x: x[np.array(rows)][:, None]  # noqa: E731
        return replace(
            base,
            mask=mask,
            logp=column(log_pi),
            ref=column(log_ref),
            prev=column(log_ref),
            logp_old=column(log_pi),
            count=np.ones(len(rows)),
            group=np.arange(len(rows)),
            role=np.resize(base.role[:2], len(rows)),
        )

    batch = table([y for pair in pairs for y in pair])
    batch = replace(batch, extra={"pref_prob": np.repeat([P[i, j] for i, j in pairs], 2), "reward": np.zeros(32)})
    each = slopes("online_ipo", batch, tau=tau).reshape(-1, 2) * len(pairs)
    square = sum(
        w * (g[0] * jacobian[i] + g[1] * jacobian[j]) for w, g, (i, j) in zip(weight, each, pairs, strict=True)
    )
    own = table([i for i, _ in pairs])
    own = replace(own, extra={"pref_opp": np.array([P[i, j] for i, j in pairs]), "reward": np.zeros(16)})
    grad = slopes("nash_md", own, tau=tau) * len(pairs)
    self_play = sum(w * g * jacobian[i] for w, g, (i, _) in zip(weight, grad, pairs, strict=True))
    close(square, 4 / tau * self_play)


def test_nash_md_gradient():
    tau, drift = 0.3, GROUPS.sums(GROUPS.logp - GROUPS.ref)
    expected = -(GROUPS.extra["pref_opp"] - 0.5 - tau * drift) / len(drift)
    close(slopes("nash_md", GROUPS, tau=tau), expected * GROUPS.mask.any(1))


def test_nash_md_of_single_tokens():
    single = replace(
        GROUPS, mask=np.broadcast_to(np.arange(5) == 0, GROUPS.mask.shape), logp=np.nan_to_num(GROUPS.logp, nan=-1.0)
    )
    single = replace(single, ref=np.nan_to_num(GROUPS.ref, nan=-2.0))
    same_gradient(("nash_md", single, dict(kl="token")), ("nash_md", single, {}))


def test_nash_ema_has_the_loss_of_nash_md():
    close(loss("nash_ema", GROUPS, tau=0.2), loss("nash_md", GROUPS, tau=0.2))


def test_nash_mp_without_center_is_nash_md():
    close(evaluate("nash_mp", GROUPS, beta=0.3, eta=1e15)[1]["logp"], evaluate("nash_md", GROUPS, tau=0.3)[1]["logp"])


def test_egpo_of_a_pair_against_itself_is_online_ipo():
    p = np.repeat(PAIRS.x("pref_prob"), 2)
    batch = with_extra(PAIRS, win=np.where(PAIRS.role == "chosen", p, 0.5))
    same_gradient(("egpo", batch, dict(beta=0.4, normalize=False)), ("online_ipo", batch, dict(tau=0.4)))


@pytest.mark.parametrize(
    ("batch", "tau", "prev_is_ref"),
    [(replace(PAIRS, prev=PAIRS.ref), 0.1, True), (PAIRS, 0.3, False)],
    ids=("first iteration", "tau = eta"),
)
def test_inpo_is_ipo(batch, tau, prev_is_ref):
    close(loss("inpo", batch, eta=0.3, tau=tau), loss("ipo", batch, tau=0.3, normalize=False))


def test_inpo_of_small_tau_is_ipo_against_the_iterate():
    moved = replace(PAIRS, ref=PAIRS.prev)
    close(loss("inpo", PAIRS, eta=0.3, tau=1e-15), loss("ipo", moved, tau=0.3, normalize=False))


def test_dno_of_sharp_targets_is_prct():
    ordered = with_extra(PAIRS, win=np.where(PAIRS.role == "chosen", 0.9, 0.1))
    sharp = loss("dno", ordered, eta=1e-3, scale=100.0)
    close(sharp, loss("dno", PAIRS, eta=0.1, variant="prct"))


def test_dno_of_equal_win_rates_is_least_at_0():
    value, grads = evaluate("dno", with_extra(SAME, win=0.3))
    close(value, LOG2), close(grads["logp"], 0)


def test_dno_prct_from_the_reference_is_dpo():
    close(loss("dno", replace(PAIRS, prev=PAIRS.ref), variant="prct"), loss("dpo", PAIRS))


def test_dno_minimizer():
    gap, eta = PAIRS.x("win", "chosen") - PAIRS.x("win", "rejected"), 0.3
    full = replace(PAIRS, mask=np.ones_like(PAIRS.mask), logp=np.nan_to_num(PAIRS.logp, nan=-1.0))
    shift = np.stack([gap / eta, 0 * gap], 1).reshape(-1, 1) / full.mask.shape[1]
    close(evaluate("dno", replace(full, prev=full.logp - shift), eta=eta)[1]["logp"], 0)


# ---- reward models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", (0.0, 0.1))
def test_bradley_terry_shift(c):
    moved = with_extra(PAIRS, score=PAIRS.extra["score"] + 3)
    a, b = (loss("bradley_terry_rm", x, ("score",), c=c) for x in (PAIRS, moved))
    assert (abs(a - b) < 1e-12) == (c == 0)


def test_bradley_terry_of_equal_scores():
    close(loss("bradley_terry_rm", with_extra(PAIRS, score=0.7), ("score",)), LOG2)


def test_dpo_is_bradley_terry_of_implicit_rewards():
    implicit = 0.1 * PAIRS.sums(PAIRS.logp - PAIRS.ref)
    close(loss("bradley_terry_rm", with_extra(PAIRS, score=implicit), ("score",)), loss("dpo", PAIRS))


HEADS = ("embed", "gate")


def test_gpm_is_antisymmetric():
    even = replace(PAIRS, extra={**PAIRS.extra, "gate": np.repeat(PAIRS.extra["gate"][::2], 2, 0)})
    s = {}
    for name, batch in (("given", even), ("swapped", swapped(even))):
        s[name] = loss("gpm_rm", batch, HEADS, tau=1e6)  # log 2 - mean(s) / (2 tau)
    close(s["given"] - LOG2, LOG2 - s["swapped"], rtol=1e-5, atol=1e-14)
    alike = replace(even, extra={**even.extra, "embed": np.repeat(even.extra["embed"][::2], 2, 0)})
    close(loss("gpm_rm", alike, HEADS), LOG2)


def test_gpm_of_flat_embeddings_is_bradley_terry():
    flat = np.stack([PAIRS.extra["score"], np.ones(2 * N)], 1)
    batch = replace(PAIRS, extra={**PAIRS.extra, "embed": flat})
    close(
        loss("gpm_rm", batch, ("embed",), tau=1.0, gate=False, normalize=False),
        loss("bradley_terry_rm", PAIRS, ("score",)),
    )


def test_gpm_ranks_in_circles():
    angle = 2 * np.pi / 3 * np.arange(3)
    points = np.stack([np.cos(angle), -np.sin(angle)], 1)
    circle = np.concatenate([[points[(i + 1) % 3], points[i]] for i in range(3)])  # each beats the one before
    circle = np.concatenate([circle, np.tile(circle[:2], (N - 3, 1))])
    batch = replace(PAIRS, extra={**PAIRS.extra, "embed": circle})
    only = [replace(batch, count=np.repeat(np.arange(N) == i, 2).astype(float)) for i in range(3)]
    assert max(loss("gpm_rm", pair, ("embed",), gate=False) for pair in only) < 0.01  # no scalar score can do that


def test_themis_without_trace_is_half_bradley_terry():
    bare = replace(PAIRS, extra={**PAIRS.extra, "segment": 0 * PAIRS.extra["segment"]})
    close(loss("themis", bare, ("logp", "score")), 0.5 * loss("bradley_terry_rm", PAIRS, ("score",)))


def test_themis_without_ranking_is_a_token_mean():
    on = PAIRS.mask & (PAIRS.extra["segment"] > 0)
    close(loss("themis", PAIRS, ("logp", "score"), rm_coef=0.0), -PAIRS.logp[on].mean())


def test_rluf_gradient():
    s, y = GROUPS.extra["score"], GROUPS.extra["label"]
    close(evaluate("rluf", GROUPS, ("score",))[1]["score"], (1 / (1 + np.exp(-s)) - y) / len(s))


def test_orchestrator_of_the_right_weights():
    right = replace(GROUPS, extra={**GROUPS.extra, "gate": GROUPS.extra["rm_scores"] / 0.5})
    close(loss("preference_orchestrator", right, ("gate",), T=0.5, normalize=False), 0, atol=1e-12)


def test_orchestrator_is_blind_to_a_constant():
    moved = replace(GROUPS, extra={**GROUPS.extra, "rm_scores": GROUPS.extra["rm_scores"] + 7})
    a, b = (loss("preference_orchestrator", x, ("gate",), normalize=False) for x in (GROUPS, moved))
    close(a, b)


def test_orchestrator_of_a_high_temperature_is_uniform():
    even = replace(GROUPS, extra={**GROUPS.extra, "gate": np.zeros((len(GROUPS.mask), 3))})
    close(loss("preference_orchestrator", even, ("gate",), T=1e9), 0, atol=1e-12)
