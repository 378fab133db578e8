"""`lp_reg` from logits: the proxy, the tokens it is for, the loss and its gradient in the logits."""

import math
from collections import Counter

import numpy as np

from tests.oracles import Case
from tests.oracles.groups import group_advantage
from tests.oracles.ratios import clip, drawn_tokens, k3, ppo, ratio


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax of one list of logits."""
    e = np.exp(logits - logits.max())
    return e / e.sum()


def proxy_of(p: np.ndarray, kappa: float, tau: float | None) -> np.ndarray:
    """The probabilities above the threshold, normalized; zeros where there is none."""
    kept = np.where(p > (kappa * p.max() if tau is None else tau), p, 0.0)
    return kept / kept.sum() if kept.any() else kept


def lp_reg(
    case: Case,
    logits: np.ndarray,
    *,
    form="released",
    rho=0.01,
    beta=1.0,
    kappa=0.02,
    tau=None,
    U=10.0,  # noqa: N803
    eps_low=0.2,
    eps_high=0.2,
    log_ratio_clip=20.0,
    of=None,
) -> tuple[float, np.ndarray]:
    """(loss, its gradient in the logits [B, T, V]); ``case.logp`` is not read. ``of``: logits of the model whose proxy
    it is.

    Ties of the lowest probabilities go by index. Released: ``int(rho n) <= 1`` regularizes nothing.
    """
    A = group_advantage(case, case.reward)
    tokens = drawn_tokens(case)
    p = {bt: probabilities(logits[bt]) for bt in set(tokens)}
    proxy = {bt: proxy_of(p[bt] if of is None else probabilities(of[bt]), kappa, tau) for bt in p}
    said = {bt: float(p[bt][case.tokens[bt]]) for bt in p}
    alive = {bt: float(proxy[bt][case.tokens[bt]]) for bt in p}
    if form == "paper":
        lowest = sorted(tokens, key=said.get)[: max(1, int(rho * len(tokens)))]
        chosen = Counter(bt for bt in lowest if A[bt[0]] < 0 and alive[bt] > 0)
    else:
        failed = [bt for bt in tokens if A[bt[0]] < 0]
        n = int(rho * len(failed))
        lowest = sorted(failed, key=said.get)[: n if n > 1 else 0]
        # In exact numbers "less probable than its proxy" is: it survives, and something is cut.
        chosen = Counter(bt for bt in lowest if alive[bt] > 0 and (proxy[bt] == 0).any())
    loss, grad = 0.0, np.zeros(logits.shape)
    for bt in set(tokens):
        b, copies = bt[0], case.count[bt[0]]
        share = chosen[bt] / copies
        logp = math.log(said[bt])
        gap = logp - float(case.logp_old[bt])
        own = -p[bt]
        own[case.tokens[bt]] += 1  # d logp / d logits
        r, slope = ratio(gap, log_ratio_clip)
        if form == "paper":
            value, slope = (-r * A[b], -slope * A[b]) if r < U else (-U * A[b], 0.0)
            kept = proxy[bt] > 0
            kl = float((proxy[bt][kept] * np.log(proxy[bt][kept] / p[bt][kept])).sum())
            value, into = value + share * beta * kl, slope * own + share * beta * (p[bt] - proxy[bt])
        else:
            plain = ppo(gap, A[b], 1 - eps_low, 1 + eps_high, bound=log_ratio_clip)
            pull = k3(logp, math.log(alive[bt])) if share else (0.0, 0.0)
            pull = pull if pull[0] < 10 else (clip(pull[0], -10, 10), 0.0)
            value = (1 - share) * plain[0] + share * (-r * A[b] + beta * pull[0])
            into = ((1 - share) * plain[1] + share * (-slope * A[b] + beta * pull[1])) * own
        loss += copies * value / len(tokens)
        grad[bt] += copies * into / len(tokens)
    return loss, grad
