"""The objectives of Nash learning keep the identities that their cards claim, in float64."""

from dataclasses import replace

import numpy as np
import pytest

from tests.oracles.preference_cases import (
    GROUPS,
    LOG2,
    PAIRS,
    SAME,
    close,
    evaluate,
    loss,
    make_batch,
    margin,
    same_gradient,
    slopes,
    with_extra,
)


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
