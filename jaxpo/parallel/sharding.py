"""Where arrays live: parameters by the pattern of their path, batches by rows."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpo.parallel.distributed import place

ROWS = ("data", "fsdp")  # mesh axes over which the rows of a batch are spread

# First match wins, searched anywhere in the path, so that optimizer moments ("0/mu/blocks/wq") follow their parameter.
# Block parameters have a leading axis of layers.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(^|/)(embedding|head)$", PartitionSpec("tensor", "fsdp")),  # [V, D]
    (r"blocks/w[qkv]$", PartitionSpec(None, "fsdp", "tensor", None)),  # [L, D, heads, d]
    (r"blocks/wo$", PartitionSpec(None, "tensor", None, "fsdp")),  # [L, heads, d, D]
    (r"blocks/w_in$", PartitionSpec(None, "fsdp", None, "tensor")),  # [L, D, 2, M]
    (r"blocks/w_down$", PartitionSpec(None, "tensor", "fsdp")),  # [L, M, D]
    (r"blocks/b[qkv]$", PartitionSpec(None, "tensor", None)),  # [L, heads, d]
    (r"blocks/router$", PartitionSpec(None, "fsdp", None)),  # [L, D, E]
    (r"blocks/w_in$", PartitionSpec(None, None, "fsdp", None, "tensor")),  # of experts: [L, E, D, 2, M]
    (r"blocks/w_down$", PartitionSpec(None, None, "tensor", "fsdp")),  # [L, E, M, D]
)
# A vocabulary is what the data made it; every other dimension is chosen and has to divide.
MAY_STAY_WHOLE = {"embedding": 0, "head": 0}


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def spec_of(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The `PartitionSpec` of the array called ``name`` (a path with slashes).

    Raises:
      ValueError: a dimension that the axis of the mesh it is spread over does not divide.
    """
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
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def rows_over_mesh(tree: Any, mesh: Mesh) -> Any:
    """Put arrays [B, ...] on the mesh, rows spread over ``ROWS``."""
    sharding = NamedSharding(mesh, PartitionSpec(ROWS))
    return place(tree, sharding)


def constrain_rows(tree: Any, mesh: Mesh) -> Any:
    """Inside jit: keep the rows of arrays [B, ...] spread over the mesh."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec(ROWS)))
