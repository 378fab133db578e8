"""The objectives of the policy's own successes have these oracles."""

import math

import numpy as np

from tests.oracles import Case, Gradient, aggregate, mean
from tests.oracles.groups import group_advantage, grouped
from tests.oracles.hybrid import nll
from tests.oracles.ratios import clipped_surrogate, token_gap


def rft(case: Case, *, select="correct", threshold=1.0, agg="token_mean", L_const=None) -> Gradient:
    """Mean of ``-logp`` over the rows that stay; of a row that was drawn often, "first" and "best" keep one copy."""
    count = np.zeros(len(case.count))
    if select == "correct":
        count = case.count * (case.reward >= threshold)
    else:
        for rows in grouped(case).values():
            rows = sorted(set(rows))
            if select == "first_correct":
                good = [b for b in rows if case.reward[b] >= threshold]
                count[good[:1]] = 1
            else:
                count[max(rows, key=lambda b: (case.reward[b], -b))] = 1
    return nll(case.replace(count=count), agg, L_const)


def nft(
    case: Case,
    *,
    neg_weight=1.0,
    clamp_pos=0.0,
    clamp_neg=1.0,
    normalize=1,
    ratio_type="token",
    agg="sum_const",
    L_const=1000.0,
) -> Gradient:
    """Likelihood of good answers and of bad ones; floors are straight-through."""
    q, keep = {}, np.zeros(len(case.count))
    for rows in grouped(case).values():
        rate = mean([float(case.reward[b]) for b in rows])
        for b in rows:
            q[b] = min(max(rate, 0.02), 0.98)
            keep[b] = 0 < rate < 1
    used = case.replace(count=case.count * keep)

    def term(x: float, b: int) -> tuple[float, float]:
        c, rate = float(case.reward[b]), q[b]
        R, slope = math.exp(min(x, 10)), (math.exp(x) if x < 10 else 0.0)
        omega = {0: 1.0, 1: 1 - rate, 2: math.sqrt((1 - rate) / rate)}[normalize]
        pos = max(R, clamp_pos)
        neg = max((1 - rate * R) / (1 - rate), clamp_neg)
        value = c * -math.log(pos) + (1 - c) * neg_weight * -math.log(neg)
        grad = c * -slope / pos + (1 - c) * neg_weight * (rate / (1 - rate)) * slope / neg
        return omega * value, omega * grad

    if ratio_type == "token":
        L_const = L_const if agg in ("sum_const", "seq_sum_const") else None
        return aggregate(used, agg, lambda b, t: term(token_gap(case, b, t), b), L_const)
    loss, grad = 0.0, np.zeros(case.mask.shape)
    for b in used.rows():
        at = case.positions(b)
        if at:
            value, slope = term(math.fsum(token_gap(case, b, t) for t in at), b)
            loss += value
            grad[b, at] += slope
    return loss, grad


def fapo(
    case: Case,
    *,
    lam=1.0,
    eps_low=0.2,
    eps_high=0.28,
    max_len=8192,
    buffer=4096,
    penalty=1.0,
    adv_eps=1e-6,
    singleton="zero",
    dual_clip=None,
) -> Gradient:
    """GRPO of 1 for right, -1 for wrong, less lam for right and flawed, less a penalty of long answers."""
    reward = np.zeros(len(case.reward))
    for b in case.rows():
        right = case.correct[b] == 1
        reward[b] = (1 if right else -1) - (lam if right and case.extra["flawed"][b] == 1 else 0)
        over = len(case.positions(b)) - (max_len - buffer)
        reward[b] -= penalty * min(max(over / buffer, 0), 1)
    A = group_advantage(case, reward, adv_eps=adv_eps, singleton=singleton)
    return clipped_surrogate(case, lambda b, t: A[b], eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip)


def policy_cliff(
    case: Case, *, alpha=0.01, use_std=True, adv_eps=1e-6, singleton="zero", agg="token_mean", L_const=None
) -> Gradient:
    """``-A logp - alpha H`` of the effective reward."""
    reward = np.array(
        [
            math.fsum(w * r for w, r in zip(*x, strict=True))
            for x in zip(case.extra["reward_weights"], case.extra["rewards_multi"], strict=True)
        ]
    )
    A = group_advantage(case, reward, scale="group" if use_std else "none", adv_eps=adv_eps, singleton=singleton)

    def term(b: int, t: int) -> tuple[float, float]:
        return -A[b] * case.logp[b, t] - (alpha * float(case.entropy[b, t]) if alpha else 0.0), -A[b]

    return aggregate(case, agg, term, L_const)
