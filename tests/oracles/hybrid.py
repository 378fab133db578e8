"""The objectives with demonstrations have these oracles; rows whose role is ``EXPERT`` were written by others."""

import math

import numpy as np

from tests.oracles import Case, Gradient, aggregate, mean
from tests.oracles.groups import group_advantage
from tests.oracles.ratios import clipped_surrogate, k3, ppo, ratio, row_gap, token_gap

EXPERT = 1  # the number of the role


def sft(case: Case, *, agg="token_mean", L_const=None) -> Gradient:
    """Mean of ``-logp``."""
    return aggregate(case, agg, lambda b, t: (-case.logp[b, t], -1.0), L_const)


def forward_kl_to_teacher(
    student_logits: np.ndarray, teacher: np.ndarray, mask: np.ndarray
) -> tuple[float, np.ndarray]:
    """Mean over masked tokens of ``KL(teacher || softmax(student_logits))`` and its gradient in the logits."""
    loss, grad, n = 0.0, np.zeros_like(student_logits), int(mask.sum())
    for b, t in np.argwhere(mask):
        z = student_logits[b, t] - student_logits[b, t].max()
        q = np.exp(z) / np.exp(z).sum()
        p = teacher[b, t]
        loss += sum(p[v] * (math.log(p[v]) - math.log(q[v])) for v in range(len(p)) if p[v] > 0) / n
        grad[b, t] = (q - p) / n
    return loss, grad


def expert_terms(case: Case, b: int, t: int, gamma: float | None, recorded: bool) -> tuple[float, float]:
    """``f(p)`` of an expert token and its slope in ``logp``."""
    p = math.exp(case.logp[b, t])
    if recorded:
        q = float(case.extra["expert_prob"][b, t]) + 1e-6
        return p / q, p / q
    return (p, p) if gamma is None else (p / (p + gamma), gamma * p / (p + gamma) ** 2)


def luffy(
    case: Case,
    *,
    shaping="p_div_p",
    gamma=0.1,
    recorded=False,
    clip=False,
    eps=0.2,
    use_std=False,
    adv_eps=1e-6,
    singleton="zero",
    entropy_coef=0.0,
    agg="token_mean",
    L_const=None,
    log_ratio_clip=20.0,
) -> Gradient:
    """Own rows ``-r A``, expert rows ``-f(p) A``, one mean over both; minus ``entropy_coef`` times the mean entropy."""
    A = group_advantage(case, case.reward, scale="group" if use_std else "none", adv_eps=adv_eps, singleton=singleton)
    shape = gamma if shaping == "p_div_p" else None

    def term(b: int, t: int) -> tuple[float, float]:
        bonus = entropy_coef * float(case.entropy[b, t]) if entropy_coef else 0.0
        if case.extra["role"][b] == EXPERT:
            value, slope = (-A[b] * x for x in expert_terms(case, b, t, shape, recorded))
        elif clip:
            value, slope = ppo(token_gap(case, b, t), A[b], 1 - eps, 1 + eps, bound=log_ratio_clip)
        else:
            value, slope = (-A[b] * x for x in ratio(token_gap(case, b, t), log_ratio_clip))
        return value - bonus, slope

    return aggregate(case, agg, term, L_const)


def is_expert(case: Case, b: int) -> bool:
    return case.extra["role"][b] == EXPERT


def part(case: Case, expert: bool) -> Case:
    """The case in which only own or only expert rows count."""
    keep = np.array([is_expert(case, b) == expert for b in range(len(case.count))])
    return case.replace(count=case.count * keep)


def added(*parts: tuple[float, Gradient]) -> Gradient:
    """A weighted sum of losses and their gradients."""
    return math.fsum(w * loss for w, (loss, _) in parts), sum(w * grad for w, (_, grad) in parts)


def srft(
    case: Case,
    *,
    c_sft=0.5,
    c_rl=0.1,
    success=1.0,
    use_std=True,
    adv_eps=1e-6,
    singleton="zero",
    agg="token_mean",
    L_const=None,
) -> Gradient:
    """Imitation of expert rows weighed by the row's entropy, plus a second mean over all rows."""
    A = group_advantage(case, case.reward, scale="group" if use_std else "none", adv_eps=adv_eps, singleton=singleton)

    def H(b: int) -> float:
        return mean([float(case.entropy[b, t]) for t in case.positions(b)])

    def imitate(b: int, t: int) -> tuple[float, float]:
        w = c_sft * math.exp(-H(b))
        return -w * case.logp[b, t], -w

    def reinforce(b: int, t: int) -> tuple[float, float]:
        if is_expert(case, b):
            p = math.exp(case.logp[b, t])
            return -A[b] * p, -A[b] * p
        w = -c_rl * math.exp(H(b)) if case.reward[b] >= success else 1.0
        return w * case.logp[b, t], w

    return added((1, aggregate(part(case, True), "token_mean", imitate)), (1, aggregate(case, agg, reinforce, L_const)))


def mu_of(step: int, warmup: int, decay: int, peak: float, valley: float) -> float:
    if step < warmup:
        return peak * step / warmup
    if step >= warmup + decay:
        return valley
    return valley + (peak - valley) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / decay))


def chord(
    case: Case,
    *,
    mu=None,
    iteration=0,
    warmup=200,
    decay=400,
    peak=0.5,
    valley=0.02,
    phi="p1mp",
    eps_low=0.2,
    eps_high=0.2,
    adv_eps=1e-6,
    singleton="zero",
    agg="token_mean",
    L_const=None,
) -> Gradient:
    """``(1 - mu) L_RL + mu L_SFT``."""
    mu = mu_of(iteration, warmup, decay, peak, valley) if mu is None else mu
    own = part(case, False)
    A = group_advantage(own, case.reward, adv_eps=adv_eps, singleton=singleton)

    def imitate(b: int, t: int) -> tuple[float, float]:
        p = math.exp(case.logp[b, t])
        w = {"p1mp": p * (1 - p), "is": p, "none": 1.0}[phi]
        return -w * case.logp[b, t], -w

    rl = clipped_surrogate(own, lambda b, t: A[b], eps_low=eps_low, eps_high=eps_high, agg=agg, L_const=L_const)
    return added((1 - mu, rl), (mu, aggregate(part(case, True), agg, imitate, L_const)))


def solved(case: Case, success: float) -> dict[int, int]:
    """Group -> drawn own rows that succeed; every group of a drawn row is there."""
    out = {int(case.group[b]): 0 for b in case.rows()}
    for b in part(case, False).rows():
        out[int(case.group[b])] += bool(case.reward[b] >= success)
    return out


def nll(case: Case, agg="token_mean", L_const=None, weight=lambda b: 1.0) -> Gradient:
    """Mean of ``-weight logp``."""
    return aggregate(case, agg, lambda b, t: (-weight(b) * case.logp[b, t], -weight(b)), L_const)


def hpt(
    case: Case,
    *,
    gate=0,
    rl_coef=1.0,
    sft_coef=1.0,
    success=1.0,
    clip=False,
    eps=0.2,
    use_std=False,
    adv_eps=1e-6,
    singleton="zero",
    rl_agg="sum_const",
    L_const=8192,
) -> Gradient:
    """Each prompt trains by its own rows or by its demonstrations."""
    n_ok = solved(case, success)
    keep = np.array([n_ok.get(int(g), 0) > gate for g in case.group])
    own, expert = part(case, False), part(case, True)
    own, expert = own.replace(count=own.count * keep), expert.replace(count=expert.count * ~keep)
    A = group_advantage(own, case.reward, scale="group" if use_std else "none", adv_eps=adv_eps, singleton=singleton)

    def reinforce(b: int, t: int) -> tuple[float, float]:
        if clip:
            return ppo(token_gap(case, b, t), A[b], 1 - eps, 1 + eps)
        r, slope = ratio(token_gap(case, b, t))
        return -r * A[b], -slope * A[b]

    L_const = L_const if rl_agg in ("sum_const", "seq_sum_const") else None
    return added((rl_coef, aggregate(own, rl_agg, reinforce, L_const)), (sft_coef, nll(expert)))


def ahpo(
    case: Case,
    *,
    r_hat=2,
    static_coef=None,
    success=1.0,
    norm="separate",
    eps_low=0.2,
    eps_high=0.2,
    use_std=True,
    adv_eps=1e-6,
    singleton="zero",
    agg="token_mean",
    L_const=None,
) -> Gradient:
    """GRPO over own rows, plus a gated imitation of all expert rows."""
    n_ok, own = solved(case, success), part(case, False)
    A = group_advantage(own, case.reward, scale="group" if use_std else "none", adv_eps=adv_eps, singleton=singleton)

    def xi(b: int) -> float:
        return float(n_ok[int(case.group[b])] < r_hat) if static_coef is None else static_coef

    def reinforce(b: int, t: int) -> tuple[float, float]:
        return ppo(token_gap(case, b, t), A[b], 1 - eps_low, 1 + eps_high)

    def both(b: int, t: int) -> tuple[float, float]:
        return (-xi(b) * case.logp[b, t], -xi(b)) if is_expert(case, b) else reinforce(b, t)

    if norm == "shared":
        return aggregate(case, agg, both, L_const)
    return added((1, aggregate(own, agg, reinforce, L_const)), (1, nll(part(case, True), agg, L_const, xi)))


def dypo(
    case: Case,
    *,
    alpha=0.5,
    beta_gal=1.0,
    gamma_sft=1.0,
    beta_kl=0.0,
    level="sequence",
    sft_norm="sum",
    eps_low=0.2,
    eps_high=0.2,
    fail=0.0,
    success=1.0,
    adv_eps=1e-6,
    log_ratio_clip=20.0,
) -> Gradient:
    """The mean over prompts of imitation (hard), nothing (easy), or GRPO and pairs (middle)."""
    prompts: dict[int, tuple[list[int], list[int]]] = {}
    for b in case.rows():
        prompts.setdefault(int(case.group[b]), ([], []))[int(is_expert(case, b))].append(b)
    A = group_advantage(part(case, False), case.reward, adv_eps=adv_eps)
    loss, grad = 0.0, np.zeros(case.mask.shape)

    def add(weight: float, b: int, values: list[tuple[int, float, float]]) -> None:
        nonlocal loss
        for t, value, slope in values:
            loss += weight * value / len(prompts)
            grad[b, t] += weight * slope / len(prompts)

    def surrogate(b: int) -> list[tuple[int, float, float]]:
        at = case.positions(b)
        if level == "token":
            each = [(t, *ppo(token_gap(case, b, t), A[b], 1 - eps_low, 1 + eps_high, bound=log_ratio_clip)) for t in at]
            out = [(t, v / len(at), s / len(at)) for t, v, s in each]
        elif at:
            value, slope = ppo(row_gap(case, b), A[b], 1 - eps_low, 1 + eps_high, bound=log_ratio_clip)
            out = [(t, value / len(at), slope / len(at)) for t in at]
        else:
            out = []
        if beta_kl:
            penalty = [(t, *k3(case.logp[b, t], case.ref[b, t])) for t in at]
            out += [(t, beta_kl * v / len(at), beta_kl * s / len(at)) for t, v, s in penalty]
        return out

    def drift(b: int) -> float:
        return math.fsum(float(case.logp[b, t] - case.ref[b, t]) for t in case.positions(b))

    for own, teacher in prompts.values():
        rewards = [float(case.reward[b]) for b in own]
        if own and max(rewards) <= fail:
            for b in teacher:
                at = case.positions(b)
                scale = gamma_sft / len(teacher) / (1 if sft_norm == "sum" else max(len(at), 1))
                add(scale, b, [(t, -case.logp[b, t], -1.0) for t in at])
        elif own and min(rewards) < success and min(rewards) != max(rewards):
            for b in own:
                add(alpha / len(own), b, surrogate(b))
            pairs = [(s, f) for s in own for f in own if case.reward[s] > case.reward[f]]
            for s, f in pairs:
                z = beta_gal * (drift(s) - drift(f))
                w = (1 - alpha) / len(pairs)
                loss += w * float(np.logaddexp(0, -z)) / len(prompts)
                slope = -beta_gal * math.exp(-np.logaddexp(0, z))
                add(w, s, [(t, 0.0, slope) for t in case.positions(s)])
                add(w, f, [(t, 0.0, -slope) for t in case.positions(f)])
    return loss, grad
