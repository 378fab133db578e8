"""Roofline: the least time of a step, from the published peaks of a chip."""

from typing import NamedTuple

from jaxpo.kernels.chips import Chip

HOST_LINK = 16e9  # bytes per second from a host to each of its chips: 16 lanes of PCIe 3. An assumption, not published


class Work(NamedTuple):
    """The work of one chip.

    operations: additions and multiplications of matrix products.
    hbm: bytes read from and written to its memory.
    sent: bytes sent to other chips.
    fetched: bytes read from the host's memory.
    """

    operations: float
    hbm: float
    sent: float
    fetched: float = 0.0


def seconds(work: Work, chip: Chip) -> dict[str, float]:
    """The seconds of each term by itself, at the published peaks.

    compute: ``operations / flops``.
    memory: ``hbm / bandwidth``.
    interconnect: ``sent / ici``.
    host link: ``fetched / HOST_LINK``, only if something is fetched.

    If all of them overlap perfectly, a step takes as long as the largest, the binding term.
    """
    terms = dict(
        compute=work.operations / chip.flops, memory=work.hbm / chip.bandwidth, interconnect=work.sent / chip.ici
    )
    return terms | ({"host link": work.fetched / HOST_LINK} if work.fetched else {})


def bound(terms: dict[str, float]) -> str:
    """The name of the binding (largest) term."""
    return max(terms, key=terms.__getitem__)
