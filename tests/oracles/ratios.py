"""The oracles share these ratios, clips and KL estimates of tokens, with their slopes in the log-prob."""

import math
from collections.abc import Callable

from tests.oracles import Case, Gradient, aggregate, mean


def drawn_tokens(case: Case) -> list[tuple[int, int]]:
    """The drawn tokens, row by row."""
    return [(b, t) for b in case.rows() for t in case.positions(b)]


def token_gap(case: Case, b: int, t: int) -> float:
    return float(case.logp[b, t] - case.logp_old[b, t])


def row_gap(case: Case, b: int) -> float:
    """The mean log-ratio of a row that has tokens."""
    return mean([token_gap(case, b, t) for t in case.positions(b)])


def clip(x: float, lo: float, hi: float) -> float:
    return min(max(x, lo), hi)


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


def k2(logp: float, ref: float) -> tuple[float, float]:
    """``d^2 / 2``, ``d = logp - ref``, and its slope in ``logp``."""
    d = logp - ref
    return d * d / 2, d


def k3(logp: float, ref: float, bound: float = 20.0) -> tuple[float, float]:
    """``exp(x) - x - 1``, ``x = ref - logp`` clamped to ``±bound``: beyond it the slope is 0."""
    x = ref - logp
    e, slope = ratio(x, bound)
    return e - min(max(x, -bound), bound) - 1, (1 - slope if abs(x) < bound else 0.0)


def clipped_surrogate(
    case: Case,
    A: Callable[[int, int], float],
    *,
    eps_low: float,
    eps_high: float,
    agg="token_mean",
    L_const=None,
    dual_clip=None,
    log_ratio_clip=20.0,
    beta=0.0,
    kl=k3,
) -> Gradient:
    """The clipped surrogate of the token advantage ``A(row, position)``, plus ``beta * kl(logp, ref)``."""

    def term(b: int, t: int) -> tuple[float, float]:
        log_ratio = case.logp[b, t] - case.logp_old[b, t]
        value, slope = ppo(log_ratio, A(b, t), 1 - eps_low, 1 + eps_high, dual=dual_clip, bound=log_ratio_clip)
        if not beta:
            return value, slope
        penalty, penalty_slope = kl(case.logp[b, t], case.ref[b, t])
        return value + beta * penalty, slope + beta * penalty_slope

    return aggregate(case, agg, term, L_const)
