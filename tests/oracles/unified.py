"""The unified policy-gradient estimator has this oracle: its table, row by row."""

import math

import numpy as np

from tests.oracles import Case, Gradient, aggregate
from tests.oracles.groups import group_advantage
from tests.oracles.hybrid import is_expert, part
from tests.oracles.ratios import row_gap, token_gap


def upge(
    case: Case,
    *,
    method="grpo",
    eps=0.2,
    gamma=0.1,
    use_std=True,
    adv_eps=1e-6,
    singleton="zero",
    agg="token_mean",
    L_const=None,
    log_ratio_clip=20.0,
) -> Gradient:
    """``-agg(w logp)`` with constant w, over the rows that the method uses."""
    offline = method in ("sft", "srft_off", "luffy_off")
    used = part(case, offline)
    if method == "sft" and not used.rows():
        used = case
    base = case if offline else used
    A = group_advantage(base, case.reward, scale="group" if use_std else "none", adv_eps=adv_eps, singleton=singleton)

    def inside(a: float, x: float) -> bool:
        return abs(x) < log_ratio_clip and (math.exp(x) <= 1 + eps if a >= 0 else math.exp(x) >= 1 - eps)

    def weight(b: int, t: int) -> float:
        p = math.exp(case.logp[b, t])
        if method == "sft":
            return 1.0
        if method == "reinforce":
            return 1.0 if case.reward[b] > 0 else -1.0
        if method == "srft_off":
            return p * A[b]
        if method == "luffy_off":
            return A[b] * p * gamma / (p + gamma) ** 2
        x = row_gap(case, b) if method == "gspo" else token_gap(case, b, t)
        a = float(case.extra["token_adv"][b, t]) if method == "ppo" else A[b]
        if method == "cispo":
            return a * min(max(math.exp(min(max(x, -log_ratio_clip), log_ratio_clip)), 1 - eps), 1 + eps)
        return a * math.exp(x) if inside(a, x) else 0.0

    def term(b: int, t: int) -> tuple[float, float]:
        w = weight(b, t)
        return -w * case.logp[b, t], -w

    assert offline or not any(is_expert(used, b) for b in used.rows())
    out = aggregate(used, agg, term, L_const)
    return out[0], np.asarray(out[1])
