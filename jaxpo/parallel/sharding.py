"""How arrays are sharded: parameters by a pattern of their path, batches by rows, activations by rows and positions."""

import math
import re
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpo.parallel.distributed import place

ROWS = ("data", "fsdp", "expert")  # mesh axes for the rows of a batch
POSITIONS = "context"  # mesh axis for the positions of activations [B, T, ...]
TOKENS = (*ROWS, POSITIONS)  # mesh axes for single tokens, and for the rows that a rollout decodes

# The first match wins. It may be anywhere in the path, so optimizer moments ("0/mu/blocks/wq") follow their parameter.
# Block parameters have a leading axis of layers.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(^|/)(embedding|head)$", PartitionSpec("tensor", "fsdp")),  # [V, D]
    (r"blocks/w[qkv]$", PartitionSpec(None, "fsdp", "tensor", None)),  # [L, D, heads, d]
    (r"blocks/wo$", PartitionSpec(None, "tensor", None, "fsdp")),  # [L, heads, d, D]
    (r"blocks/w_in$", PartitionSpec(None, "fsdp", None, "tensor")),  # [L, D, 2, M]
    (r"blocks/w_down$", PartitionSpec(None, "tensor", "fsdp")),  # [L, M, D]
    (r"blocks/b[qkv]$", PartitionSpec(None, "tensor", None)),  # [L, heads, d]
    (r"blocks/router$", PartitionSpec(None, "fsdp", None)),  # [L, D, E]
    (r"blocks/w_in$", PartitionSpec(None, "expert", "fsdp", None, "tensor")),  # of experts: [L, E, D, 2, M]
    (r"blocks/w_down$", PartitionSpec(None, "expert", "tensor", "fsdp")),  # [L, E, M, D]
)
# The data fix the size of a vocabulary, so its axis may stay whole. The mesh has to divide every other dimension.
MAY_STAY_WHOLE = {"embedding": 0, "head": 0}


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def spec_of(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The `PartitionSpec` of the array called ``name`` (a path with slashes).

    Raises:
      ValueError: the size of a mesh axis does not divide the dimension that is spread over it.
    """
    name = name.removesuffix("/weight")  # the matrix of a `jaxpo.policy.lora.Adapted`
    for pattern, spec in RULES:
        if not re.search(pattern, name) or len(spec) != len(shape):
            continue
        axes = list(spec)
        for i, axis in enumerate(axes):
            if axis is not None and shape[i] % mesh.shape[axis]:
                if MAY_STAY_WHOLE.get(name.rsplit("/", 1)[-1]) != i:
                    raise ValueError(
                        f"mesh.{axis}={mesh.shape[axis]} does not divide axis {i} of {name} {shape}: "
                        f"choose a divisor of {shape[i]}"
                    )
                axes[i] = None
        return PartitionSpec(*axes)
    return PartitionSpec()


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A tree of `NamedSharding`, one for each array (or shape) of ``tree``."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec_of(_name(path), x.shape, mesh)), tree
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that are the same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """The number of parts that the rows of a batch are cut into."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def rows_over_mesh(tree: Any, mesh: Mesh) -> Any:
    """Put arrays [B, ...] on the mesh, rows spread over ``ROWS``."""
    sharding = NamedSharding(mesh, PartitionSpec(ROWS))
    return place(tree, sharding)


def constrain(tree: Any, mesh: Mesh, *axes: Any) -> Any:
    """Keep the leading dimensions of arrays spread over ``axes``, each over one or several mesh axes (inside jit)."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec(*axes)))


def constrain_rows(tree: Any, mesh: Mesh) -> Any:
    """Keep the rows of arrays [B, ...] spread over the mesh (inside jit)."""
    return constrain(tree, mesh, ROWS)


def by_token(x: Array, mesh: Mesh | None) -> Array:
    """Flatten [B, T, ...], spread over ``ROWS`` and ``POSITIONS``, to [B T, ...], spread over ``TOKENS``. The tokens
    are in the order of the devices, so nothing moves. If positions are spread, the mesh has to divide both B and T."""
    if mesh is not None and mesh.shape[POSITIONS] > 1:
        rows, parts = batch_shards(mesh), mesh.shape[POSITIONS]
        x = x.reshape(rows, x.shape[0] // rows, parts, x.shape[1] // parts, *x.shape[2:]).swapaxes(1, 2)
        return x.reshape(-1, *x.shape[4:])
    return x.reshape(-1, *x.shape[2:])


def by_row(x: Array, rows: int, mesh: Mesh | None) -> Array:
    """The inverse of `by_token`: [B T, ...] to [B, T, ...]; B is ``rows``."""
    if mesh is not None and mesh.shape[POSITIONS] > 1:
        shards, parts = batch_shards(mesh), mesh.shape[POSITIONS]
        x = x.reshape(shards, parts, rows // shards, -1, *x.shape[1:]).swapaxes(1, 2)
        return x.reshape(rows, -1, *x.shape[4:])
    return x.reshape(rows, -1, *x.shape[1:])


def lay_out(tree: Any, mesh: Mesh) -> Any:
    """Move parameters from another mesh of the same devices to the sharding that the rules give them on this one
    (inside jit).

    It takes two steps, since in one step the partitioner would bring every array whole to every device. The first step
    exchanges parts, and cuts each array finer than needed: devices that will have the same copy each have a piece of
    it. The second step gathers these pieces.
    """

    def apart(spec: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
        axes = tuple(axis for axis in TOKENS if axis == "fsdp" or axis not in spec)
        parts = math.prod(mesh.shape[axis] for axis in axes)
        return PartitionSpec(
            *(axes if a == "fsdp" and n % parts == 0 else a for a, n in zip(spec, shape, strict=False))
        )

    final = shardings(tree, mesh)
    first = jax.tree.map(lambda x, s: NamedSharding(mesh, apart(s.spec, x.shape)), tree, final)
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(tree, first), final)


def moved_bytes(tree: Any, old: Any, new: Any) -> int:
    """The most bytes that any device receives when arrays (or shapes) move from the shardings ``old`` to ``new``: the
    part of each new shard that the device does not hold yet."""
    received: dict[jax.Device, int] = {}
    for x, a, b in zip(*map(jax.tree.leaves, (tree, old, new)), strict=True):
        held = a.devices_indices_map(x.shape)
        for device, wanted in b.devices_indices_map(x.shape).items():
            sides = [(s.indices(n), h.indices(n)) for s, h, n in zip(wanted, held[device], x.shape, strict=True)]
            size = math.prod(s[1] - s[0] for s, _ in sides)
            common = math.prod(max(0, min(s[1], h[1]) - max(s[0], h[0])) for s, h in sides)
            received[device] = received.get(device, 0) + (size - common) * x.dtype.itemsize
    return max(received.values())
