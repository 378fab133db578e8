"""The objectives that train reward models have these oracles, in the way of `tests.oracles.units`."""

import numpy as np

from tests.oracles.units import log_sig, mean


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
