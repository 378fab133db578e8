"""The objectives of pairs and of labelled answers have these oracles, in the way of `tests.oracles.units`."""

import numpy as np

from tests.oracles.units import log_not, log_odds, log_sig, mean, relu, sg, sig


def dpo(b, *, beta=0.1, eps=0.0, reference_free=False):
    h = b.S("chosen") - b.S("rejected") if reference_free else b.D("chosen") - b.D("rejected")
    z = beta * h
    return mean(-(1 - eps) * log_sig(z) - eps * log_sig(-z))


def ipo(b, *, tau=0.1, normalize=True):
    if normalize:
        u = b.D("chosen") / b.n("chosen") - b.D("rejected") / b.n("rejected")
    else:
        u = b.D("chosen") - b.D("rejected")
    return mean((u - 1 / (2 * tau)) ** 2)


def slic_hinge(b, *, delta=1.0, lam=0.5, target="chosen"):
    return mean(relu(delta - b.S("chosen") + b.S("rejected")) - lam * b.S(target))


def kto(b, *, beta=0.1, lam_D=1.0, lam_U=1.0):
    drift = b.sums(b.logp - b.ref)
    kl, own = b.role == "kl", b.role != "kl"
    z0 = max(0.0, float(mean(sg(drift[kl]))))
    good = lam_D * (1 - sig(beta * (drift - z0)))
    bad = lam_U * (1 - sig(beta * (z0 - drift)))
    return mean(np.where(b.extra["label"] > 0, good, bad)[own])


def orpo(b, *, lam=0.1, include_prompt=False):
    w, l = (b.S(r) / b.n(r) for r in ("chosen", "rejected"))  # noqa: E741
    odds = mean(-log_sig(log_odds(w) - log_odds(l)))
    text = b.rows("expert" if include_prompt else "chosen")
    return b.token_mean(-b.logp, text) + lam * odds


def simpo(b, *, beta=2.0, gamma=1.0, eps=0.0):
    z = beta * (b.S("chosen") / b.n("chosen") - b.S("rejected") / b.n("rejected")) - gamma
    return mean(-(1 - eps) * log_sig(z) - eps * log_sig(-z))


def cpo(b, *, beta=0.1, alpha=1.0, eps=0.0):
    z = beta * (b.S("chosen") - b.S("rejected"))
    return mean(-(1 - eps) * log_sig(z) - eps * log_sig(-z)) + alpha * b.token_mean(-b.logp, b.rows("chosen"))


def sppo(b, *, beta=0.001, half=True, hard=False):
    win_w, win_l = (1, 0) if hard else (b.x("win", "chosen"), b.x("win", "rejected"))
    total = (b.D("chosen") - (win_w - 0.5) / beta) ** 2 + (b.D("rejected") - (win_l - 0.5) / beta) ** 2
    return mean(total / 2 if half else total)


def rso(b, *, gamma=0.05, form="sigmoid-norm"):
    h, h0 = b.D("chosen") - b.D("rejected"), b.S("chosen") - b.S("rejected")
    if form == "sigmoid-norm":
        return mean(-log_sig(gamma * h))
    return mean(relu(1 - gamma * (h if form == "hinge-norm" else h0)))


def rdpo(b, *, beta=0.1, eps=0.1):
    z = beta * (b.D("chosen") - b.D("rejected"))
    return mean((-(1 - eps) * log_sig(z) + eps * log_sig(-z)) / (1 - 2 * eps))


def rpo(b, *, beta=0.05, eta=0.005, nll="seq_sum"):
    z = beta * (b.D("chosen") - b.D("rejected"))
    if nll == "seq_sum":
        return mean(-log_sig(z) - eta * beta * b.S("chosen"))
    return mean(-log_sig(z)) + eta * b.token_mean(-b.logp, b.rows("chosen"))


RHO = {  # the ratio itself, where the card gives one; worlds otherwise
    "ce": lambda w, y: log_odds(w),
    "cpo": lambda w, y: w - y,
    "orpo": lambda w, y: log_odds(w) - log_odds(y),
    "ccpo": lambda w, y: w - log_not(w) - y,
    "cfunl": lambda w, y: log_not(y) - log_not(w) - y,
    "qfunl": lambda w, y: log_not(y) - log_not(w),
    "funl": lambda w, y: log_not(y) - y,
    "ceunl": lambda w, y: w + log_not(y) - np.log(np.exp(w + y) - np.expm1(w)),
    "uncpo": lambda w, y: np.log(np.exp(w) - np.expm1(w) * -np.expm1(y)) - log_not(w) - y,
    "l5": lambda w, y: np.log(np.exp(w) + np.expm1(w) * np.expm1(y)) - np.log(np.exp(w + y) - np.expm1(w)),
    "TT FF / TF": lambda w, y: np.log(np.exp(w + y) + np.expm1(w) * np.expm1(y)) - w - log_not(y),
}


def dpa_logic(b, *, program="cpo", beta=1.0, link="log", length_norm=True, use_ref=False):
    def rho(logp):
        s = b.sums(logp)
        w, l = (s[b.rows(r)] / (b.n(r) if length_norm else 1) for r in ("chosen", "rejected"))  # noqa: E741
        return RHO[program](*(np.where(np.real(a) > -1e-9, -1e-9, a) for a in (w, l)))

    x = rho(b.logp) - rho(b.ref) if use_ref else rho(b.logp)
    return mean(
        {
            "log": lambda: -log_sig(beta * x),
            "square": lambda: (x - 1 / (2 * beta)) ** 2,
            "hinge": lambda: relu(beta - x),
        }[link]()
    )


def mpo_mixed(b, *, gap=1.0, beta=0.1):
    easy = np.abs(b.x("rm", "chosen") - b.x("rm", "rejected")) > gap
    return mean(-log_sig(beta * (b.D("chosen") - b.D("rejected")))[easy])
