"""The objectives of more answers than a pair have these oracles, in the way of `tests.oracles.units`."""

import numpy as np

from tests.oracles.preference import dpo, orpo
from tests.oracles.units import log_sig, mean, sg


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
