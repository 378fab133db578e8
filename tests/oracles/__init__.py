"""Plain Python loops in float64 give independent references, written from the papers' equations without jaxpo.

An oracle takes a `Case` and returns ``(loss, d loss / d logp)``. ``count[b] = w`` means "row b was drawn w times", so
oracles run on the list of rows with row b written w times; the gradients of the copies add up.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

Gradient = tuple[float, np.ndarray]  # loss, d loss / d logp [B, T]
TokenTerm = Callable[[int, int], tuple[float, float]]  # (row, position) -> value, d value / d logp


@dataclass(frozen=True)
class Case:
    """One optimizer batch (numpy float64; masked positions hold NaN, nobody may read them)."""

    mask: np.ndarray  # [B, T] bool
    logp: np.ndarray  # [B, T] as are logp_old and ref
    logp_old: np.ndarray
    ref: np.ndarray
    reward: np.ndarray  # [B] as are the rest
    correct: np.ndarray
    group: np.ndarray
    count: np.ndarray
    tokens: np.ndarray  # [B, T] completion ids
    entropy: np.ndarray  # [B, T] of the current policy
    entropy_old: np.ndarray  # [B, T] of the rollout
    extra: dict[str, np.ndarray] = field(default_factory=dict)  # what single objectives ask for besides, [B, ...]

    def replace(self, **changes) -> "Case":
        return replace(self, **changes)

    def rows(self) -> list[int]:
        """Row indices, each as often as it was drawn."""
        return [b for b, times in enumerate(self.count) for _ in range(int(times))]

    def positions(self, b: int) -> list[int]:
        return [t for t, on in enumerate(self.mask[b]) if on]

    def take(self, index) -> "Case":
        """The rows of ``index``, in that order."""
        fields = {name: np.asarray(x)[index] for name, x in vars(self).items() if name != "extra"}
        return Case(**fields, extra={name: np.asarray(x)[index] for name, x in self.extra.items()})


def aggregate(case: Case, agg: str, term: TokenTerm, L_const: float | None = None) -> Gradient:
    """Average a per-token term over the batch, and its gradient likewise."""
    rows = case.rows()
    tokens = sum(len(case.positions(b)) for b in rows)
    loss, grad = [], np.zeros(case.mask.shape)
    for b in rows:
        for t in case.positions(b):
            weight = {
                "token_mean": lambda b=b: 1 / tokens,
                "seq_mean": lambda b=b: 1 / (len(rows) * len(case.positions(b))),
                "seq_sum": lambda b=b: 1 / len(rows),
                "seq_sum_const": lambda b=b: 1 / (len(rows) * L_const),
                "sum_const": lambda b=b: 1 / L_const,
            }[agg]()
            value, slope = term(b, t)
            loss.append(weight * value)
            grad[b, t] += weight * slope
    return math.fsum(loss), grad


def mean(xs: list[float]) -> float:
    return math.fsum(xs) / len(xs)


def sample_std(xs: list[float]) -> float:
    """ddof 1; exactly 0 of equal numbers."""
    if len(xs) < 2 or min(xs) == max(xs):
        return 0.0
    return math.sqrt(math.fsum((x - mean(xs)) ** 2 for x in xs) / (len(xs) - 1))


def centred(xs: list[float]) -> list[float]:
    """Minus the mean; exactly 0 of equal numbers."""
    return [0.0 if min(xs) == max(xs) else x - mean(xs) for x in xs]


def exact_mean(xs: list[float]) -> float:
    """The mean, exactly x of a list of x's; 0 of nothing."""
    if not xs:
        return 0.0
    return xs[0] if min(xs) == max(xs) else mean(xs)


def population_std(xs: list[float]) -> float:
    return math.sqrt(math.fsum(x * x for x in centred(xs)) / len(xs))
