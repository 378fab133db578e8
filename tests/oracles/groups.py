"""The oracles share these groups of rows and the advantages made of their rewards."""

import math

import numpy as np

from tests.oracles import Case, centred, exact_mean, mean, sample_std


def grouped(case: Case) -> dict[int, list[int]]:
    """Group id -> its drawn rows; a group nothing was drawn of does not exist."""
    out = {}
    for b in case.rows():
        out.setdefault(int(case.group[b]), []).append(b)
    return out


def siblings(case: Case) -> dict[int, list[int]]:
    """Every drawn row -> the drawn rows of its group, itself included."""
    rows = case.rows()
    return {b: [j for j in rows if case.group[j] == case.group[b]] for b in rows}


def row_mean(case: Case, x: np.ndarray, b: int) -> float:
    return exact_mean([float(x[b, t]) for t in case.positions(b)])


def whitened(drawn: list[float]) -> list[float]:
    """``(x - mean) / sqrt(sample variance + 1e-8)``; exactly 0 of equal numbers, of one number."""
    scale = math.sqrt(sample_std(drawn) ** 2 + 1e-8)
    return [c / scale for c in centred(drawn)]


def group_advantage(case: Case, reward, *, scale="group", adv_eps=1e-6, singleton="zero") -> dict[int, float]:
    """``(reward - group mean) / (std + adv_eps)``; the std of the group, of the batch, or no division."""
    out = {}
    for b, group in siblings(case).items():
        if len(group) == 1:
            out[b] = {"zero": 0.0, "raw": float(reward[b])}[singleton]
            continue
        rewards = [float(reward[j]) for j in group]
        centre = centred(rewards)[group.index(b)]
        spread = {
            "group": lambda rewards=rewards: sample_std(rewards),
            "batch": lambda: sample_std([float(reward[j]) for j in case.rows()]),
        }
        out[b] = 0.0 if centre == 0 else centre if scale == "none" else centre / (spread[scale]() + adv_eps)
    return out


def leave_one_out(case: Case, reward, *, singleton="zero") -> dict[int, float]:
    """``reward - mean of the other rewards of the group``."""
    out = {}
    for b, group in siblings(case).items():
        others = [float(reward[j]) for j in group]
        others.remove(float(reward[b]))
        if not others:
            out[b] = {"zero": 0.0, "raw": float(reward[b])}[singleton]
        elif all(x == float(reward[b]) for x in others):
            out[b] = 0.0
        else:
            out[b] = float(reward[b]) - mean(others)
    return out
