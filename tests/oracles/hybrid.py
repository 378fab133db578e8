"""`sft` and the relatives that its identities name (`upge`, `chord`, `on_policy_distillation`) have these oracles."""

import math

import numpy as np

from tests.oracles import Case, Gradient, aggregate


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
