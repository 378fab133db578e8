"""`sft` and the relatives that its identities name (`upge`, `chord`, `on_policy_distillation`) have these oracles."""

import math

import numpy as np

from tests.oracles import Case, Gradient, aggregate
from tests.oracles.groups import group_advantage
from tests.oracles.ratios import ppo, ratio, token_gap

EXPERT = 1  # the number of the role


def sft(case: Case, *, agg="token_mean", L_const=None) -> Gradient:
    """Mean of ``-logp``."""
    return aggregate(case, agg, lambda b, t: (-case.logp[b, t], -1.0), L_const)


def upge_sft(case: Case) -> Gradient:
    """The SFT row of the unified estimator ``-sg(w) logp``, ``w = stable (1 / pi_den) A pi``: pi_den = pi."""

    def term(b: int, t: int) -> tuple[float, float]:
        pi = math.exp(case.logp[b, t])
        w = 1 * (1 / pi) * 1 * pi
        return -w * case.logp[b, t], -w

    return aggregate(case, "token_mean", term)


def chord(case: Case, expert: np.ndarray, *, mu: float) -> Gradient:
    """``(1 - mu) RL + mu SFT`` with phi = 1; the RL part of a batch of expert rows alone is a mean over nothing, 0."""
    assert expert.all(), "only the demonstrations' half is written here"
    loss, grad = aggregate(case, "token_mean", lambda b, t: (-1.0 * case.logp[b, t], -1.0))
    return (1 - mu) * 0.0 + mu * loss, mu * grad


def forward_kl_to_teacher(
    student_logits: np.ndarray, teacher: np.ndarray, mask: np.ndarray
) -> tuple[float, np.ndarray]:
    """Mean over masked tokens of ``KL(teacher || softmax(student_logits))`` and its gradient in the logits."""
    loss, grad, n = 0.0, np.zeros_like(student_logits), int(mask.sum())
    for b, t in np.argwhere(mask):
        z = student_logits[b, t] - student_logits[b, t].max()
        q = np.exp(z) / np.exp(z).sum()
        p = teacher[b, t]
        loss += sum(p[v] * (math.log(p[v]) - math.log(q[v])) for v in range(len(p)) if p[v] > 0) / n
        grad[b, t] = (q - p) / n
    return loss, grad


def expert_terms(case: Case, b: int, t: int, gamma: float | None, recorded: bool) -> tuple[float, float]:
    """``f(p)`` of an expert token and its slope in ``logp``."""
    p = math.exp(case.logp[b, t])
    if recorded:
        q = float(case.extra["expert_prob"][b, t]) + 1e-6
        return p / q, p / q
    return (p, p) if gamma is None else (p / (p + gamma), gamma * p / (p + gamma) ** 2)


def luffy(
    case: Case,
    *,
    shaping="p_div_p",
    gamma=0.1,
    recorded=False,
    clip=False,
    eps=0.2,
    use_std=False,
    adv_eps=1e-6,
    singleton="zero",
    entropy_coef=0.0,
    agg="token_mean",
    L_const=None,
    log_ratio_clip=20.0,
) -> Gradient:
    """Own rows ``-r A``, expert rows ``-f(p) A``, one mean over both; minus ``entropy_coef`` times the mean entropy."""
    A = group_advantage(case, case.reward, scale="group" if use_std else "none", adv_eps=adv_eps, singleton=singleton)
    shape = gamma if shaping == "p_div_p" else None

    def term(b: int, t: int) -> tuple[float, float]:
        bonus = entropy_coef * float(case.entropy[b, t]) if entropy_coef else 0.0
        if case.extra["role"][b] == EXPERT:
            value, slope = (-A[b] * x for x in expert_terms(case, b, t, shape, recorded))
        elif clip:
            value, slope = ppo(token_gap(case, b, t), A[b], 1 - eps, 1 + eps, bound=log_ratio_clip)
        else:
            value, slope = (-A[b] * x for x in ratio(token_gap(case, b, t), log_ratio_clip))
        return value - bonus, slope

    return aggregate(case, agg, term, L_const)
