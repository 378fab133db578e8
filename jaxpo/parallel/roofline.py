"""How long a step takes at the least, by the chip sheet."""

from typing import NamedTuple

from jaxpo.kernels.chips import Chip


class Work(NamedTuple):
    """What one chip does. operations: of matrix products; hbm: bytes to and from memory; sent: bytes to other chips."""

    operations: float
    hbm: float
    sent: float


def seconds(work: Work, chip: Chip) -> dict[str, float]:
    """Seconds of each term by itself, at the published peaks: ``operations / flops``, ``hbm / bandwidth``,
    ``sent / ici``. With all three perfectly overlapped a step takes the largest of them, which binds it."""
    return dict(
        compute=work.operations / chip.flops, memory=work.hbm / chip.bandwidth, interconnect=work.sent / chip.ici
    )


def bound(terms: dict[str, float]) -> str:
    """The binding term."""
    return max(terms, key=terms.__getitem__)
