"""The objectives that look at entropy have these oracles, whose docstrings say what was chosen where a card is open.

Where a rule picks single tokens or rows, the copies of a row drawn w times are w separate candidates, neighbours in
the order; a term that holds for some copies only counts by their share.
"""

import math
from collections import Counter

import numpy as np

from tests.oracles import Case, Gradient, aggregate, centred, exact_mean, mean, population_std
from tests.oracles.group_relative import dapo_keeps, overlong_penalty
from tests.oracles.groups import group_advantage, grouped, row_mean
from tests.oracles.ratios import clip, clipped_surrogate, drawn_tokens, k3, ppo, ratio, row_gap, token_gap

# ---- entropy in the advantage --------------------------------------------------------------------


def _conflict_run(rows: list[int], answer: dict[int, list[int]], A: dict[int, float], b: int) -> int:
    """Length of the longest prefix of ``answer[b]`` whose tokens a winner and a loser of the group have there."""

    def has(j: int, k: int) -> bool:
        return k < len(answer[j]) and answer[j][k] == answer[b][k]

    run = 0
    while run < len(answer[b]):
        winner = any(A[j] > 0 and has(j, run) for j in rows)
        loser = any(A[j] < 0 and has(j, run) for j in rows)
        if not (winner and loser):
            break
        run += 1
    return run


def gtpo(
    case: Case,
    *,
    entropy_threshold=0.7,
    entropy_scale=0.1,
    w_pos=2.0,
    conflict_norm="max",
    adv_eps=1e-4,
    singleton="zero",
) -> Gradient:
    """Shared beginnings and ends are spared in losers and count double in winners; uncertain rows are left out.

    The value has ``exp(logp - sg(logp)) = 1``: not the function whose derivative the gradient is.
    Chosen: an inactive row (A = 0) has weights 1 and n = 1, whatever it shares; rows left out for their entropy are
    still winners and losers; an empty row has H = 0.
    """
    A = group_advantage(case, case.reward, adv_eps=adv_eps, singleton=singleton)
    forward = {b: [int(case.tokens[b, t]) for t in case.positions(b)] for b in case.rows()}
    backward = {b: answer[::-1] for b, answer in forward.items()}
    factor = {}  # (row, position) -> A' lambda / n
    for rows in grouped(case).values():
        for b in rows:
            first = _conflict_run(rows, forward, A, b) if A[b] else 0
            last = _conflict_run(rows, backward, A, b) if A[b] else 0
            norm = {"max": max(first, last, 1), "none": 1}[conflict_norm]
            H = row_mean(case, case.entropy, b)
            advantage = A[b] - entropy_scale * H if H <= entropy_threshold else 0.0
            step = w_pos if A[b] > 0 else 0.0
            length = len(case.positions(b))
            for k, t in enumerate(case.positions(b)):
                weight = 1.0
                if k < first:
                    weight *= step
                if k >= length - last:
                    weight *= step
                factor[b, t] = advantage * weight / norm
    return aggregate(case, "seq_mean", lambda b, t: (-factor[b, t], -factor[b, t]))


def hapo_signal(case: Case, rho: float, sign: str) -> dict[tuple[int, int], float]:
    """The entropy signal h of every drawn token."""
    level = {(b, t): math.log(max(float(case.entropy_old[b, t]), 1e-8)) for b, t in drawn_tokens(case)}
    drawn = [level[token] for token in drawn_tokens(case)]
    if not drawn:
        return {}
    q = sorted(drawn)[round(rho * (len(drawn) - 1))]
    s = math.sqrt(mean([(x - q) ** 2 for x in drawn]))
    z = {token: (x - q) / max(s, 1e-8) for token, x in level.items()}
    above, below = max(max(z.values()), 1e-8), max(-min(z.values()), 1e-8)
    if sign == "official":
        below = -below
    return {token: x / above if x > 0 else x / below for token, x in z.items()}


def hapo(
    case: Case,
    *,
    rho=0.8,
    eps_low=0.2,
    eps_high=0.28,
    guard=5.0,
    redistribution=1.0,
    clip_strength=1.0,
    dual_clip=10.0,
    sign="intended",
    max_len=20480,
    buffer=4096,
    penalty=1.0,
    adv_eps=1e-6,
    singleton="zero",
    log_ratio_clip=20.0,
) -> Gradient:
    """Choices.

    `round` of the quantile's index is Python's (half to even). The RMS distance has the floor 1e-8 as the two scales
    do (equal entropies: h = 0). `adv_eps` is added to both stds. A row without tokens has no token advantage: it
    neither enters the token average nor trips the guard. A group whose tokens all carry one reward has A = 0. The
    neutral zone is open.
    """
    case = case.replace(count=case.count * dapo_keeps(case))
    length = [len(case.positions(b)) for b in range(len(case.reward))]
    reward = [
        float(x) + overlong_penalty(n, max_len, buffer, penalty) for x, n in zip(case.reward, length, strict=True)
    ]
    grpo_A = group_advantage(case, reward, adv_eps=adv_eps, singleton=singleton)
    h = hapo_signal(case, rho, sign)

    A = {}
    for group in grouped(case).values():
        copied = [b for b in group for _ in case.positions(b)]
        if len(group) == 1 or not copied:
            A |= {b: grpo_A[b] for b in group}
            continue
        rewards = [reward[b] for b in copied]
        std = population_std(rewards)
        token_A = {b: x / (std + adv_eps) for b, x in zip(copied, centred(rewards), strict=True)}
        trips = any(abs(x) >= guard for x in token_A.values())
        A |= {b: grpo_A[b] if trips else token_A[b] for b in token_A}

    def term(b: int, t: int) -> tuple[float, float]:
        signal = h[b, t]
        low = eps_low * (1 - clip_strength * signal) if signal <= 0 else eps_low
        high = eps_high * (1 + clip_strength * signal) if signal > 0 else eps_high
        r, _ = ratio(token_gap(case, b, t), log_ratio_clip)
        inside = 1 - low / 2 < r < 1 + high / 2
        factor = 1 + redistribution * signal if (not inside if signal > 0 else inside) else 1.0
        return ppo(token_gap(case, b, t), A[b] * factor, 1 - low, 1 + high, dual=dual_clip, bound=log_ratio_clip)

    return aggregate(case, "token_mean", term)


def dcpo_distribution(
    case: Case,
    *,
    H=0.0,
    H0=0.25,
    cap=0.1,
    T_hot=1.2,
    T_cold=0.8,
    threshold=0.05,
    eps_low=0.2,
    eps_high=0.2,
    dual_clip=3.0,
    adv_eps=1e-6,
    singleton="zero",
    log_ratio_clip=20.0,
) -> Gradient:
    """GRPO's advantage mixed with the reweighted success of the row.

    ``H`` is the remembered entropy. The temperatures are those `logp_old_hot` and `logp_old_cold` were scored at: the
    numbers themselves are not used. Chosen: p is the share among all drawn rows, those without tokens included; under
    ``singleton="raw"`` the reward takes the place of GRPO's advantage and is mixed like any other.
    """
    del T_hot, T_cold
    base = group_advantage(case, case.reward, adv_eps=adv_eps, singleton=singleton)
    other = case.extra["logp_old_hot" if H <= H0 else "logp_old_cold"]
    solved = {b: 1.0 if case.reward[b] > threshold else 0.0 for b in case.rows()}
    p = exact_mean([solved[b] for b in case.rows()])
    a = min(abs(H0 - H), cap) / p if p > 0 else 0.0
    w = a / (1 + a)

    def advantage(b: int, t: int) -> float:
        rho, _ = ratio(other[b, t] - case.logp_old[b, t], 20.0)
        return (1 - w) * base[b] + w * solved[b] * rho

    return clipped_surrogate(
        case, advantage, eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip, log_ratio_clip=log_ratio_clip
    )


# ---- selected tokens -----------------------------------------------------------------------------


def d3s_select(A: list[float], size: int) -> list[int]:
    """The `size` members of largest variance: the k largest and the rest from the smallest, over all k."""
    best, chosen = -1.0, []
    for k in range(min(size, len(A)) + 1):
        top = sorted(range(len(A)), key=lambda i: (-A[i], i))[:k]
        rest = [i for i in range(len(A)) if i not in top]
        picked = top + sorted(rest, key=lambda i: (A[i], i))[: size - k]
        spread = math.fsum(x * x for x in centred([A[i] for i in picked])) if picked else 0.0
        if best < 0 or spread > best * (1 + 1e-9):
            best, chosen = spread, picked
    return sorted(chosen)


def d3s(
    case: Case,
    *,
    progress=0.0,
    base="grpo",
    N_init=0.5,
    K_init=0.2,
    N_final=1.0,
    K_final=1.0,
    level="cross",
    eps_low=None,
    eps_high=None,
    adv_eps=1e-6,
    singleton="zero",
    log_ratio_clip=None,
) -> Gradient:
    """Not for cases with counts above 1.

    Choices. Equal variances (up to rounding) go to the smallest k, so one row out of two is the worse one. Equal
    advantages and equal token scores go to the lowest index. The K of the token level is a share of the tokens of the
    kept rows, one ranking over the whole batch at both levels. `round` is Python's (half to even). The mean is over
    kept tokens, those of advantage 0 included.
    """
    A = group_advantage(case, case.reward, adv_eps=adv_eps, singleton=singleton)
    share_rows = (1 - progress) * N_init + progress * N_final
    share_tokens = (1 - progress) * K_init + progress * K_final
    kept = []
    for rows in [case.rows()] if level == "cross" else grouped(case).values():
        size = max(1, round(share_rows * len(rows)))
        kept += [rows[i] for i in d3s_select([A[b] for b in rows], size)]
    tokens = [(b, t) for b in sorted(kept) for t in case.positions(b)]
    tokens.sort(key=lambda token: -abs(A[token[0]]) * float(case.entropy_old[token]))  # sort() is stable
    tokens = tokens[: max(1, round(share_tokens * len(tokens)))]

    lo = 1 - ({"grpo": 0.2, "gspo": 3e-4}[base] if eps_low is None else eps_low)
    hi = 1 + ({"grpo": 0.2, "gspo": 4e-4}[base] if eps_high is None else eps_high)
    bound = {"grpo": 20.0, "gspo": 10.0}[base] if log_ratio_clip is None else log_ratio_clip
    losses, grad = [], np.zeros(case.mask.shape)
    for b, t in tokens:
        if base == "grpo":
            value, slope = ppo(token_gap(case, b, t), A[b], lo, hi, bound=bound)
        else:
            gap = row_gap(case, b)
            value, slope = ppo(min(gap, bound), A[b], lo, hi, bound=math.inf)
            slope = slope if gap < bound else 0.0
        losses.append(value / len(tokens))
        grad[b, t] += slope / len(tokens)
    return math.fsum(losses), grad


def _covariance(case: Case, A: dict[int, float]) -> list[float]:
    """(A - its token mean)(logp - its token mean) of every drawn token."""
    tokens = drawn_tokens(case)
    if not tokens:
        return []
    advantage, logp = centred([A[b] for b, _ in tokens]), centred([float(case.logp[token]) for token in tokens])
    return [a * x for a, x in zip(advantage, logp, strict=True)]


def clip_cov(
    case: Case,
    *,
    ratio=2e-4,
    lb=1.0,
    ub=5.0,
    eps_low=1.0,
    eps_high=1.0,
    adv_eps=1e-6,
    singleton="zero",
    log_ratio_clip=20.0,
    priority=None,
) -> Gradient:
    """Choices.

    "Already clipped": the clipped loss is strictly the larger one. Equal priorities, and no priorities, go by index.
    """
    A = group_advantage(case, case.reward, adv_eps=adv_eps, singleton=singleton)
    tokens, cov = drawn_tokens(case), _covariance(case, A)

    def surrogate(b: int, t: int) -> tuple[float, float]:
        return ppo(token_gap(case, b, t), A[b], 1 - eps_low, 1 + eps_high, bound=log_ratio_clip)

    def clipped(b: int, t: int) -> bool:
        r = math.exp(clip(token_gap(case, b, t), -log_ratio_clip, log_ratio_clip))
        return -clip(r, 1 - eps_low, 1 + eps_high) * A[b] > -r * A[b]

    candidates = [token for token, c in zip(tokens, cov, strict=True) if lb < c < ub and not clipped(*token)]
    if priority is not None:
        candidates.sort(key=lambda token: priority[token])
    chosen = Counter(candidates[: max(int(ratio * len(tokens)), 1)])

    def term(b: int, t: int) -> tuple[float, float]:
        value, slope = surrogate(b, t)
        left = 1 - chosen[b, t] / case.count[b]
        return left * value, left * slope

    return aggregate(case, "token_mean", term)


def kl_cov(case: Case, *, ratio=2e-3, coef=1.0, adv_eps=1e-6, singleton="zero", log_ratio_clip=20.0) -> Gradient:
    """Choice: the penalty ``|logp - logp_old|`` is not clamped."""
    A = group_advantage(case, case.reward, adv_eps=adv_eps, singleton=singleton)
    tokens, cov = drawn_tokens(case), _covariance(case, A)
    order = sorted(range(len(tokens)), key=lambda i: -cov[i])  # sorted() is stable
    chosen = Counter(tokens[i] for i in order[: max(1, int(ratio * len(tokens)))])

    def term(b: int, t: int) -> tuple[float, float]:
        gap = token_gap(case, b, t)
        r = math.exp(clip(gap, -log_ratio_clip, log_ratio_clip))
        slope = -A[b] * r if abs(gap) < log_ratio_clip else 0.0
        weight = coef * chosen[b, t] / case.count[b]
        return -A[b] * r + weight * abs(gap), slope + weight * ((gap > 0) - (gap < 0))

    return aggregate(case, "token_mean", term)


def lp_reg(
    case: Case, *, rho=0.01, beta=1.0, eps_low=0.2, eps_high=0.2, adv_eps=1e-6, singleton="zero", log_ratio_clip=20.0
) -> Gradient:
    """Choices.

    Ties of the lowest log-probs go by index. ``int(rho n) <= 1`` regularises nothing. The exponent of k3 has the house
    clamp of 20, which the clamp of k3 itself at 10 hides.
    """
    A = group_advantage(case, case.reward, adv_eps=adv_eps, singleton=singleton)
    proxy = case.extra["log_proxy"]
    negative = [(b, t) for b, t in drawn_tokens(case) if A[b] < 0]
    n = int(rho * len(negative))
    lowest = sorted(negative, key=lambda token: case.logp[token])[: n if n > 1 else 0]
    chosen = Counter(token for token in lowest if case.logp[token] < proxy[token])

    def term(b: int, t: int) -> tuple[float, float]:
        gap = token_gap(case, b, t)
        value, slope = ppo(gap, A[b], 1 - eps_low, 1 + eps_high, bound=log_ratio_clip)
        if not chosen[b, t]:
            return value, slope
        r, r_slope = ratio(gap, log_ratio_clip)
        kl, kl_slope = k3(float(case.logp[b, t]), float(proxy[b, t]))
        kl, kl_slope = (kl, kl_slope) if -10 < kl < 10 else (clip(kl, -10.0, 10.0), 0.0)
        share = chosen[b, t] / case.count[b]
        return (
            (1 - share) * value + share * (-r * A[b] + beta * kl),
            (1 - share) * slope + share * (-r_slope * A[b] + beta * kl_slope),
        )

    return aggregate(case, "token_mean", term)
