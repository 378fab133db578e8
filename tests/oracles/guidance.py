"""The objectives with hints and repaired rows have these oracles. Reconstructed forms are written as the docstrings say
that they were reconstructed."""

import math

import numpy as np

from tests.oracles import Case, Gradient, aggregate, mean
from tests.oracles.groups import group_advantage, siblings
from tests.oracles.hybrid import luffy
from tests.oracles.ratios import clipped_surrogate, ppo, token_gap


def ghpo(
    case: Case, *, w_acc=1.0, w_fmt=0.5, eps_low=0.2, eps_high=0.2, beta_kl=0.0, adv_eps=1e-4, singleton="zero"
) -> Gradient:
    """GRPO of ``w_acc accuracy + w_fmt format``; rewards that were not given (weight 0) are 0."""
    reward = {}
    for b in case.rows():
        given = [
            float(r) if w else 0.0
            for r, w in zip(case.extra["rewards_multi"][b], case.extra["reward_weights"][b], strict=True)
        ]
        reward[b] = w_acc * given[0] + w_fmt * math.fsum(given[1:]) if w_fmt else w_acc * float(case.reward[b])
    shaped = np.array([reward.get(b, 0.0) for b in range(len(case.reward))])
    A = group_advantage(case, shaped, adv_eps=adv_eps, singleton=singleton)
    return clipped_surrogate(case, lambda b, t: A[b], eps_low=eps_low, eps_high=eps_high, beta=beta_kl)


def adhint_advantage(case: Case, adv_eps: float, singleton: str) -> dict[int, float]:
    """A of each row after the factor ``1 + gap``."""
    hinted = case.extra["hinted"] > 0
    A, out = group_advantage(case, case.reward, adv_eps=adv_eps, singleton=singleton), {}
    for b, group in siblings(case).items():
        kinds = [[float(case.reward[j]) for j in group if bool(hinted[j]) == kind] for kind in (False, True)]
        gap = max(0.0, (1 - mean(kinds[0])) - (1 - mean(kinds[1]))) if all(kinds) else 0.0
        strengthened = A[b] < 0 if hinted[b] else A[b] > 0
        out[b] = A[b] * (1 + gap) if strengthened else A[b]
    return out


def hint_weights(case: Case, A: dict[int, float]) -> dict[tuple[int, int], float]:
    """c of each token."""
    out = {}
    for b in case.rows():
        on_hint = {t: case.extra["hint_mask"][b, t] == 1 for t in case.positions(b)}
        rest = [float(case.entropy_old[b, t]) for t, hint in on_hint.items() if not hint]
        level = mean(rest) if rest else 0.0
        for t, hint in on_hint.items():
            h = float(case.entropy_old[b, t])
            alike = 1.0 if max(h, level) == 0 else min(h, level) / max(h, level)
            out[b, t] = 1.0 if not hint else 0.0 if A[b] < 0 else alike
    return out


def adhint(case: Case, *, eps_low=0.2, eps_high=0.2, adv_eps=1e-6, singleton="zero", log_ratio_clip=20.0) -> Gradient:
    """Token mean of ``c clip_surrogate``; hint tokens of weight 0 stay in the denominator."""
    A = adhint_advantage(case, adv_eps, singleton)
    weight = hint_weights(case, A)

    def term(b: int, t: int) -> tuple[float, float]:
        value, slope = ppo(token_gap(case, b, t), A[b], 1 - eps_low, 1 + eps_high, bound=log_ratio_clip)
        return weight[b, t] * value, weight[b, t] * slope

    return aggregate(case, "token_mean", term)


def critique_grpo(case: Case, *, use_std=True, entropy_coef=0.001, **more) -> Gradient:
    """LUFFY's loss with a std and a bonus."""
    return luffy(case, use_std=use_std, entropy_coef=entropy_coef, **more)


def scope(
    case: Case, *, gamma=0.1, eps_low=0.2, eps_high=0.2, use_std=True, singleton="zero", log_ratio_clip=20.0
) -> Gradient:
    """Own tokens: clipped surrogate. Tokens of the corrector: ``-p / (p + gamma) A``."""
    A = group_advantage(case, case.reward, scale="group" if use_std else "none", singleton=singleton)

    def term(b: int, t: int) -> tuple[float, float]:
        if case.extra["off_mask"][b, t] == 1:
            p = math.exp(case.logp[b, t])
            return -p / (p + gamma) * A[b], -gamma * p / (p + gamma) ** 2 * A[b]
        return ppo(token_gap(case, b, t), A[b], 1 - eps_low, 1 + eps_high, bound=log_ratio_clip)

    return aggregate(case, "token_mean", term)
