"""How far an objective in float32 may be from float64: a bound for each, which the contracts hold it to.

The error is that of the loss, relative to the loss or to 1, and of the gradient, relative to its largest entry; the
numbers given are float32 in both. ``python docs/float32.py`` measures it and writes docs/float32.md.
"""

from typing import NamedTuple


class Bound(NamedTuple):
    """The largest error, and the reason if it is not the common one."""

    error: float
    why: str = ""


COMMON = Bound(5e-6, "rewards around 30 less the mean of their group come near it, all else stays within 1e-6")
OWN = Bound(1e-4)  # of an objective that is not registered: beyond it a formula needs another form
LOOSER = {"reinforce_pp": Bound(2e-5, "returns around the reward itself, less their mean over all tokens of the batch")}


def bound_of(name: str, registered: bool = True) -> Bound:
    """The bound of an objective."""
    return LOOSER.get(name, COMMON) if registered else OWN
