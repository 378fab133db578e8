"""Count the operations of a computation from its jaxpr.

A loop body counts as often as it runs; the compiler's own count takes it once.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr


def count(jaxpr: ClosedJaxpr | Jaxpr, *, loop: Sequence[float] = ()) -> float:
    """Count the multiplications and additions of all matrix products (and kernels' own estimates), on all devices.

    Element-wise work is left out: other units do it while they wait for memory. Of a ``cond``, the costliest branch
    counts. A kernel without an estimate costs its body at every step of its grid that it does not skip. The content of
    a ``shard_map`` counts once for each of its devices. Recomputation (``jax.checkpoint``) counts.

    Args:
      loop: trips of a ``while`` loop, whose end depends on values, and (on average) of the loops inside it, by depth; 1
        where ``loop`` is too short.
    """
    return float(sum(_of_equation(eqn, loop) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns))


def _of_equation(eqn: Any, loop: Sequence[float]) -> float:
    name, p = eqn.primitive.name, eqn.params
    match name:
        case "dot_general":
            (contracted, _), _ = p["dimension_numbers"]
            return 2.0 * eqn.outvars[0].aval.size * _product(eqn.invars[0].aval.shape, contracted)
        case "ragged_dot_general":
            return _ragged(eqn)
        case "conv_general_dilated":
            kernel, out_features = eqn.invars[1].aval, p["dimension_numbers"].rhs_spec[0]
            return 2.0 * eqn.outvars[0].aval.size * kernel.size / kernel.shape[out_features]
        case "scan":
            return p["length"] * count(p["jaxpr"], loop=loop)
        case "while":
            times, within = (loop[0], loop[1:]) if loop else (1, ())
            return times * (count(p["body_jaxpr"], loop=within) + count(p["cond_jaxpr"], loop=within))
        case "cond":
            return max(count(branch, loop=loop) for branch in p["branches"])
        case "shard_map":
            shards = math.prod(p["mesh"].shape[axis] for axis in p["newly_manual_axes"])
            return shards * count(p["jaxpr"], loop=loop)
        case "pallas_call":
            if p["cost_estimate"]:
                return p["cost_estimate"].flops
            return _steps(p["name"], p["grid_mapping"], eqn) * count(p["jaxpr"], loop=loop)
    return sum(count(inner, loop=loop) for inner in _inner(p))


def _steps(name: str | None, mapping: Any, eqn: Any) -> int:
    """The number of steps of a kernel's grid that are not skipped.

    Splash attention (`jaxpo.policy.splash`) skips the blocks of scores beyond the diagonal; the last query stands at
    the last key. With a window, its grid already holds only the blocks inside.
    """
    steps = math.prod(mapping.grid)
    if not (name or "").startswith("splash_"):
        return steps
    q, k = (v.aval.shape for v in eqn.invars[mapping.num_index_operands :][:2])  # [..., heads, tokens, d]
    block_q, block_k = (mapping.block_mappings[i].block_shape[-2].block_size for i in range(2))
    seen = sum(-(-(k[-2] - q[-2] + end) // block_k) for end in range(block_q, q[-2] + 1, block_q))
    return min(steps, math.prod(q[:-2]) * seen)


def _ragged(eqn: Any) -> float:
    """Count a ragged dot, where each row meets one of the matrices.

    Shapes: lhs [m, k], rhs [groups, k, n], or [m, n] where the rows are summed over. Along a mesh axis "expert" each
    row meets its matrix on one device only (`jaxpo.policy.experts`; TPUs leave out rows of no group), and all devices
    get the same number of rows: the router is assumed to be balanced.
    """
    lhs, rhs = (v.aval for v in eqn.invars[:2])
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    other = {*contracted, *batch, *numbers.rhs_group_dimensions}
    mesh = lhs.sharding.mesh
    devices = mesh.shape["expert"] if "expert" in mesh.manual_axes else 1
    return 2.0 * lhs.size * _product(rhs.shape, [i for i in range(rhs.ndim) if i not in other]) / devices


def _product(shape: tuple[int, ...], axes: Any) -> int:
    return math.prod(shape[i] for i in axes)


def _inner(params: dict[str, Any]) -> Iterator[ClosedJaxpr | Jaxpr]:
    """The jaxprs that an equation calls once, as for jit, checkpoint and custom derivatives."""
    for leaf in jax.tree.leaves(list(params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)):
        if isinstance(leaf, ClosedJaxpr | Jaxpr):
            yield leaf


def largest(jaxpr: ClosedJaxpr | Jaxpr, most: int = 5) -> list[tuple[int, str]]:
    """The largest arrays that are computed, one for each shape, as (bytes on all devices, description).

    A description reads ``bfloat16[8,4096] from dot_general at FILE:LINE (FUNCTION)``.
    """
    found: dict[str, tuple[int, str]] = {}

    def visit(inner: ClosedJaxpr | Jaxpr) -> None:
        for eqn in getattr(inner, "jaxpr", inner).eqns:
            below = list(_inner(eqn.params))
            for x in [v.aval for v in eqn.outvars if isinstance(v.aval, ShapedArray)] if not below else []:
                shape = f"{x.dtype}[{','.join(map(str, x.shape))}]"
                where = source_info_util.summarize(eqn.source_info)
                if jnp.issubdtype(x.dtype, jnp.number):
                    found.setdefault(shape, (x.size * x.dtype.itemsize, f"{shape} from {eqn.primitive} at {where}"))
            for called in below:
                visit(called)

    visit(jaxpr)
    return sorted(found.values(), reverse=True)[:most]
