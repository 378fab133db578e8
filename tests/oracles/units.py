"""The oracles of preferences share these batches of units and take gradients by the complex step.

An oracle is its card's formula in plain numpy, of arrays that may be complex. With ``h = 1e-30``,
``imag f(x + i h e) / h`` is the derivative along ``e`` to machine precision, of the very line that gives the value.
``sg`` takes the real part. Units of count w are written w times.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

STEP = 1e-30


@dataclass(frozen=True)
class Batch:
    """Rows in units of ``layout`` (numpy float64; masked positions hold NaN, nobody may read them)."""

    mask: np.ndarray  # [B, T] bool
    logp: np.ndarray  # [B, T] as are the next three
    ref: np.ndarray
    prev: np.ndarray
    logp_old: np.ndarray
    count: np.ndarray  # [B]
    group: np.ndarray
    role: np.ndarray  # [B] names
    layout: tuple[str, ...] = ()
    extra: dict[str, np.ndarray] = field(default_factory=dict)  # [B, ...], also what heads of the policy say

    def sums(self, x: np.ndarray) -> np.ndarray:
        """[B] over the tokens of each row."""
        return np.where(self.mask, x, 0).sum(1)

    def rows(self, role: str) -> np.ndarray:
        """[N] indices of the rows of a role."""
        return np.arange(self.layout.index(role), len(self.mask), len(self.layout))

    def S(self, role: str) -> np.ndarray:  # noqa: N802
        """[N] log-prob of whole answers."""
        return self.sums(self.logp)[self.rows(role)]

    def D(self, role: str, slot: str = "ref") -> np.ndarray:  # noqa: N802
        return self.sums(self.logp - getattr(self, slot))[self.rows(role)]

    def n(self, role: str) -> np.ndarray:
        return np.maximum(self.mask.sum(1), 1)[self.rows(role)]

    def x(self, name: str, role: str | None = None) -> np.ndarray:
        """[N, ...] an extra at the rows of a role, or of the unit."""
        return self.extra[name][self.rows(role or self.layout[0])]

    def token_mean(self, x: np.ndarray, rows: np.ndarray) -> complex:
        """Over the tokens of some rows; 0 over nothing."""
        kept = self.mask[rows]
        return np.where(kept, x[rows], 0).sum() / max(kept.sum(), 1)


def mean(x: np.ndarray) -> complex:
    return x.sum() / max(len(x), 1)


def sg(x: np.ndarray) -> np.ndarray:
    return np.real(x)


def log_sig(z: np.ndarray) -> np.ndarray:
    small = np.where(np.real(z) > 0, z, 0)
    large = np.where(np.real(z) > 0, 0, z)
    return np.where(np.real(z) > 0, -np.log1p(np.exp(-small)), large - np.log1p(np.exp(large)))


def sig(z: np.ndarray) -> np.ndarray:
    return np.exp(log_sig(z))


def relu(x: np.ndarray) -> np.ndarray:
    return np.where(np.real(x) > 0, x, 0)


def value_and_grad(oracle: Callable, batch: Batch, into: tuple[str, ...] = ("logp",), **settings):
    """Loss and its gradients by name."""
    unit = max(len(batch.layout), 1)
    index = np.array([b for b in range(len(batch.mask)) for _ in range(int(batch.count[b]))], int)
    if unit > 1:  # whole units, drawn as often as their first row
        starts = range(0, len(batch.mask), unit)
        index = np.array([s + r for s in starts for _ in range(int(batch.count[s])) for r in range(unit)], int)

    def loss(arrays: dict[str, np.ndarray]) -> complex:
        own = {k: v for k, v in arrays.items() if k == "logp"}
        more = {k: v for k, v in arrays.items() if k != "logp"}
        whole = replace(batch, **own, extra={**batch.extra, **more})
        names = ("mask", "logp", "ref", "prev", "logp_old", "count", "group", "role")
        taken = {n: getattr(whole, n)[index] for n in names}
        return oracle(replace(whole, **taken, extra={k: x[index] for k, x in whole.extra.items()}), **settings)

    point = {k: getattr(batch, k) if k == "logp" else batch.extra[k] for k in into}
    grads = {k: np.zeros(x.shape) for k, x in point.items()}
    for k, x in point.items():
        for at in np.ndindex(x.shape):
            if batch.count[at[0]] == 0 or (x.shape == batch.mask.shape and not batch.mask[at]):
                continue
            moved = x.astype(complex)
            moved[at] += STEP * 1j
            grads[k][at] = np.imag(loss({**point, k: moved})) / STEP
    return float(np.real(loss(point))), grads


def log_odds(a):
    a = np.where(np.real(a) > -1e-9, -1e-9, a)
    return a - np.where(np.real(a) > -np.log(2), np.log(-np.expm1(a)), np.log1p(-np.exp(a)))


def log_not(a):
    """log(1 - e^a)"""
    return a - log_odds(a)
