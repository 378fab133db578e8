"""Parameters that stay in the memory of the host, and are copied to the device when they are used."""

from typing import Any

import jax
from jax.sharding import Mesh

from jaxpo.parallel.sharding import shardings

HOST = "pinned_host"


def host_shardings(tree: Any, mesh: Mesh) -> Any:
    """Like `shardings`, but each device's part is in the memory of its host."""
    return jax.tree.map(lambda s: s.with_memory_kind(HOST), shardings(tree, mesh))


def to_host_memory(tree: Any, mesh: Mesh) -> Any:
    """Copy arrays into the memory of the host.

    Raises:
      ValueError: the devices have no such memory.
    """
    check_host_memory(mesh)
    return jax.device_put(tree, host_shardings(tree, mesh), may_alias=False)


def check_host_memory(mesh: Mesh) -> None:
    """Raise ``ValueError`` if the devices of the mesh cannot reach their host's memory."""
    device = mesh.local_devices[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise ValueError(
            f"config.training.offload_reference: {device.device_kind} has no memory {HOST!r}, only "
            f"{', '.join(kinds)}: set it to False"
        )


def fetched(tree: Any) -> Any:
    """Copy arrays from the memory of the host to the device (inside jit); arrays on the device stay as they are."""
    host, device = jax.memory.Space.Host, jax.memory.Space.Device
    return jax.tree.map(lambda x: jax.device_put(x, device) if jax.typeof(x).memory_space == host else x, tree)


def is_on_host(x: Any) -> bool:
    """Whether an array, or a shape with a sharding, is in the memory of the host."""
    return x.sharding.memory_kind == HOST
