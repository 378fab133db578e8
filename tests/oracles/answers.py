"""Oracles of cards with more than a pair, of Nash learning and of reward models; see `tests.oracles.preference`."""

import numpy as np

from tests.oracles.preference import dpo, log_sig, mean, orpo, sg, sig


def srpo(b, *, beta=0.01, alpha=0.5, soft=False):
    D = b.D  # noqa: N806
    p = b.x("pref_prob") if soft else 1.0
    wl, lw, ww, ll = (
        D(r)
        for r in ("chosen_given_rejected", "rejected_given_chosen", "chosen_given_chosen", "rejected_given_rejected")
    )
    g = D("chosen") - D("rejected")
    joint = mean(((2 * p - 1) - beta * (wl - lw + g)) ** 2 / 4)
    # y2 = w given the draft l, then y2 = l given the draft w
    improver = mean(((p - 0.5) - beta * (wl - ll)) ** 2 / 2 + ((0.5 - p) - beta * (lw - ww)) ** 2 / 2)
    return (1 - alpha) * joint + alpha * improver


def seppo(b, *, beta=0.1, flip=True):
    sign = np.where(sg(b.D("chosen")) < 0, -1, 1) if flip else 1
    return mean(-log_sig(beta * (b.D("chosen") - sign * b.D("rejected"))))


def rationale_dpo(b, *, beta=0.1, gamma=0.001, term="logsigmoid"):
    r = b.S("rationale")
    return dpo(b, beta=beta) + mean(-log_sig(gamma * r) if term == "logsigmoid" else -gamma * r)


def rationale_orpo(b, *, lam=0.1, gamma=1.0):
    return orpo(b, lam=lam) - gamma * mean(b.S("rationale") / b.n("rationale"))


def opa_dpo(b, *, beta=0.1, c_g=1.0, c_v=1.0, c_ctx=0.2, c_a=1.0, a=0.0, granularity="sequence", rev_anchor_sign=1):
    g, v, o, gc, vc = (b.rows(r) for r in b.layout)
    d = np.where(b.mask, b.logp - b.ref, 0)
    sev, rel = (np.where(b.mask, b.extra[name], 0) for name in ("severity", "relevance"))

    def minus_log_sig(x, y, rows, sign=1, shift=0.0):
        """x, y: [N, T] of two answers, on the tokens of either."""
        if granularity == "sequence":
            return mean(-log_sig(sign * (beta * (x.sum(1) - y.sum(1)) - shift)))
        each = []
        for i in range(len(x)):
            on = np.any([b.mask[r][i] for r in rows], 0)
            z = sign * (beta * (x[i] - y[i])[on] - shift)
            each.append(mean(-log_sig(z)))
        return mean(np.array(each))

    nothing = 0 * d[g]
    L1 = minus_log_sig(d[g], d[o], (g, o))  # noqa: N806
    L2 = minus_log_sig(sev[v] * d[v], sev[o] * d[o], (v, o))  # noqa: N806
    L3 = minus_log_sig(d[g], d[gc], (g, gc))  # noqa: N806
    L4 = minus_log_sig(rel[v] * d[v], rel[v] * d[vc], (v, vc))  # noqa: N806
    anchor = 2 * minus_log_sig(d[g], nothing, (g,), 1, a) + 2 * minus_log_sig(d[v], nothing, (v,), rev_anchor_sign, a)
    return c_g * L1 + c_v * L2 + c_ctx * (c_g * L3 + c_v * L4) + c_a * anchor


def copg(b, *, beta=0.1):
    d, r = b.sums(b.logp - b.ref), b.extra["reward"]
    groups = sorted(set(b.group.tolist()))
    total = 0
    for group in groups:
        rows = np.flatnonzero(b.group == group)
        for i in rows:
            for j in rows:
                if i < j:
                    R_i, R_j = r[i] - beta / 2 * d[i], r[j] - beta / 2 * d[j]  # noqa: N806
                    total += -((R_i - R_j) * d[i] + (R_j - R_i) * d[j]) / (len(rows) - 1)
    return total / max(len(groups), 1) + 0j


def hypo(b, *, beta=0.1, lam=1e-4, k=2, rloo=True):
    width = len(b.layout)
    drift, logp = b.sums(b.logp - b.ref), b.sums(b.logp)
    terms = []
    for unit in range(len(b.mask) // width):
        own = [unit * width + 2 + i for i in range(k)]
        for i in own:
            others = [sg(drift[j]) for j in own if j != i]
            base = sum(others) / len(others) if rloo and others else 0
            terms.append((sg(drift[i]) - base) * logp[i])
    return dpo(b, beta=beta) + lam * mean(np.array(terms))


def mapl(b, *, a=1.0, b_=1.0, form="rm", beta=0.1):
    def s(role):
        return b.x("score", role) if form == "rm" else beta * b.D(role)

    gap = s("chosen") - s("rejected")
    intra = mean(-log_sig(s("matching") - s("violating")))
    inter = mean(-log_sig((s("multi_chosen") - s("multi_rejected")) - gap))
    return mean(-log_sig(gap)) + a * intra + b_ * inter


# ---- Nash learning ------------------------------------------------------------------------------------------------


def online_ipo(b, *, tau=1.0, form="square"):
    p, h, h0 = b.x("pref_prob"), b.D("chosen") - b.D("rejected"), b.S("chosen") - b.S("rejected")
    if form == "square":
        return mean(p * (h - 1 / (2 * tau)) ** 2 + (1 - p) * (-h - 1 / (2 * tau)) ** 2)
    return mean(p * (-h0 + tau * h**2) + (1 - p) * (h0 + tau * h**2))


def ipo_md(b, *, tau=1.0):
    return online_ipo(b, tau=tau, form="expanded")


def nash_md(b, *, tau=0.008, kl="sequence"):
    win, D, S = b.extra["pref_opp"], b.sums(b.logp - b.ref), b.sums(b.logp)  # noqa: N806
    if kl == "sequence":
        return -mean(sg(win - 0.5 - tau * D) * S)
    return -mean((win - 0.5) * S) + tau * mean(b.sums(sg(b.logp - b.ref) * b.logp))


nash_ema = nash_md


def nash_mp(b, *, beta=0.1, eta=None):
    eta = 2 * beta if eta is None else eta
    D, E = b.sums(b.logp - b.ref), b.sums(b.logp - b.logp_old)  # noqa: N806
    return -mean(sg(b.extra["pref_opp"] - 0.5 - beta * D - beta / eta * E) * b.sums(b.logp))


def egpo(b, *, beta=0.1, normalize=True):
    n_w, n_l = (b.n("chosen"), b.n("rejected")) if normalize else (1, 1)
    u = b.D("chosen") / n_w - b.D("rejected") / n_l
    return mean((u - (b.x("win", "chosen") - b.x("win", "rejected")) / beta) ** 2)


def inpo(b, *, eta=0.0075, tau=0.0025):
    gap = lambda x: (lambda s: s[b.rows("chosen")] - s[b.rows("rejected")])(b.sums(x))  # noqa: E731
    H = gap(b.logp) - tau / eta * gap(b.ref) - (eta - tau) / eta * gap(b.prev)  # noqa: N806
    return mean((H - 1 / (2 * eta)) ** 2)


def dno(b, *, eta=0.1, variant="soft", scale=1.0):
    z = eta * scale * (b.D("chosen", "prev") - b.D("rejected", "prev"))
    t = 1.0 if variant == "prct" else sig(scale * (b.x("win", "chosen") - b.x("win", "rejected")))
    return mean(-t * log_sig(z) - (1 - t) * log_sig(-z))


def gpo(b, *, beta=0.001):
    each = [(b.D(r, "prev") - b.x("pref_score", r) / beta) ** 2 / 2 for r in ("chosen", "rejected")]
    return mean(each[0] + each[1])


# ---- reward models ------------------------------------------------------------------------------------------------


def bradley_terry_rm(b, *, margin=0.0, c=0.0, margins=False):
    w, l = b.x("score", "chosen"), b.x("score", "rejected")  # noqa: E741
    own = b.x("margin") if margins else 0
    return mean(-log_sig(w - l - margin - own)) + c * mean((w + l) ** 2)


def gpm_rm(b, *, tau=0.1, gate=True, normalize=True):
    v, u = b.x("embed", "chosen"), b.x("embed", "rejected")
    if normalize:
        v, u = (x / np.sqrt((x**2).sum(1, keepdims=True)) for x in (v, u))
    k = v.shape[1] // 2
    weight = np.ones((len(v), k))
    if gate:
        e = np.exp(b.x("gate", "chosen"))
        weight = k * e / e.sum(1, keepdims=True)
    s = sum(weight[:, i] * (v[:, 2 * i] * u[:, 2 * i + 1] - v[:, 2 * i + 1] * u[:, 2 * i]) for i in range(k))
    return mean(-log_sig(s / tau))


def themis(b, *, form="released", rm_coef=0.5, observation=True, rationale=True, alpha=1.0, beta=1.0, omega=1.0):
    rank = mean(-log_sig(b.x("score", "chosen") - b.x("score", "rejected")))

    def nll(kinds):
        on = b.mask & np.isin(b.extra["segment"], kinds)
        return np.where(on, -b.logp, 0).sum() / max(on.sum(), 1)

    if form == "released":
        return nll([1] + [2] * observation + [3] * rationale) + rm_coef * rank
    return rank + alpha * (nll([1]) + beta * nll([2])) + omega * nll([3])


def rluf(b):
    s, y = b.extra["score"], b.extra["label"]
    return mean(-y * log_sig(s) - (1 - y) * log_sig(-s))


def preference_orchestrator(b, *, T=1.0, normalize=True):  # noqa: N803
    scores = b.extra["rm_scores"]
    if normalize and len(scores):
        std = scores.std(0)
        scores = np.where(std > 0, (scores - scores.mean(0)) / np.where(std > 0, std, 1), 0)
    q = np.exp(scores / T)
    q = q / q.sum(1, keepdims=True)
    z = b.extra["gate"]
    log_w = z - np.log(np.exp(z).sum(1, keepdims=True))
    return mean((q * (np.log(q) - log_w)).sum(1))
