"""The off-policy objectives have these oracles, whose docstrings say what was chosen where a card is open."""

import math

import numpy as np

from tests.oracles import Case, Gradient, aggregate, centred, mean, population_std
from tests.oracles.groups import group_advantage, grouped
from tests.oracles.ratios import ratio, row_gap, token_gap


def _rec_advantage(case: Case, normalize: bool, singleton: str, drop: str, priority) -> dict[int, float]:
    out = {}
    for group in grouped(case).values():
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
        scale = population_std(rewards) + 1e-6 if normalize else 1.0
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
    indices are dropped first, the copies of a row together. In a group of one row "raw" is not normalised.
    """
    A = _rec_advantage(case, normalize, singleton, drop, row_priority)

    def passes(A: float, r: float) -> bool:
        two_side = 1 - eps_low <= r <= 1 + eps_high
        one_side = (A >= 0 and r <= 1 + eps_high) or (A <= 0 and r >= 1 - eps_low)
        ring = two_side or (A >= 0 and r <= 1 - ring_low) or (A <= 0 and r >= 1 + ring_high)
        named = {"none": True, "one-side": one_side, "gspo-one-side": one_side, "two-side": two_side, "ring": ring}
        return named[clip_mode]

    def term(b: int, t: int) -> tuple[float, float]:
        gap, logp = token_gap(case, b, t), case.logp[b, t]
        r, _ = ratio(gap, log_ratio_clip)
        tested = ratio(row_gap(case, b), log_ratio_clip)[0] if clip_mode == "gspo-one-side" else r
        w = {"none": 1.0, "importance_sampling": r, "advantage": math.exp(A[b] / temp)}[weight]
        factor = A[b] * w if passes(A[b], tested) else 0.0
        extra, extra_slope = {
            "none": (0.0, 0.0),
            "k2": (coef * gap**2, 2 * coef * gap),
            "forward-kl": (-coef * logp, -coef),
        }[regularizer]
        return -factor * logp + extra, -factor + extra_slope

    return aggregate(case, "seq_mean" if clip_mode == "gspo-one-side" else "token_mean", term)


def opmd(case: Case, *, form="simple", tau=1.0, baseline="mean", coef=0.1, singleton="zero") -> Gradient:
    """Choices.

    `singleton` overrides both baselines, and means nothing in the pairwise form, where a group of one row has no pair
    and loss 0 but counts among the groups. Equal rewards have A = 0 under logavgexp too. kimi: a row without tokens
    contributes 0, not A^2; a group of one row is still pulled to Delta = A / tau. The surrogate reads neither `tau`
    nor `baseline`.
    """
    if form == "surrogate":
        return rec(case, clip_mode="none", weight="none", regularizer="k2", coef=coef, singleton=singleton)
    rows, groups = case.rows(), list(grouped(case).values())
    delta = {b: math.fsum(token_gap(case, b, t) for t in case.positions(b)) for b in rows}
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


def asymre(case: Case, *, shift=-0.1, tau=0.0, singleton="zero") -> Gradient:
    """``-(reward - group mean - shift) logp / (1 + tau)``.

    Chosen: a group of one row is shifted too: its advantage is ``-shift`` ("zero") or ``reward - shift`` ("raw"), so
    that ``A(shift) - A(0) = -shift`` for every row, as the card says.
    """
    centre = group_advantage(case, case.reward, scale="none", singleton=singleton)

    def term(b: int, t: int) -> tuple[float, float]:
        A = (centre[b] - shift) / (1 + tau)
        return -A * case.logp[b, t], -A

    return aggregate(case, "token_mean", term)
