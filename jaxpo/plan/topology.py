"""Slices of TPU chips, named as ``v5p:4x4x4``. libtpu compiles for them without the chips."""

import importlib.util
import math
import os
from typing import NamedTuple

import jax
from jax.experimental import topologies

from jaxpo.kernels.chips import CHIPS, Chip
from jaxpo.parallel.host import quiet_libtpu
from jaxpo.registry import unknown

# Slices that the cloud offers, by chip: cloud.google.com/tpu/docs/{v5e,v5p,v6e}.
SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x4x12", "4x8x8", "4x8x12", "8x8x8", "8x8x12"),
    *("8x8x16", "8x16x16", "16x16x16"),
)
SHAPES = {"v5e": SQUARES, "v6e": SQUARES, "v5p": CUBES}


class Topology(NamedTuple):
    """A slice of TPU chips.

    name: ``chip:shape``.
    chip: its kind of chip.
    size: number of chips.
    cloud: the cloud's name for it.
    """

    name: str
    chip: Chip
    size: int
    cloud: str


def parse(name: str) -> Topology:
    """The slice called ``name``, e.g. ``v5p:4x4x4``: 64 chips, which the cloud calls v5p-128 (it counts v5p in cores).

    Raises:
      ValueError: no such chip or shape; the error names the nearest and all choices.
    """
    kind, _, shape = name.partition(":")
    if kind not in SHAPES:
        raise ValueError(unknown("chip of --topology", kind, [f"{k}:{shapes[-1]}" for k, shapes in SHAPES.items()]))
    if shape not in SHAPES[kind]:
        raise ValueError(unknown(f"shape of a {kind} slice", shape, SHAPES[kind]))
    size = math.prod(int(n) for n in shape.split("x"))
    cloud = {"v5e": f"v5litepod-{size}", "v5p": f"v5p-{2 * size}", "v6e": f"v6e-{size}"}[kind]
    return Topology(name, CHIPS[kind], size, cloud)


def devices(topology: Topology) -> list[jax.Device]:
    """The devices of the slice, to compile for.

    Raises:
      ModuleNotFoundError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError("compiling for TPUs needs libtpu (no chip): pip install -e '.[plan]'")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # a second process would abort on a lock file
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # A program for an absent chip can be written to the cache of compiled programs, but not read back.
    jax.config.update("jax_enable_compilation_cache", False)
    options = dict(chips_per_host_bounds=(1, 1, 1)) if topology.size == 1 else {}
    with quiet_libtpu():
        return list(topologies.get_topology_desc(topology.name, platform="tpu", **options).devices)
