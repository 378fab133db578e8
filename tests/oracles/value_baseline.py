"""The objectives whose baseline is a value have these oracles, whose docstrings say what was chosen."""

import math
from itertools import pairwise

import numpy as np

from tests.oracles import Case, Gradient, aggregate, centred, sample_std
from tests.oracles.groups import whitened
from tests.oracles.ratios import clipped_surrogate, k3


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
    return clipped_surrogate(
        case, lambda b, t: A[b], eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip, log_ratio_clip=log_ratio_clip
    )


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
    A = dict(zip(tokens, whitened([raw[token] for token in tokens]), strict=True))
    loss, grad = clipped_surrogate(
        policy, lambda b, t: A[b, t], eps_low=eps_low, eps_high=eps_high, log_ratio_clip=log_ratio_clip
    )
    if not beta:
        return loss, grad
    kl, kl_grad = aggregate(case, "token_mean", lambda b, t: k3(case.logp[b, t], case.ref[b, t]))
    return loss + beta * kl, grad + beta * kl_grad
