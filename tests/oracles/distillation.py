"""Distillation has these oracles: plain loops over the vocabulary in probabilities."""

import math

import numpy as np

from tests.oracles import Case, Gradient, aggregate
from tests.oracles.groups import group_advantage
from tests.oracles.ratios import ppo, ratio, token_gap


def softmax(z: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    e = np.exp((z - z.max()) / temperature)
    return e / e.sum()


def divergence(P: np.ndarray, Q: np.ndarray, kind: str, *, beta=0.5, alpha=0.1, a=0.5) -> float:
    """The divergence of two lists of probabilities, as the papers write it."""

    def kl(x, y):
        return math.fsum(float(i) * (math.log(i) - math.log(j)) for i, j in zip(x, y, strict=True) if i > 0)

    if kind == "jsd" and beta in (0, 1):
        kind = "forward_kl" if beta == 0 else "reverse_kl"
    M = beta * P + (1 - beta) * Q
    u = P / Q
    f = {
        "f_kl": lambda: u * np.log(u),
        "f_rkl": lambda: -np.log(u),
        "f_js": lambda: 0.5 * (u * np.log(u) - (u + 1) * np.log((u + 1) / 2)),
        "f_tvd": lambda: 0.5 * np.abs(u - 1),
        "f_chi2": lambda: (u - 1) ** 2,
        "f_hellinger": lambda: (np.sqrt(u) - 1) ** 2,
        "f_alpha": lambda: (u**a - a * u - (1 - a)) / (a * (a - 1)),
    }
    if kind in f:
        return math.fsum((Q * f[kind]()).tolist())
    return {
        "forward_kl": lambda: kl(P, Q),
        "reverse_kl": lambda: kl(Q, P),
        "jsd": lambda: beta * kl(P, M) + (1 - beta) * kl(Q, M),
        "skew_kl": lambda: kl(P, alpha * P + (1 - alpha) * Q),
        "skew_rkl": lambda: kl(Q, alpha * Q + (1 - alpha) * P),
    }[kind]()


def largest(x: np.ndarray, k: int) -> list[int]:
    return sorted(range(len(x)), key=lambda i: (-x[i], i))[:k]


def support(P: np.ndarray, Q: np.ndarray, kind: str, k: int, beta: float) -> list[int]:
    forward = kind in ("forward_kl", "f_kl") or kind == "jsd" and beta == 0
    reverse = kind in ("reverse_kl", "f_rkl") or kind == "jsd" and beta == 1
    chosen = set() if reverse else set(largest(P, k))
    return sorted(chosen if forward else chosen | set(largest(Q, k)))


def of_logits(
    student: np.ndarray, teacher: np.ndarray, kind: str, *, temperature=1.0, k=None, tail=True, chosen=None, **numbers
):
    """The divergence of two rows of logits."""
    Q, P = softmax(student, temperature), softmax(teacher, temperature)
    if k is None or k >= len(P):
        return divergence(P, Q, kind, **numbers)
    S = support(P, Q, kind, k, numbers.get("beta", 0.5)) if chosen is None else chosen
    parts = []
    for x in (P, Q):
        kept = x[S]
        if not tail:
            parts.append(kept / kept.sum())
        elif len(S) < len(x):
            parts.append(np.append(kept, 1 - min(kept.sum(), math.exp(-1e-7))))
        else:
            parts.append(kept)
    return divergence(*parts, kind, **numbers)


def gradient(student: np.ndarray, teacher: np.ndarray, kind: str, *, k=None, h=1e-5, **options) -> np.ndarray:
    """Central differences of fourth order; the support does not move."""
    Q, P = (softmax(x, options.get("temperature", 1.0)) for x in (student, teacher))
    S = None if k is None or k >= len(P) else support(P, Q, kind, k, options.get("beta", 0.5))
    out = np.zeros(len(student))
    for i in range(len(student)):

        def at(d, i=i):
            moved = student.copy()
            moved[i] += d
            return of_logits(moved, teacher, kind, k=k, chosen=S, **options)

        out[i] = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    return out


def sampled(
    case: Case,
    *,
    gamma=0.0,
    use_ratio=False,
    rl=False,
    eps_low=0.2,
    eps_high=0.2,
    coef=1.0,
    agg="token_mean",
    L_const=None,
) -> Gradient:
    """The teacher's log-prob less the old one as the advantage of a token."""
    A = group_advantage(case, case.reward) if rl else {}
    adv = {}
    for b in case.rows():
        after = 0.0
        for t in reversed(case.positions(b)):
            after = coef * float(case.extra["logp_teacher"][b, t] - case.logp_old[b, t]) + gamma * after
            adv[b, t] = after + A.get(b, 0.0)

    def term(b: int, t: int) -> tuple[float, float]:
        if rl:
            return ppo(token_gap(case, b, t), adv[b, t], 1 - eps_low, 1 + eps_high)
        if use_ratio:
            r, slope = ratio(token_gap(case, b, t))
            return -r * adv[b, t], -slope * adv[b, t]
        return -adv[b, t] * case.logp[b, t], -adv[b, t]

    return aggregate(case, agg, term, L_const)
