"""One mesh for rollout and training, and one table that says how arrays are sharded over it."""

from jaxpo.parallel.mesh import AXES, make_mesh, reshaped
from jaxpo.parallel.sharding import (
    POSITIONS,
    ROWS,
    TOKENS,
    batch_shards,
    by_row,
    by_token,
    constrain,
    constrain_rows,
    lay_out,
    moved_bytes,
    replicated,
    rows_over_mesh,
    shardings,
)

__all__ = [
    "AXES",
    "POSITIONS",
    "ROWS",
    "TOKENS",
    "batch_shards",
    "by_row",
    "by_token",
    "constrain",
    "constrain_rows",
    "lay_out",
    "make_mesh",
    "moved_bytes",
    "replicated",
    "reshaped",
    "rows_over_mesh",
    "shardings",
]
