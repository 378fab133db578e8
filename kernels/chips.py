"""A table of chips, and the devices that a program is being traced for."""

from typing import NamedTuple

import jax

MIB = 2**20


class Chip(NamedTuple):
    """The published numbers of one JAX device, which on v5p is a pair of cores.

    vmem: bytes of VMEM of a core.
    hbm: bytes of HBM that the compiler allows a program.
    flops: bfloat16 operations per second.
    bandwidth: bytes per second between HBM and the cores.
    ici: bytes per second that a chip sends to its neighbors, over all links together (half of the published figure,
      which counts both directions).

    Sources: cloud.google.com/tpu/docs/v5e, /v5p and /v6e; vmem and hbm: libtpu, which keeps 256 MiB for itself.
    """

    name: str
    kinds: tuple[str, ...]  # values of ``jax.Device.device_kind``
    vmem: int
    hbm: int
    flops: float
    bandwidth: float
    ici: float

    @property
    def flops_per_byte(self) -> float:
        """The number of operations that take as long as moving one byte."""
        return self.flops / self.bandwidth


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), 128 * MIB, 16128 * MIB, 197e12, 819e9, 200e9),
        Chip("v5p", ("TPU v5", "TPU v5p"), 64 * MIB, 98038 * MIB, 459e12, 2765e9, 600e9),
        Chip("v6e", ("TPU v6 lite", "TPU v6e"), 128 * MIB, 32000 * MIB, 918e12, 1640e9, 400e9),
    )
}


def target_platform() -> str:
    """The platform that is being traced for: "cpu", "gpu" or "tpu". Inside ``shard_map`` or ``jax.set_mesh`` it is the
    platform of the mesh (whose devices need not be attached), elsewhere that of the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_one_device() -> bool:
    """Whether the traced code runs on one device: there is only one, or the code is inside a ``shard_map``."""
    around = jax.sharding.get_abstract_mesh()
    if not around.axis_names:
        return jax.device_count() == 1
    return around.size == 1 or len(around.manual_axes) == len(around.axis_names)
