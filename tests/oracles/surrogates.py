"""Oracles of the objectives that change the ratio, the clip or the regulariser: `gspo` ... `ppo_outer_loop`.

Where a rule picks single tokens or rows, the copies of a row drawn w times are w separate candidates, neighbours in
the order (`rec` drops them together instead); a term that holds for some copies only counts by their share.
"""

import math
from collections import Counter

import numpy as np

from tests.oracles import Case, Gradient, aggregate, centred, mean
from tests.oracles.group_relative import dapo_keeps, group_advantage, k3, overlong_penalty, ppo, ratio

# ---- shared pieces -------------------------------------------------------------------------------


def _tokens(case: Case) -> list[tuple[int, int]]:
    """The drawn tokens, row by row."""
    return [(b, t) for b in case.rows() for t in case.positions(b)]


def _groups(case: Case) -> list[list[int]]:
    """The drawn rows of each group."""
    rows = case.rows()
    return [[b for b in rows if case.group[b] == g] for g in dict.fromkeys(case.group[b] for b in rows)]


def _gap(case: Case, b: int, t: int) -> float:
    return float(case.logp[b, t] - case.logp_old[b, t])


def _row_gap(case: Case, b: int) -> float:
    """The mean log-ratio of a row that has tokens."""
    return mean([_gap(case, b, t) for t in case.positions(b)])


def _population_std(xs: list[float]) -> float:
    return math.sqrt(math.fsum(x * x for x in centred(xs)) / len(xs))


def _clip(x: float, lo: float, hi: float) -> float:
    return min(max(x, lo), hi)


# ---- sequence ratios -----------------------------------------------------------------------------


def gspo(case: Case, *, eps_low=3e-4, eps_high=4e-4, adv_eps=1e-6, singleton="zero", log_ratio_clip=10.0) -> Gradient:
    """Choice: where the mean log-ratio reaches the clamp the gradient is 0; below there is no clamp."""
    A = group_advantage(case, case.reward, adv_eps=adv_eps, singleton=singleton)
    rows, losses, grad = case.rows(), [], np.zeros(case.mask.shape)
    for b in rows:
        n = len(case.positions(b))
        if n == 0:
            continue
        x = _row_gap(case, b)
        value, slope = ppo(min(x, log_ratio_clip), A[b], 1 - eps_low, 1 + eps_high, bound=math.inf)
        losses.append(value / len(rows))
        for t in case.positions(b):
            grad[b, t] += slope / n / len(rows) if x < log_ratio_clip else 0.0
    return math.fsum(losses), grad


def gspo_token(
    case: Case, *, eps_low=3e-4, eps_high=4e-4, agg="seq_mean", adv_eps=1e-6, singleton="zero", log_ratio_clip=10.0
) -> Gradient:
    """Choice: the clamp acts on the constant ``s_i`` only, so a clamped row keeps its gradient (unlike `gspo`)."""
    A = group_advantage(case, case.reward, adv_eps=adv_eps, singleton=singleton)

    def term(b: int, t: int) -> tuple[float, float]:
        x = min(_row_gap(case, b), log_ratio_clip)
        return ppo(x, A[b], 1 - eps_low, 1 + eps_high, bound=math.inf)

    return aggregate(case, agg, term)


# ---- detached weights ----------------------------------------------------------------------------


def cispo(
    case: Case, *, eps_low=1.0, eps_high=4.0, agg="token_mean", adv_eps=1e-6, singleton="zero", log_ratio_clip=20.0
) -> Gradient:
    """Choice: the clamp acts on the constant weight only and takes no gradient away."""
    A = group_advantage(case, case.reward, adv_eps=adv_eps, singleton=singleton)

    def term(b: int, t: int) -> tuple[float, float]:
        r, _ = ratio(_gap(case, b, t), log_ratio_clip)
        weight = _clip(r, 1 - eps_low, 1 + eps_high) * A[b]
        return -weight * case.logp[b, t], -weight

    return aggregate(case, agg, term)


def _rec_advantage(case: Case, normalize: bool, singleton: str, drop: str, priority) -> dict[int, float]:
    out = {}
    for group in _groups(case):
        if len(group) == 1:
            out[group[0]] = {"zero": 0.0, "raw": float(case.reward[group[0]])}[singleton]
            continue
        centre = dict(zip(group, centred([float(case.reward[b]) for b in group]), strict=True))
        kept = list(group)
        if drop == "balance":
            negatives = [b for b in dict.fromkeys(group) if centre[b] < 0]
            excess = sum(centre[b] < 0 for b in group) - sum(centre[b] >= 0 for b in group)
            for b in negatives if priority is None else sorted(negatives, key=lambda b: priority[b]):
                if excess > 0:
                    excess -= group.count(b)
                    kept = [j for j in kept if j != b]
        rewards = [float(case.reward[b]) for b in kept]
        scale = _population_std(rewards) + 1e-6 if normalize else 1.0
        out |= dict.fromkeys(group, 0.0)
        out |= {b: x / scale for b, x in zip(kept, centred(rewards), strict=True)}
    return out


def rec(
    case: Case,
    *,
    clip_mode="one-side",
    weight="none",
    eps_low=0.2,
    eps_high=0.2,
    ring_low=0.6,
    ring_high=2.0,
    regularizer="none",
    coef=0.1,
    drop="none",
    temp=1.0,
    normalize=False,
    singleton="zero",
    log_ratio_clip=20.0,
    row_priority=None,
) -> Gradient:
    """Choices.

    Dropped rows have A = 0 and keep their regulariser. With gspo-one-side only the test reads the row's ratio: the
    importance weight stays the token's. The regulariser reads unclamped log-ratios. Without priorities the lowest
    indices are dropped first. In a group of one row the advantage "raw" is not normalised.
    """
    A = _rec_advantage(case, normalize, singleton, drop, row_priority)

    def passes(A: float, r: float) -> bool:
        two_side = 1 - eps_low <= r <= 1 + eps_high
        one_side = (A >= 0 and r <= 1 + eps_high) or (A <= 0 and r >= 1 - eps_low)
        ring = two_side or (A >= 0 and r <= 1 - ring_low) or (A <= 0 and r >= 1 + ring_high)
        named = {"none": True, "one-side": one_side, "gspo-one-side": one_side, "two-side": two_side, "ring": ring}
        return named[clip_mode]

    def term(b: int, t: int) -> tuple[float, float]:
        gap, logp = _gap(case, b, t), case.logp[b, t]
        r, _ = ratio(gap, log_ratio_clip)
        tested = ratio(_row_gap(case, b), log_ratio_clip)[0] if clip_mode == "gspo-one-side" else r
        w = {"none": 1.0, "importance_sampling": r, "advantage": math.exp(A[b] / temp)}[weight]
        factor = A[b] * w if passes(A[b], tested) else 0.0
        extra, extra_slope = {
            "none": (0.0, 0.0),
            "k2": (coef * gap**2, 2 * coef * gap),
            "forward-kl": (-coef * logp, -coef),
        }[regularizer]
        return -factor * logp + extra, -factor + extra_slope

    return aggregate(case, "seq_mean" if clip_mode == "gspo-one-side" else "token_mean", term)


# ---- mirror descent ------------------------------------------------------------------------------


def opmd(case: Case, *, form="simple", tau=1.0, baseline="mean", coef=0.1, singleton="zero") -> Gradient:
    """Choices.

    `singleton` overrides both baselines, and means nothing in the pairwise form, where a group of one row has no pair
    and loss 0 but counts among the groups. Equal rewards have A = 0 under logavgexp too. kimi: a row without tokens
    contributes 0, not A^2; a group of one row is still pulled to Delta = A / tau. The surrogate reads neither `tau`
    nor `baseline`.
    """
    if form == "surrogate":
        return rec(case, clip_mode="none", weight="none", regularizer="k2", coef=coef, singleton=singleton)
    rows, groups = case.rows(), _groups(case)
    delta = {b: math.fsum(_gap(case, b, t) for t in case.positions(b)) for b in rows}
    losses, grad = [], np.zeros(case.mask.shape)

    if form == "pairwise":
        for group in groups:
            x = centred([float(case.reward[b]) - tau * delta[b] for b in group])
            norm = len(group) * len(groups) * (1 + tau) ** 2
            for b, c in zip(group, x, strict=True):
                if case.positions(b):
                    losses.append(c**2 / norm)
                for t in case.positions(b):
                    grad[b, t] += -2 * tau * c / norm
        return math.fsum(losses), grad

    A = {}
    for group in groups:
        rewards = [float(case.reward[b]) for b in group]
        top = max(rewards)
        if len(group) == 1:
            A[group[0]] = {"zero": 0.0, "raw": top}[singleton]
        elif baseline == "mean" or min(rewards) == top:
            A |= dict(zip(group, centred(rewards), strict=True))
        else:
            level = top + tau * math.log(mean([math.exp((x - top) / tau) for x in rewards]))
            A |= {b: x - level for b, x in zip(group, rewards, strict=True)}

    if form == "simple":
        return aggregate(case, "token_mean", lambda b, t: (-A[b] * case.logp[b, t] / (1 + tau), -A[b] / (1 + tau)))
    for b in rows:  # kimi
        residual = A[b] - tau * delta[b]
        if case.positions(b):
            losses.append(residual**2 / len(rows))
        for t in case.positions(b):
            grad[b, t] += -2 * tau * residual / len(rows)
    return math.fsum(losses), grad


# ---- adapted clips -------------------------------------------------------------------------------

BAPO = {  # mode -> target, low (start, max, step), high (start, max, step)
    "official": (1.0, (0.6, 0.8, 0.05), (1.2, 2.0, 0.05)),
    "paper": (0.4, (0.6, 0.9, 0.02), (1.2, 3.0, 0.05)),
}


def _bapo_ladder(mode: str, start: float, top: float, step: float) -> list[float]:
    """The values a bound goes through."""
    if mode == "official":
        return [start] + [min(start + k * step, top) for k in range(1, math.ceil((top - start) / step - 1e-6) + 1)]
    return [start] + [start + k * step for k in range(1, math.floor((top - start) / step + 1e-6) + 1)]


def bapo_bounds(case: Case, A, mode, target, low, high, log_ratio_clip) -> tuple[float, float]:
    """The searched ``(lo, hi)``."""

    def short(lo: float, hi: float) -> bool:
        """Whether the positives carry less than the target."""
        P, N = [], []
        for b, t in _tokens(case):
            r, _ = ratio(_gap(case, b, t), log_ratio_clip)
            weight = math.exp(case.logp_old[b, t]) if mode == "paper" else 1.0
            (P if A[b] >= 0 else N).append(weight * (min(r, hi) if A[b] >= 0 else max(r, lo)) * abs(A[b]))
        P, N = math.fsum(P), math.fsum(N)
        if mode == "official":
            return N > 0 and P / (N + 1e-8) < target
        return P + N > 0 and P / (P + N) < target

    lows, highs = _bapo_ladder(mode, *low), _bapo_ladder(mode, *high)
    i = j = 0
    for bound in ("low", "high") if mode == "official" else ("high", "low"):
        if bound == "low":
            while i + 1 < len(lows) and short(lows[i], highs[j]):
                i += 1
        else:
            while j + 1 < len(highs) and short(lows[i], highs[j]):
                j += 1
    return lows[i], highs[j]


def bapo(
    case: Case,
    *,
    mode="official",
    target=None,
    low0=None,
    low_max=None,
    low_step=None,
    high0=None,
    high_max=None,
    high_step=None,
    dual_clip=3.0,
    adv_eps=1e-6,
    singleton="zero",
    log_ratio_clip=20.0,
) -> Gradient:
    """Choices.

    The comparison with the target is strict and is made again, with both bounds as they are, before every step. The
    masses use the clamped ratio. A = 0 is on the positive side. A maximum below the start means no step.
    """
    A = group_advantage(case, case.reward, adv_eps=adv_eps, singleton=singleton)
    defaults = BAPO[mode]
    low, high = (
        tuple(d if x is None else x for x, d in zip(given, default, strict=True))
        for given, default in (((low0, low_max, low_step), defaults[1]), ((high0, high_max, high_step), defaults[2]))
    )
    lo, hi = bapo_bounds(case, A, mode, defaults[0] if target is None else target, low, high, log_ratio_clip)
    return aggregate(
        case, "token_mean", lambda b, t: ppo(_gap(case, b, t), A[b], lo, hi, dual=dual_clip, bound=log_ratio_clip)
    )


def hapo_signal(case: Case, rho: float, sign: str) -> dict[tuple[int, int], float]:
    """The entropy signal h of every drawn token."""
    level = {(b, t): math.log(max(float(case.entropy_old[b, t]), 1e-8)) for b, t in _tokens(case)}
    drawn = [level[token] for token in _tokens(case)]
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
    for group in _groups(case):
        copied = [b for b in group for _ in case.positions(b)]
        if len(group) == 1 or not copied:
            A |= {b: grpo_A[b] for b in group}
            continue
        rewards = [reward[b] for b in copied]
        std = _population_std(rewards)
        token_A = {b: x / (std + adv_eps) for b, x in zip(copied, centred(rewards), strict=True)}
        trips = any(abs(x) >= guard for x in token_A.values())
        A |= {b: grpo_A[b] if trips else token_A[b] for b in token_A}

    def term(b: int, t: int) -> tuple[float, float]:
        signal = h[b, t]
        low = eps_low * (1 - clip_strength * signal) if signal <= 0 else eps_low
        high = eps_high * (1 + clip_strength * signal) if signal > 0 else eps_high
        r, _ = ratio(_gap(case, b, t), log_ratio_clip)
        inside = 1 - low / 2 < r < 1 + high / 2
        factor = 1 + redistribution * signal if (not inside if signal > 0 else inside) else 1.0
        return ppo(_gap(case, b, t), A[b] * factor, 1 - low, 1 + high, dual=dual_clip, bound=log_ratio_clip)

    return aggregate(case, "token_mean", term)


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
    for rows in [case.rows()] if level == "cross" else _groups(case):
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
            value, slope = ppo(_gap(case, b, t), A[b], lo, hi, bound=bound)
        else:
            value, slope = ppo(min(_row_gap(case, b), bound), A[b], lo, hi, bound=math.inf)
        losses.append(value / len(tokens))
        grad[b, t] += slope / len(tokens)
    return math.fsum(losses), grad


def _covariance(case: Case, A: dict[int, float]) -> list[float]:
    """(A - its token mean)(logp - its token mean) of every drawn token."""
    tokens = _tokens(case)
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
    tokens, cov = _tokens(case), _covariance(case, A)

    def surrogate(b: int, t: int) -> tuple[float, float]:
        return ppo(_gap(case, b, t), A[b], 1 - eps_low, 1 + eps_high, bound=log_ratio_clip)

    def clipped(b: int, t: int) -> bool:
        r = math.exp(_clip(_gap(case, b, t), -log_ratio_clip, log_ratio_clip))
        return -_clip(r, 1 - eps_low, 1 + eps_high) * A[b] > -r * A[b]

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
    tokens, cov = _tokens(case), _covariance(case, A)
    order = sorted(range(len(tokens)), key=lambda i: -cov[i])  # sorted() is stable
    chosen = Counter(tokens[i] for i in order[: max(1, int(ratio * len(tokens)))])

    def term(b: int, t: int) -> tuple[float, float]:
        gap = _gap(case, b, t)
        r = math.exp(_clip(gap, -log_ratio_clip, log_ratio_clip))
        slope = -A[b] * r if abs(gap) < log_ratio_clip else 0.0
        weight = coef * chosen[b, t] / case.count[b]
        return -A[b] * r + weight * abs(gap), slope + weight * ((gap > 0) - (gap < 0))

    return aggregate(case, "token_mean", term)


# ---- regularised ratios --------------------------------------------------------------------------


def mhpo(
    case: Case, *, c=1.5, k_pos=1.5, lam_pos=1.0, k_neg=2.0, lam_neg=0.8, agg="seq_mean", adv_eps=1e-6, singleton="zero"
) -> Gradient:
    """No choice left."""
    A = group_advantage(case, case.reward, adv_eps=adv_eps, singleton=singleton)

    def softplus(x: float) -> float:
        return max(x, 0.0) + math.log1p(math.exp(-abs(x)))

    def term(b: int, t: int) -> tuple[float, float]:
        bend = math.tanh(_gap(case, b, t) / c)
        psi = c * bend
        zeta = (softplus(psi) / lam_pos) ** k_pos + (softplus(-psi) / lam_neg) ** k_neg
        value = -math.exp(psi - zeta) * A[b]
        return value, value * (1 - bend**2)

    return aggregate(case, agg, term)


def r2vpo(case: Case, *, lam=0.1, delta=0.02, adv_eps=1e-6, singleton="zero", log_ratio_clip=5.0) -> Gradient:
    """Choice: one clamped ratio serves both terms, so neither has a gradient outside the clamp."""
    A = group_advantage(case, case.reward, adv_eps=adv_eps, singleton=singleton)

    def term(b: int, t: int) -> tuple[float, float]:
        r, slope = ratio(_gap(case, b, t), log_ratio_clip)
        return -r * A[b] + lam * ((r - 1) ** 2 - delta), slope * (-A[b] + 2 * lam * (r - 1))

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
    negative = [(b, t) for b, t in _tokens(case) if A[b] < 0]
    n = int(rho * len(negative))
    lowest = sorted(negative, key=lambda token: case.logp[token])[: n if n > 1 else 0]
    chosen = Counter(token for token in lowest if case.logp[token] < proxy[token])

    def term(b: int, t: int) -> tuple[float, float]:
        gap = _gap(case, b, t)
        value, slope = ppo(gap, A[b], 1 - eps_low, 1 + eps_high, bound=log_ratio_clip)
        if not chosen[b, t]:
            return value, slope
        r, r_slope = ratio(gap, log_ratio_clip)
        kl, kl_slope = k3(float(case.logp[b, t]), float(proxy[b, t]))
        kl, kl_slope = (kl, kl_slope) if -10 < kl < 10 else (_clip(kl, -10.0, 10.0), 0.0)
        share = chosen[b, t] / case.count[b]
        return (
            (1 - share) * value + share * (-r * A[b] + beta * kl),
            (1 - share) * slope + share * (-r_slope * A[b] + beta * kl_slope),
        )

    return aggregate(case, "token_mean", term)


def ppo_outer_loop(case: Case, *, eta=1.0, adv_eps=1e-6, singleton="zero", log_ratio_clip=20.0) -> Gradient:
    """Choice: ``log r`` is the clamped one, so outside the clamp no term has a gradient; GRPO advantage."""
    A = group_advantage(case, case.reward, adv_eps=adv_eps, singleton=singleton)

    def term(b: int, t: int) -> tuple[float, float]:
        gap = _gap(case, b, t)
        r, slope = ratio(gap, log_ratio_clip)
        log_r = _clip(gap, -log_ratio_clip, log_ratio_clip)
        inside = abs(gap) < log_ratio_clip
        return -r * A[b] + (r - 1 - log_r) / eta, -slope * A[b] + ((r - 1) / eta if inside else 0.0)

    return aggregate(case, "token_mean", term)
