"""Oracles of the preference cards: each is its card's formula in plain numpy, of arrays that may be complex.

The gradient is the complex step: with ``h = 1e-30``, ``imag f(x + i h e) / h`` is the derivative along ``e`` to machine
precision, of the very line that gives the value. ``sg`` takes the real part. Units of count w are written w times.
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


# ---- foundations --------------------------------------------------------------------------------------------------


def dpo(b, *, beta=0.1, eps=0.0, reference_free=False):
    h = b.S("chosen") - b.S("rejected") if reference_free else b.D("chosen") - b.D("rejected")
    z = beta * h
    return mean(-(1 - eps) * log_sig(z) - eps * log_sig(-z))


def ipo(b, *, tau=0.1, normalize=True):
    if normalize:
        u = b.D("chosen") / b.n("chosen") - b.D("rejected") / b.n("rejected")
    else:
        u = b.D("chosen") - b.D("rejected")
    return mean((u - 1 / (2 * tau)) ** 2)


def slic_hinge(b, *, delta=1.0, lam=0.5, target="chosen"):
    return mean(relu(delta - b.S("chosen") + b.S("rejected")) - lam * b.S(target))


def kto(b, *, beta=0.1, lam_D=1.0, lam_U=1.0):
    drift = b.sums(b.logp - b.ref)
    kl, own = b.role == "kl", b.role != "kl"
    z0 = max(0.0, float(mean(sg(drift[kl]))))
    good = lam_D * (1 - sig(beta * (drift - z0)))
    bad = lam_U * (1 - sig(beta * (z0 - drift)))
    return mean(np.where(b.extra["label"] > 0, good, bad)[own])


def log_odds(a):
    a = np.where(np.real(a) > -1e-9, -1e-9, a)
    return a - np.where(np.real(a) > -np.log(2), np.log(-np.expm1(a)), np.log1p(-np.exp(a)))


def orpo(b, *, lam=0.1, include_prompt=False):
    w, l = (b.S(r) / b.n(r) for r in ("chosen", "rejected"))  # noqa: E741
    odds = mean(-log_sig(log_odds(w) - log_odds(l)))
    text = b.rows("expert" if include_prompt else "chosen")
    return b.token_mean(-b.logp, text) + lam * odds


def simpo(b, *, beta=2.0, gamma=1.0, eps=0.0):
    z = beta * (b.S("chosen") / b.n("chosen") - b.S("rejected") / b.n("rejected")) - gamma
    return mean(-(1 - eps) * log_sig(z) - eps * log_sig(-z))


def cpo(b, *, beta=0.1, alpha=1.0, eps=0.0):
    z = beta * (b.S("chosen") - b.S("rejected"))
    return mean(-(1 - eps) * log_sig(z) - eps * log_sig(-z)) + alpha * b.token_mean(-b.logp, b.rows("chosen"))


def sppo(b, *, beta=0.001, half=True, hard=False):
    win_w, win_l = (1, 0) if hard else (b.x("win", "chosen"), b.x("win", "rejected"))
    total = (b.D("chosen") - (win_w - 0.5) / beta) ** 2 + (b.D("rejected") - (win_l - 0.5) / beta) ** 2
    return mean(total / 2 if half else total)


def rso(b, *, gamma=0.05, form="sigmoid-norm"):
    h, h0 = b.D("chosen") - b.D("rejected"), b.S("chosen") - b.S("rejected")
    if form == "sigmoid-norm":
        return mean(-log_sig(gamma * h))
    return mean(relu(1 - gamma * (h if form == "hinge-norm" else h0)))


def rdpo(b, *, beta=0.1, eps=0.1):
    z = beta * (b.D("chosen") - b.D("rejected"))
    return mean((-(1 - eps) * log_sig(z) + eps * log_sig(-z)) / (1 - 2 * eps))


def rpo(b, *, beta=0.05, eta=0.005, nll="seq_sum"):
    z = beta * (b.D("chosen") - b.D("rejected"))
    if nll == "seq_sum":
        return mean(-log_sig(z) - eta * beta * b.S("chosen"))
    return mean(-log_sig(z)) + eta * b.token_mean(-b.logp, b.rows("chosen"))


RHO = {  # the ratio itself, where the card gives one; worlds otherwise
    "ce": lambda w, y: log_odds(w),
    "cpo": lambda w, y: w - y,
    "orpo": lambda w, y: log_odds(w) - log_odds(y),
    "ccpo": lambda w, y: w - log_not(w) - y,
    "cfunl": lambda w, y: log_not(y) - log_not(w) - y,
    "qfunl": lambda w, y: log_not(y) - log_not(w),
    "funl": lambda w, y: log_not(y) - y,
    "ceunl": lambda w, y: w + log_not(y) - np.log(np.exp(w + y) - np.expm1(w)),
    "uncpo": lambda w, y: np.log(np.exp(w) - np.expm1(w) * -np.expm1(y)) - log_not(w) - y,
    "l5": lambda w, y: np.log(np.exp(w) + np.expm1(w) * np.expm1(y)) - np.log(np.exp(w + y) - np.expm1(w)),
    "TT FF / TF": lambda w, y: np.log(np.exp(w + y) + np.expm1(w) * np.expm1(y)) - w - log_not(y),
}


def log_not(a):
    """log(1 - e^a)"""
    return a - log_odds(a)


def dpa_logic(b, *, program="cpo", beta=1.0, link="log", length_norm=True, use_ref=False):
    def rho(logp):
        s = b.sums(logp)
        w, l = (s[b.rows(r)] / (b.n(r) if length_norm else 1) for r in ("chosen", "rejected"))  # noqa: E741
        return RHO[program](*(np.where(np.real(a) > -1e-9, -1e-9, a) for a in (w, l)))

    x = rho(b.logp) - rho(b.ref) if use_ref else rho(b.logp)
    return mean(
        {
            "log": lambda: -log_sig(beta * x),
            "square": lambda: (x - 1 / (2 * beta)) ** 2,
            "hinge": lambda: relu(beta - x),
        }[link]()
    )


def mpo_mixed(b, *, gap=1.0, beta=0.1):
    easy = np.abs(b.x("rm", "chosen") - b.x("rm", "rejected")) > gap
    return mean(-log_sig(beta * (b.D("chosen") - b.D("rejected")))[easy])
