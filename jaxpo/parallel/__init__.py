"""One mesh for rollout and training, and one table that says how arrays lie on it."""

from jaxpo.parallel.mesh import AXES, make_mesh
from jaxpo.parallel.sharding import ROWS, batch_shards, constrain_rows, replicated, rows_over_mesh, shardings

__all__ = ["AXES", "ROWS", "batch_shards", "constrain_rows", "make_mesh", "replicated", "rows_over_mesh", "shardings"]
