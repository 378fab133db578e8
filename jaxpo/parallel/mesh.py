"""The device mesh: axes ``data`` (replicas), ``fsdp`` (parameters and rows), ``expert`` (experts and rows), ``context``
(positions of a sequence), ``tensor`` (heads, MLP, vocabulary).

The last axes communicate most often, so their devices are closest together.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "expert", "context", "tensor")


def mesh_shape(sizes: Mapping[str, int], devices: int, field: str = "mesh") -> tuple[int, ...]:
    """The sizes of all ``AXES``; a size of ``-1`` becomes the rest of the devices. Errors call the sizes ``field``.

    Raises:
      ValueError: an unknown axis, a size below 1, more than one -1, or a product that differs from ``devices``.
    """
    for name in sizes:
        if name not in AXES:
            raise ValueError(f"{field}.{name} does not exist; axes: {', '.join(AXES)}")
    shape = [sizes.get(name, 1) for name in AXES]
    for name, size in zip(AXES, shape, strict=True):
        if size != -1 and size < 1:
            raise ValueError(f"{field}.{name} must be -1 (the rest) or at least 1, not {size}")
    if shape.count(-1) > 1:
        raise ValueError(
            f"only one axis of the mesh may be -1 (the rest): {field} {dict(zip(AXES, shape, strict=True))}"
        )
    known = int(np.prod([s for s in shape if s != -1]))
    if -1 in shape:
        shape[shape.index(-1)] = devices // known if devices % known == 0 else 0
    if int(np.prod(shape)) != devices:
        raise ValueError(
            f"{field} {dict(sizes)} does not fit {devices} devices: the product of its axes must be {devices}"
        )
    return tuple(shape)


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over ``devices`` (all by default). ``{"data": -1}`` is the default shape."""
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape({"data": -1} if sizes is None else sizes, len(devices))
    # A mesh axis may be a part of a physical axis: 2 of the 4 chips along a side of a pod.
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def reshaped(mesh: Mesh, sizes: Mapping[str, int | None]) -> Mesh:
    """A mesh of the same devices in the same order with other sizes of the axes (`reshaped_sizes`); ``mesh`` itself if
    no size is given."""
    given = reshaped_sizes(sizes)
    if not given:
        return mesh
    return Mesh(mesh.devices.reshape(mesh_shape(given, mesh.size)), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def reshaped_sizes(sizes: Mapping[str, int | None]) -> dict[str, int]:
    """The sizes that are not None, with "data" as the rest unless it has a size; {} if all are None."""
    given = {name: n for name, n in sizes.items() if n is not None}
    return {"data": -1, **given} if given else {}
