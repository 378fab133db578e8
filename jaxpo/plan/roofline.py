"""How long a step takes at the least, by the chip sheet."""

from typing import NamedTuple

from jaxpo.kernels.chips import Chip

HOST_LINK = 16e9  # bytes per second from a host to each of its chips: 16 lanes of PCIe 3. An assumption, not published


class Work(NamedTuple):
    """What one chip does. operations: of matrix products; hbm: bytes to and from memory; sent: bytes to other chips;
    fetched: bytes from the host's memory."""

    operations: float
    hbm: float
    sent: float
    fetched: float = 0.0


def seconds(work: Work, chip: Chip) -> dict[str, float]:
    """Seconds of each term by itself, at the published peaks: ``operations / flops``, ``hbm / bandwidth``,
    ``sent / ici``; ``fetched / HOST_LINK`` where there is any. With all perfectly overlapped a step takes the largest
    of them, which binds it."""
    terms = dict(
        compute=work.operations / chip.flops, memory=work.hbm / chip.bandwidth, interconnect=work.sent / chip.ici
    )
    return terms | ({"host link": work.fetched / HOST_LINK} if work.fetched else {})


def bound(terms: dict[str, float]) -> str:
    """The binding term."""
    return max(terms, key=terms.__getitem__)
