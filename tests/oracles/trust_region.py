"""The objectives that change the ratio, the clip or its penalty have these oracles; docstrings say what was chosen."""

import math

import numpy as np

from tests.oracles import Case, Gradient, aggregate
from tests.oracles.groups import group_advantage
from tests.oracles.ratios import clip, drawn_tokens, ppo, ratio, row_gap, token_gap

# ---- sequence ratios -----------------------------------------------------------------------------


def gspo(case: Case, *, eps_low=3e-4, eps_high=4e-4, adv_eps=1e-6, singleton="zero", log_ratio_clip=10.0) -> Gradient:
    """Choice: where the mean log-ratio reaches the clamp the gradient is 0; below there is no clamp."""
    A = group_advantage(case, case.reward, adv_eps=adv_eps, singleton=singleton)
    rows, losses, grad = case.rows(), [], np.zeros(case.mask.shape)
    for b in rows:
        n = len(case.positions(b))
        if n == 0:
            continue
        x = row_gap(case, b)
        value, slope = ppo(min(x, log_ratio_clip), A[b], 1 - eps_low, 1 + eps_high, bound=math.inf)
        losses.append(value / len(rows))
        for t in case.positions(b):
            grad[b, t] += slope / n / len(rows) if x < log_ratio_clip else 0.0
    return math.fsum(losses), grad


def gspo_token(
    case: Case, *, eps_low=3e-4, eps_high=4e-4, agg="seq_mean", adv_eps=1e-6, singleton="zero", log_ratio_clip=10.0
) -> Gradient:
    """Beyond the clamp value and gradient are those of `gspo`: no gradient flows."""
    A = group_advantage(case, case.reward, adv_eps=adv_eps, singleton=singleton)

    def term(b: int, t: int) -> tuple[float, float]:
        x = row_gap(case, b)
        value, slope = ppo(min(x, log_ratio_clip), A[b], 1 - eps_low, 1 + eps_high, bound=math.inf)
        return value, slope if x < log_ratio_clip else 0.0

    return aggregate(case, agg, term)


# ---- detached weights ----------------------------------------------------------------------------


def cispo(
    case: Case, *, eps_low=1.0, eps_high=4.0, agg="token_mean", adv_eps=1e-6, singleton="zero", log_ratio_clip=20.0
) -> Gradient:
    """Choice: the clamp acts on the constant weight only and takes no gradient away."""
    A = group_advantage(case, case.reward, adv_eps=adv_eps, singleton=singleton)

    def term(b: int, t: int) -> tuple[float, float]:
        r, _ = ratio(token_gap(case, b, t), log_ratio_clip)
        weight = clip(r, 1 - eps_low, 1 + eps_high) * A[b]
        return -weight * case.logp[b, t], -weight

    return aggregate(case, agg, term)


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
        for b, t in drawn_tokens(case):
            r, _ = ratio(token_gap(case, b, t), log_ratio_clip)
            weight = math.exp(case.logp_old[b, t]) if mode == "paper" else 1.0
            (P if A[b] >= 0 else N).append(weight * (min(r, hi) if A[b] >= 0 else max(r, lo)) * abs(A[b]))
        P, N = math.fsum(P), math.fsum(N)
        if mode == "official":
            return N > 0 and P / (N + 1e-8) < target
        return N > 0 and P / (P + N) < target

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
        case, "token_mean", lambda b, t: ppo(token_gap(case, b, t), A[b], lo, hi, dual=dual_clip, bound=log_ratio_clip)
    )


# ---- regularised ratios --------------------------------------------------------------------------


def mhpo(
    case: Case, *, c=1.5, k_pos=1.5, lam_pos=1.0, k_neg=2.0, lam_neg=0.8, agg="seq_mean", adv_eps=1e-6, singleton="zero"
) -> Gradient:
    """No choice left."""
    A = group_advantage(case, case.reward, adv_eps=adv_eps, singleton=singleton)

    def softplus(x: float) -> float:
        return max(x, 0.0) + math.log1p(math.exp(-abs(x)))

    def term(b: int, t: int) -> tuple[float, float]:
        bend = math.tanh(token_gap(case, b, t) / c)
        psi = c * bend
        zeta = (softplus(psi) / lam_pos) ** k_pos + (softplus(-psi) / lam_neg) ** k_neg
        value = -math.exp(psi - zeta) * A[b]
        return value, value * (1 - bend**2)

    return aggregate(case, agg, term)


def r2vpo(case: Case, *, lam=0.1, delta=0.02, adv_eps=1e-6, singleton="zero", log_ratio_clip=5.0) -> Gradient:
    """Choice: one clamped ratio serves both terms, so neither has a gradient outside the clamp."""
    A = group_advantage(case, case.reward, adv_eps=adv_eps, singleton=singleton)

    def term(b: int, t: int) -> tuple[float, float]:
        r, slope = ratio(token_gap(case, b, t), log_ratio_clip)
        return -r * A[b] + lam * ((r - 1) ** 2 - delta), slope * (-A[b] + 2 * lam * (r - 1))

    return aggregate(case, "token_mean", term)


def ppo_outer_loop(case: Case, *, eta=1.0, adv_eps=1e-6, singleton="zero", log_ratio_clip=20.0) -> Gradient:
    """Choice: ``log r`` is the clamped one, so outside the clamp no term has a gradient; GRPO advantage."""
    A = group_advantage(case, case.reward, adv_eps=adv_eps, singleton=singleton)

    def term(b: int, t: int) -> tuple[float, float]:
        gap = token_gap(case, b, t)
        r, slope = ratio(gap, log_ratio_clip)
        log_r = clip(gap, -log_ratio_clip, log_ratio_clip)
        inside = abs(gap) < log_ratio_clip
        return -r * A[b] + (r - 1 - log_r) / eta, -slope * A[b] + ((r - 1) / eta if inside else 0.0)

    return aggregate(case, "token_mean", term)
