"""Oracles of the objectives that differ from their relatives in the advantage.

`reinforce_pp`, `lite_ppo`, `asymre`, `bnpo`, `a_grae`, `adora`, `canon`, `gtpo`, `spo_single_stream`, `spo_segment`
and `dcpo_distribution`. Where a card leaves a choice, the docstring says what was chosen.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from tests.oracles import Case, Gradient, aggregate, centred, mean, sample_std
from tests.oracles.group_relative import group_advantage, grpo, k3, ppo, ratio

# ---- shared pieces -------------------------------------------------------------------------------


def _groups(case: Case) -> dict[int, list[int]]:
    """Group id -> its drawn rows; a group nothing was drawn of does not exist."""
    out = {}
    for b in case.rows():
        out.setdefault(int(case.group[b]), []).append(b)
    return out


def _exact_mean(xs: list[float]) -> float:
    """The mean, exactly x of a list of x's; 0 of nothing."""
    if not xs:
        return 0.0
    return xs[0] if min(xs) == max(xs) else mean(xs)


def _row_mean(case: Case, x: np.ndarray, b: int) -> float:
    return _exact_mean([float(x[b, t]) for t in case.positions(b)])


def _whitened(drawn: list[float]) -> list[float]:
    """``(x - mean) / sqrt(sample variance + 1e-8)``; exactly 0 of equal numbers, of one number."""
    scale = math.sqrt(sample_std(drawn) ** 2 + 1e-8)
    return [c / scale for c in centred(drawn)]


def k2(logp: float, ref: float) -> tuple[float, float]:
    """``d^2 / 2``, ``d = logp - ref``, and its slope in ``logp``."""
    d = logp - ref
    return d * d / 2, d


def _clipped(
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


# ---- the batch as baseline -----------------------------------------------------------------------


def reinforce_pp(
    case: Case,
    *,
    variant="standard",
    gamma=1.0,
    kl_coef=0.01,
    kl_estimator="k2",
    eps_low=0.2,
    eps_high=0.2,
    singleton="zero",
    log_ratio_clip=20.0,
) -> Gradient:
    """Returns-to-go, whitened over the tokens of the batch.

    Chosen: the discount counts ordinals (a hole in the mask does not discount); the log-ratio of the KL in the reward
    is not clamped, nor is k2 (k3 is, at 20); ``singleton`` concerns the baseline variant only, "raw" leaves the reward
    as it is before whitening; ``kl_estimator`` concerns the baseline variant only.
    """
    if variant == "standard":
        reward = {b: float(case.reward[b]) for b in case.rows()}
    else:
        reward = group_advantage(case, case.reward, scale="none", singleton=singleton)
    returns = {}
    for b in set(case.rows()):
        G = None
        for t in reversed(case.positions(b)):
            G = reward[b] if G is None else gamma * G
            if variant == "standard" and kl_coef:
                G -= kl_coef * (case.logp_old[b, t] - case.ref[b, t])
            returns[b, t] = G
    tokens = [(b, t) for b in case.rows() for t in case.positions(b)]
    A = dict(zip(tokens, _whitened([returns[token] for token in tokens]), strict=True))
    return _clipped(
        case,
        lambda b, t: A[b, t],
        eps_low=eps_low,
        eps_high=eps_high,
        log_ratio_clip=log_ratio_clip,
        beta=kl_coef if variant == "baseline" else 0.0,
        kl={"k2": k2, "k3": k3}[kl_estimator],
    )


def lite_ppo(case: Case, *, eps_low=0.2, eps_high=0.2, adv_eps=1e-6, singleton="zero", log_ratio_clip=20.0) -> Gradient:
    """Group mean, batch std, token mean.

    Chosen: the std is over all drawn rows, those of one-row groups and those without tokens included.
    """
    return grpo(
        case,
        eps_low=eps_low,
        eps_high=eps_high,
        beta=0,
        adv_eps=adv_eps,
        scale="batch",
        singleton=singleton,
        agg="token_mean",
        log_ratio_clip=log_ratio_clip,
    )


def spo_single_stream(
    case: Case, *, eps_low=0.2, eps_high=0.28, dual_clip=10.0, adv_eps=1e-8, log_ratio_clip=20.0
) -> Gradient:
    """``reward - v``, normalised over the batch.

    Chosen: rows without tokens are in the mean and the std; groups play no part.
    """
    rows = case.rows()
    raw = [float(case.reward[b]) - float(case.extra["tracker_value"][b]) for b in rows]
    std = sample_std(raw)
    A = {b: c / (std + adv_eps) for b, c in zip(rows, centred(raw), strict=True)}
    return _clipped(
        case, lambda b, t: A[b], eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip, log_ratio_clip=log_ratio_clip
    )


# ---- the group as baseline -----------------------------------------------------------------------


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


def _log_power(x: float, k: float) -> float:
    """``log(x^k)``, with ``0^0 = 1``."""
    if k == 0:
        return 0.0
    return k * math.log(x) if x > 0 else -math.inf


def _inverse_beta_density(p: float, all_p: list[float]) -> float:
    """``1 / BetaPDF(p)`` of the Beta fitted to ``all_p``, at most 1e6."""
    alpha = beta = 1.0
    if len(all_p) > 1:
        m, v = _exact_mean(all_p), max(sample_std(all_p) ** 2, 1e-8)
        c = m * (1 - m) / v - 1
        alpha, beta = max(1 + c * m / 3, 1.0), max(1 + c * (1 - m) / 3, 1.0)
    log_norm = math.lgamma(alpha + beta) - math.lgamma(alpha) - math.lgamma(beta)
    log_density = log_norm + _log_power(p, alpha - 1) + _log_power(1 - p, beta - 1)
    return math.exp(min(-log_density, math.log(1e6)))


def _bnpo_advantage(case: Case, u: list[float], singleton: str) -> dict[int, float]:
    centre = group_advantage(case, u, scale="none", singleton=singleton)
    p = {g: _exact_mean([u[b] for b in rows]) for g, rows in _groups(case).items()}
    assert all(0 <= x <= 1 for x in p.values()), "rewards outside [min, max]"
    out = {}
    for g, rows in _groups(case).items():
        w = 1.0 if len(rows) == 1 else _inverse_beta_density(p[g], list(p.values()))
        out |= {b: w * centre[b] for b in rows}
    return out


def bnpo(
    case: Case,
    *,
    min=0.0,
    max=1.0,
    eps_low=0.2,
    eps_high=0.28,
    dual_clip=10.0,
    components=False,
    singleton="zero",
    log_ratio_clip=20.0,
) -> Gradient:
    """Groups weighted by 1 / the density of their success rate.

    Chosen: ``singleton="raw"`` means the mapped reward ``u``, without weight; groups of one row are among the success
    rates the Beta is fitted to all the same. Every component has its own fit and the same range [min, max].
    """
    rewards = case.extra["rewards_multi"] if components else case.reward[:, None]
    per_component = [
        _bnpo_advantage(case, [(float(r) - min) / (max - min) for r in rewards[:, k]], singleton)
        for k in range(rewards.shape[1])
    ]
    A = {b: mean([component[b] for component in per_component]) for b in case.rows()}
    return _clipped(
        case,
        lambda b, t: A[b],
        eps_low=eps_low,
        eps_high=eps_high,
        agg="seq_sum",
        dual_clip=dual_clip,
        log_ratio_clip=log_ratio_clip,
    )


def a_grae(
    case: Case,
    *,
    alpha=1.0,
    easy_form="paper",
    eps_low=0.2,
    eps_high=0.2,
    agg="seq_mean",
    L_const=None,
    dual_clip=None,
    adv_eps=1e-6,
    singleton="zero",
    log_ratio_clip=20.0,
) -> Gradient:
    """GRPO's advantage re-weighted from easy to hard, its positive part damped.

    Chosen: groups of one row count in omega; under ``singleton="raw"`` their reward takes the place of GRPO's advantage
    and is weighted with p = reward like any other (so it is 0 for a reward of 0 or 1).
    """
    base = group_advantage(case, case.reward, adv_eps=adv_eps, singleton=singleton)
    p = {g: _exact_mean([float(case.reward[b]) for b in rows]) for g, rows in _groups(case).items()}
    omega = _exact_mean(list(p.values()))

    def advantage(b: int) -> float:
        rate = p[int(case.group[b])]
        if not 0 < rate < 1:
            return 0.0
        easy = {"paper": math.sqrt(1 - rate), "official": 1 - math.sqrt(rate) + 1e-6}[easy_form]
        A = omega / 2 * base[b] / math.sqrt(rate) + (1 - omega) / 2 * base[b] / easy
        return A * min(1.0, omega / alpha) if A > 0 else A

    return _clipped(
        case,
        lambda b, t: advantage(b),
        eps_low=eps_low,
        eps_high=eps_high,
        agg=agg,
        L_const=L_const,
        dual_clip=dual_clip,
        log_ratio_clip=log_ratio_clip,
    )


def adora(
    case: Case,
    *,
    max_len,
    lam=0.1,
    rule="llm",
    correct_score=0.5,
    beta=0.001,
    eps_low=0.2,
    eps_high=0.2,
    agg="seq_mean",
    L_const=None,
    dual_clip=None,
    adv_eps=1e-6,
    singleton="zero",
    log_ratio_clip=20.0,
) -> Gradient:
    """GRPO, groups without the wanted trend in length scaled by ``lam``.

    Chosen: correct means ``reward > correct_score``; "non-truncated" restricts the incorrect rows only; the copies of a
    row count in the mean length; the length is the number of masked tokens, 0 for an empty row; one-row groups are
    weighted like any other (which matters under ``singleton="raw"``).
    """
    base = group_advantage(case, case.reward, adv_eps=adv_eps, singleton=singleton)
    weight = {}
    for rows in _groups(case).values():
        correct = [len(case.positions(b)) for b in rows if case.reward[b] > correct_score]
        wrong = [len(case.positions(b)) for b in rows if case.reward[b] <= correct_score]
        wrong = [n for n in wrong if n < max_len]
        longest = max(correct) if correct else -math.inf
        if rule == "llm":
            wanted = longest > (mean(wrong) if wrong else -math.inf)
        else:
            wanted = not correct or longest > (mean(wrong) if wrong else math.inf)
        weight |= dict.fromkeys(rows, 1.0 if wanted else lam)
    return _clipped(
        case,
        lambda b, t: weight[b] * base[b],
        eps_low=eps_low,
        eps_high=eps_high,
        agg=agg,
        L_const=L_const,
        dual_clip=dual_clip,
        log_ratio_clip=log_ratio_clip,
        beta=beta,
    )


def canon(
    case: Case,
    *,
    metric="entropy",
    mu=1.0,
    alpha=1.0,
    eps_low=0.2,
    eps_high=0.28,
    dual_clip=3.0,
    L_const=8192.0,
    singleton="zero",
    log_ratio_clip=20.0,
) -> Gradient:
    """The two halves of a group, split by a metric, as each other's baseline.

    Chosen: the copies of a row are neighbours in the order; where they fall into both halves the row gets the mean of
    their advantages. A group whose rewards are all equal is not special for alpha != 1 (its inter term is then not 0).
    Under ``singleton="raw"`` the reward is the advantage, without mu or alpha.
    """
    score = {
        b: float(len(case.positions(b))) if metric == "length" else _row_mean(case, case.entropy_old, b)
        for b in case.rows()
    }
    copies = {b: [] for b in case.rows()}  # the advantages of its copies
    for rows in _groups(case).values():
        if len(rows) == 1:
            b = rows[0]
            copies[b].append({"zero": 0.0, "raw": float(case.reward[b])}[singleton])
            continue
        order = sorted(rows, key=lambda b: (score[b], b))
        half = len(order) // 2
        low = _exact_mean([float(case.reward[b]) for b in order[:half]])
        up = _exact_mean([float(case.reward[b]) for b in order[half:]])
        for rank, b in enumerate(order):
            reward = float(case.reward[b])
            if rank >= half:
                inter = alpha * reward - low if metric == "length" else reward - alpha * low
                intra = reward - up
            else:
                inter = reward - alpha * up if metric == "length" else alpha * reward - up
                intra = reward - low
            copies[b].append(mu * inter + (1 - mu) * intra)
    A = {b: mean(advantages) for b, advantages in copies.items()}
    return _clipped(
        case,
        lambda b, t: A[b],
        eps_low=eps_low,
        eps_high=eps_high,
        agg="seq_sum_const",
        L_const=L_const,
        dual_clip=dual_clip,
        log_ratio_clip=log_ratio_clip,
    )


# ---- advantages that differ inside a row ---------------------------------------------------------


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
    for rows in _groups(case).values():
        for b in rows:
            first = _conflict_run(rows, forward, A, b) if A[b] else 0
            last = _conflict_run(rows, backward, A, b) if A[b] else 0
            norm = {"max": max(first, last, 1), "none": 1}[conflict_norm]
            H = _row_mean(case, case.entropy, b)
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


def spo_segment(
    case: Case, *, form="chain", interval=5, threshold=0.9, eps_low=0.2, eps_high=0.2, beta=0.0, log_ratio_clip=10.0
) -> Gradient:
    """Differences of prefix values, on the tokens the policy was unsure of.

    Chosen: a token with p equal to the threshold is not among the low ones, so it is in neither the whitening nor the
    policy term. If no token is low the policy term is 0, and what the whitening falls back to does not show. Equal
    advantages whiten to exactly 0. Edges of advantage 0 are not dropped here: that is the sampler's business.
    """
    low = np.zeros(case.mask.shape, bool)
    raw = {}
    for b in set(case.rows()):
        positions = case.positions(b)
        unsure = [k for k, t in enumerate(positions) if math.exp(case.logp_old[b, t]) < threshold]
        for k in unsure:
            low[b, positions[k]] = True
        if form == "tree":
            raw |= {(b, t): float(case.extra["edge_adv"][b]) for t in positions}
            continue
        raw |= {(b, t): 0.0 for t in positions}
        cuts = unsure[::interval]
        values = [float(case.extra["mc_value"][b, positions[k]]) for k in cuts] + [float(case.reward[b])]
        for j, (start, end) in enumerate(pairwise([*cuts, len(positions)])):
            for t in positions[start:end]:
                raw[b, t] = values[j + 1] - values[j]
        for t in positions:
            if math.exp(case.logp_old[b, t]) > threshold:
                raw[b, t] = 0.0
    policy = case.replace(mask=low)
    tokens = [(b, t) for b in policy.rows() for t in policy.positions(b)]
    A = dict(zip(tokens, _whitened([raw[token] for token in tokens]), strict=True))
    loss, grad = _clipped(
        policy, lambda b, t: A[b, t], eps_low=eps_low, eps_high=eps_high, log_ratio_clip=log_ratio_clip
    )
    if not beta:
        return loss, grad
    kl, kl_grad = aggregate(case, "token_mean", lambda b, t: k3(case.logp[b, t], case.ref[b, t]))
    return loss + beta * kl, grad + beta * kl_grad


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
    p = _exact_mean([solved[b] for b in case.rows()])
    a = min(abs(H0 - H), cap) / p if p > 0 else 0.0
    w = a / (1 + a)

    def advantage(b: int, t: int) -> float:
        rho, _ = ratio(other[b, t] - case.logp_old[b, t], 20.0)
        return (1 - w) * base[b] + w * solved[b] * rho

    return _clipped(
        case, advantage, eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip, log_ratio_clip=log_ratio_clip
    )
