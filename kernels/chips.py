"""The chip sheet, and for which devices a program is being traced."""

from typing import NamedTuple

import jax

MIB = 2**20


class Chip(NamedTuple):
    """One JAX device, which on v5p is a pair of cores, in the numbers that its maker publishes.

    vmem: bytes of a core; hbm: bytes that the compiler grants a program; flops: bfloat16 operations per second;
    bandwidth: bytes per second between HBM and the cores; ici: bytes per second that a chip sends to its neighbors,
    over all links together (half of the published figure, which counts both directions).

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
        """Operations that take as long as moving a byte."""
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
    """The platform of the mesh that is being traced for (inside ``shard_map`` or ``jax.set_mesh``, also of devices that
    are not attached), else of the default backend: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_one_device() -> bool:
    """Whether what is traced runs on one device: there is only one, or this is the inside of a ``shard_map``."""
    around = jax.sharding.get_abstract_mesh()
    if not around.axis_names:
        return jax.device_count() == 1
    return around.size == 1 or len(around.manual_axes) == len(around.axis_names)
