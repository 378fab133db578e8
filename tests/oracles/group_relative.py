"""Oracles of `reinforce`, `rloo`, `grpo`, `dr_grpo`, `dapo`, and of their relatives `rec`, `gspo`, `canon`."""

import math

import numpy as np

from tests.oracles import Case, Gradient, aggregate, centred, mean, sample_std

# ---- advantages: row -> number -------------------------------------------------------------------


def _siblings(case: Case) -> dict[int, list[int]]:
    """Every drawn row -> the drawn rows of its group, itself included."""
    rows = case.rows()
    return {b: [j for j in rows if case.group[j] == case.group[b]] for b in rows}


def group_advantage(case: Case, reward, *, scale="group", adv_eps=1e-6, singleton="zero") -> dict[int, float]:
    """``(reward - group mean) / (std + adv_eps)``; the std of the group, of the batch, or no division."""
    out = {}
    for b, group in _siblings(case).items():
        if len(group) == 1:
            out[b] = {"zero": 0.0, "raw": float(reward[b])}[singleton]
            continue
        rewards = [float(reward[j]) for j in group]
        centre = centred(rewards)[group.index(b)]
        spread = {
            "group": lambda rewards=rewards: sample_std(rewards),
            "batch": lambda: sample_std([float(reward[j]) for j in case.rows()]),
        }
        out[b] = 0.0 if centre == 0 else centre if scale == "none" else centre / (spread[scale]() + adv_eps)
    return out


def leave_one_out(case: Case, reward, *, singleton="zero") -> dict[int, float]:
    """``reward - mean of the other rewards of the group``."""
    out = {}
    for b, group in _siblings(case).items():
        others = [float(reward[j]) for j in group]
        others.remove(float(reward[b]))
        if not others:
            out[b] = {"zero": 0.0, "raw": float(reward[b])}[singleton]
        elif all(x == float(reward[b]) for x in others):
            out[b] = 0.0
        else:
            out[b] = float(reward[b]) - mean(others)
    return out


def canon_advantage(case: Case, metric, mu: float) -> dict[int, float]:
    """CANON with alpha 1: compare with the other half (inter) and the own half (intra) of the group."""
    out = {}
    for b, group in _siblings(case).items():
        order = sorted(group, key=lambda j: metric[j])  # sorted() is stable
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        own, other = halves if b in halves[0] else halves[::-1]
        inter, intra = [case.reward[b] - mean([case.reward[j] for j in half]) for half in (other, own)]
        out[b] = mu * inter + (1 - mu) * intra
    return out


# ---- per-token pieces: value and slope -----------------------------------------------------------


def ratio(log_ratio: float, bound: float = 20.0) -> tuple[float, float]:
    """``exp`` of the clamped log-ratio and its derivative (0 outside the clamp)."""
    r = math.exp(min(max(log_ratio, -bound), bound))
    return r, (r if abs(log_ratio) < bound else 0.0)


def ppo(
    log_ratio: float, A: float, lo: float, hi: float, *, dual: float | None = None, bound: float = 20.0
) -> tuple[float, float]:
    """``-min(r A, clip(r, lo, hi) A)``, at most ``-dual A`` where A < 0, and its slope in the log-prob."""
    r, slope = ratio(log_ratio, bound)
    plain, clipped = r * A, min(max(r, lo), hi) * A
    value, slope = (-plain, -A * slope) if plain <= clipped else (-clipped, 0.0)
    if dual is not None and A < 0 and value > -dual * A:
        return -dual * A, 0.0
    return value, slope


def k3(logp: float, ref: float, bound: float = 20.0) -> tuple[float, float]:
    """``exp(x) - x - 1``, ``x = ref - logp`` clamped to ``±bound``: beyond it the slope is 0."""
    x = ref - logp
    e, slope = ratio(x, bound)
    return e - min(max(x, -bound), bound) - 1, (1 - slope if abs(x) < bound else 0.0)


# ---- objectives ----------------------------------------------------------------------------------


def reinforce(case: Case, *, baseline="none", agg="token_mean") -> Gradient:
    rewards = [float(case.reward[b]) for b in case.rows()]
    if baseline == "none":
        A = dict(zip(case.rows(), rewards, strict=True))
    else:
        A = dict(zip(case.rows(), centred(rewards), strict=True))
    return aggregate(case, agg, lambda b, t: (-A[b] * case.logp[b, t], -A[b]))


def _row_sum(case: Case, x: np.ndarray, b: int) -> float:
    return math.fsum(x[b, t] for t in case.positions(b))


def rloo(
    case: Case,
    *,
    form="reinforce",
    beta=0.05,
    eps_low=0.2,
    eps_high=0.2,
    normalize=False,
    singleton="zero",
    log_ratio_clip=20.0,
) -> Gradient:
    rows = case.rows()
    penalised = (
        {
            b: float(case.reward[b]) - beta * (_row_sum(case, case.logp_old, b) - _row_sum(case, case.ref, b))
            for b in rows
        }
        if beta
        else {b: float(case.reward[b]) for b in rows}
    )
    A = leave_one_out(case, penalised, singleton=singleton)
    if normalize:
        drawn = [A[b] for b in rows]
        std = sample_std(drawn)
        A = {b: c / (std + 1e-4) for b, c in zip(rows, centred(drawn), strict=True)}
    losses, grad = [], np.zeros(case.mask.shape)
    for b in rows:
        if not case.positions(b):
            continue
        if form == "reinforce":
            value, slope = -A[b] * _row_sum(case, case.logp, b), -A[b]
        else:
            log_ratio = _row_sum(case, case.logp, b) - _row_sum(case, case.logp_old, b)
            value, slope = ppo(log_ratio, A[b], 1 - eps_low, 1 + eps_high, bound=log_ratio_clip)
        losses.append(value / len(rows))
        for t in case.positions(b):
            grad[b, t] += slope / len(rows)
    return math.fsum(losses), grad


def grpo(
    case: Case,
    *,
    eps_low=0.2,
    eps_high=0.2,
    beta=0.04,
    adv_eps=1e-6,
    scale="group",
    singleton="zero",
    dual_clip=None,
    kl_is=False,
    agg="seq_mean",
    L_const=None,
    log_ratio_clip=20.0,
) -> Gradient:
    A = group_advantage(case, case.reward, scale=scale, adv_eps=adv_eps, singleton=singleton)

    def term(b: int, t: int) -> tuple[float, float]:
        log_ratio = case.logp[b, t] - case.logp_old[b, t]
        value, slope = ppo(log_ratio, A[b], 1 - eps_low, 1 + eps_high, dual=dual_clip, bound=log_ratio_clip)
        if not beta:
            return value, slope
        kl, kl_slope = k3(case.logp[b, t], case.ref[b, t])
        if kl_is:
            r, r_slope = ratio(log_ratio, log_ratio_clip)
            kl, kl_slope = r * kl, r_slope * kl + r * kl_slope
        return value + beta * kl, slope + beta * kl_slope

    return aggregate(case, agg, term, L_const)


def dr_grpo(case: Case, *, L_const, eps_low=0.2, eps_high=0.2, singleton="zero", log_ratio_clip=20.0) -> Gradient:
    return grpo(
        case,
        eps_low=eps_low,
        eps_high=eps_high,
        beta=0,
        scale="none",
        singleton=singleton,
        agg="seq_sum_const",
        L_const=L_const,
        log_ratio_clip=log_ratio_clip,
    )


def overlong_penalty(n: int, max_len: int, buffer: int, penalty: float) -> float:
    """DAPO's soft penalty of an answer of n tokens."""
    start = max_len - buffer
    if n <= start:
        return 0.0
    return penalty * (start - n) / buffer if n <= max_len else -penalty


def dapo_keeps(case: Case) -> np.ndarray:
    """[B] whether the row survives dynamic sampling: its group is mixed in the raw outcome, or it is alone."""
    keep = np.zeros(len(case.reward), bool)
    for b, group in _siblings(case).items():
        keep[b] = len(group) == 1 or len({float(case.correct[j]) for j in group}) > 1
    return keep


def dapo(
    case: Case,
    *,
    eps_low=0.2,
    eps_high=0.28,
    max_len=20480,
    buffer=4096,
    penalty=1.0,
    adv_eps=1e-6,
    singleton="zero",
    dual_clip=None,
    log_ratio_clip=20.0,
) -> Gradient:
    kept = case.replace(count=case.count * dapo_keeps(case))
    length = [len(case.positions(b)) for b in range(len(case.reward))]
    shaped = np.array(
        [r + overlong_penalty(n, max_len, buffer, penalty) for r, n in zip(case.reward, length, strict=True)]
    )
    return grpo(
        kept.replace(reward=shaped),
        eps_low=eps_low,
        eps_high=eps_high,
        beta=0,
        adv_eps=adv_eps,
        singleton=singleton,
        dual_clip=dual_clip,
        agg="token_mean",
        log_ratio_clip=log_ratio_clip,
    )


# ---- relatives -----------------------------------------------------------------------------------


def rec_without_clip_or_weight(case: Case) -> Gradient:
    """REC with ``clip_mode="none", weight="none"``: ``-A logp``, A = reward - group mean, mean over tokens."""
    A = group_advantage(case, case.reward, scale="none")
    return aggregate(case, "token_mean", lambda b, t: (-A[b] * case.logp[b, t], -A[b]))


def gspo(case: Case, *, eps_low: float, eps_high: float) -> Gradient:
    """The clipped surrogate on ``exp(mean_t(logp - logp_old))``, mean over rows."""
    A = group_advantage(case, case.reward)
    rows, losses, grad = case.rows(), [], np.zeros(case.mask.shape)
    for b in rows:
        n = len(case.positions(b))
        if n:
            log_ratio = mean([case.logp[b, t] - case.logp_old[b, t] for t in case.positions(b)])
            value, slope = ppo(log_ratio, A[b], 1 - eps_low, 1 + eps_high, bound=10.0)
            losses.append(value / len(rows))
            for t in case.positions(b):
                grad[b, t] += slope / n / len(rows)
    return math.fsum(losses), grad
