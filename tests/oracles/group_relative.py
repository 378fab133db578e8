"""The group-relative objectives have these oracles, whose docstrings say what was chosen where a card is open."""

import math

import numpy as np

from tests.oracles import Case, Gradient, aggregate, centred, exact_mean, mean, sample_std
from tests.oracles.groups import group_advantage, grouped, leave_one_out, row_mean, siblings, whitened
from tests.oracles.ratios import clipped_surrogate, k2, k3, ppo, ratio

# ---- the batch as baseline -----------------------------------------------------------------------


def reinforce(case: Case, *, baseline="none", agg="token_mean") -> Gradient:
    rewards = [float(case.reward[b]) for b in case.rows()]
    if baseline == "none":
        A = dict(zip(case.rows(), rewards, strict=True))
    else:
        A = dict(zip(case.rows(), centred(rewards), strict=True))
    return aggregate(case, agg, lambda b, t: (-A[b] * case.logp[b, t], -A[b]))


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
    A = dict(zip(tokens, whitened([returns[token] for token in tokens]), strict=True))
    return clipped_surrogate(
        case,
        lambda b, t: A[b, t],
        eps_low=eps_low,
        eps_high=eps_high,
        log_ratio_clip=log_ratio_clip,
        beta=kl_coef if variant == "baseline" else 0.0,
        kl={"k2": k2, "k3": k3}[kl_estimator],
    )


# ---- the group as baseline -----------------------------------------------------------------------


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
    for b, group in siblings(case).items():
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


# ---- weighted groups -----------------------------------------------------------------------------


def _log_power(x: float, k: float) -> float:
    """``log(x^k)``, with ``0^0 = 1``."""
    if k == 0:
        return 0.0
    return k * math.log(x) if x > 0 else -math.inf


def _inverse_beta_density(p: float, all_p: list[float]) -> float:
    """``1 / BetaPDF(p)`` of the Beta fitted to ``all_p``, at most 1e6."""
    alpha = beta = 1.0
    if len(all_p) > 1:
        m, v = exact_mean(all_p), max(sample_std(all_p) ** 2, 1e-8)
        c = m * (1 - m) / v - 1
        alpha, beta = max(1 + c * m / 3, 1.0), max(1 + c * (1 - m) / 3, 1.0)
    log_norm = math.lgamma(alpha + beta) - math.lgamma(alpha) - math.lgamma(beta)
    log_density = log_norm + _log_power(p, alpha - 1) + _log_power(1 - p, beta - 1)
    return math.exp(min(-log_density, math.log(1e6)))


def gdpo(case: Case, *, eps_low=0.2, eps_high=0.2, adv_eps=1e-4, whiten=True, log_ratio_clip=20.0) -> Gradient:
    """Each reward normalized in its group, then added by its weight, then standardized over all drawn rows.

    Chosen: a row in which a reward weighs 0 has no part in that reward's means; the only one of its group gets 0.
    """
    rewards, weights = case.extra["rewards_multi"], case.extra["reward_weights"]
    A = dict.fromkeys(case.rows(), 0.0)
    for k in range(rewards.shape[1]):
        given = case.replace(count=np.where(weights[:, k] == 0, 0, case.count))
        for b, a in group_advantage(given, rewards[:, k], adv_eps=adv_eps).items():
            A[b] += float(weights[b, k]) * a
    if whiten:
        rows = case.rows()
        drawn = [A[b] for b in rows]
        spread = sample_std(drawn)
        A = {b: c / (spread + adv_eps) if spread else 0.0 for b, c in zip(rows, centred(drawn), strict=True)}
    return clipped_surrogate(
        case, lambda b, t: A[b], eps_low=eps_low, eps_high=eps_high, agg="token_mean", log_ratio_clip=log_ratio_clip
    )


def _bnpo_advantage(case: Case, u: list[float], singleton: str) -> dict[int, float]:
    centre = group_advantage(case, u, scale="none", singleton=singleton)
    p = {g: exact_mean([u[b] for b in rows]) for g, rows in grouped(case).items()}
    assert all(0 <= x <= 1 for x in p.values()), "rewards outside [min, max]"
    out = {}
    for g, rows in grouped(case).items():
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
    weights = case.extra["reward_weights"] if components else np.ones(rewards.shape)
    per_component = [
        _bnpo_advantage(case, [(float(r) - min) / (max - min) for r in rewards[:, k]], singleton)
        for k in range(rewards.shape[1])
    ]
    A = {b: mean([w * one[b] for w, one in zip(weights[b], per_component, strict=True)]) for b in case.rows()}
    return clipped_surrogate(
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
    p = {g: exact_mean([float(case.reward[b]) for b in rows]) for g, rows in grouped(case).items()}
    omega = exact_mean(list(p.values()))

    def advantage(b: int) -> float:
        rate = p[int(case.group[b])]
        if not 0 < rate < 1:
            return 0.0
        easy = {"paper": math.sqrt(1 - rate), "official": 1 - math.sqrt(rate) + 1e-6}[easy_form]
        A = omega / 2 * base[b] / math.sqrt(rate) + (1 - omega) / 2 * base[b] / easy
        return A * min(1.0, omega / alpha) if A > 0 else A

    return clipped_surrogate(
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
    max_len=math.inf,
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
    for rows in grouped(case).values():
        correct = [len(case.positions(b)) for b in rows if case.reward[b] > correct_score]
        wrong = [len(case.positions(b)) for b in rows if case.reward[b] <= correct_score]
        wrong = [n for n in wrong if n < max_len]
        longest = max(correct) if correct else -math.inf
        if rule == "llm":
            wanted = longest > (mean(wrong) if wrong else -math.inf)
        else:
            wanted = not correct or longest > (mean(wrong) if wrong else math.inf)
        weight |= dict.fromkeys(rows, 1.0 if wanted else lam)
    return clipped_surrogate(
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


# ---- halves of a group ---------------------------------------------------------------------------


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
        b: float(len(case.positions(b))) if metric == "length" else row_mean(case, case.entropy_old, b)
        for b in case.rows()
    }
    copies = {b: [] for b in case.rows()}  # the advantages of its copies
    for rows in grouped(case).values():
        if len(rows) == 1:
            b = rows[0]
            copies[b].append({"zero": 0.0, "raw": float(case.reward[b])}[singleton])
            continue
        order = sorted(rows, key=lambda b: (score[b], b))
        half = len(order) // 2
        low = exact_mean([float(case.reward[b]) for b in order[:half]])
        up = exact_mean([float(case.reward[b]) for b in order[half:]])
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
    return clipped_surrogate(
        case,
        lambda b, t: A[b],
        eps_low=eps_low,
        eps_high=eps_high,
        agg="seq_sum_const",
        L_const=L_const,
        dual_clip=dual_clip,
        log_ratio_clip=log_ratio_clip,
    )


def canon_advantage(case: Case, metric, mu: float) -> dict[int, float]:
    """CANON with alpha 1: compare with the other half (inter) and the own half (intra) of the group."""
    out = {}
    for b, group in siblings(case).items():
        order = sorted(group, key=lambda j: metric[j])  # sorted() is stable
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        own, other = halves if b in halves[0] else halves[::-1]
        inter, intra = [case.reward[b] - mean([case.reward[j] for j in half]) for half in (other, own)]
        out[b] = mu * inter + (1 - mu) * intra
    return out
