"""The objectives of Nash learning have these oracles, in the way of `tests.oracles.units`."""

from tests.oracles.units import log_sig, mean, sg, sig


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
