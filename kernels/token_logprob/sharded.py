"""Implementations on a mesh: the vocabulary is spread over the axis ``tensor``, tokens over all other axes.

Each device runs the forward pass of an implementation on its tokens and its rows of the vocabulary. The sums are merged
by one maximum and one sum of a few floats a token. The backward pass gives each device its rows of the table's gradient
(summed over the devices that hold other tokens) and a part of dhidden, which a sum of [N, D] over devices completes.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jaxpo.kernels.token_logprob.core import Gradients, Implementation, Other, Problem, Rows, Statics, Sums

VOCAB = "tensor"
PARTS = "fsdp"  # the axis that the features of parameters are spread over
POSITIONS = "context"  # the axis that the positions of a row are spread over, if the mesh has it


def token_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes that tokens are spread over, in the order of the mesh."""
    return tuple(axis for axis in mesh.axis_names if axis != VOCAB)


def row_axes(mesh: Mesh) -> tuple[str, ...]:
    """The token axes that whole rows are spread over: all except `POSITIONS`."""
    return tuple(axis for axis in token_axes(mesh) if axis != POSITIONS)


def size_of(mesh: Mesh, axes: Sequence[str]) -> int:
    """The number of devices along the axes together."""
    return math.prod(mesh.shape[axis] for axis in axes)


@functools.cache
def over(implementation: Implementation, mesh: Mesh) -> Implementation:
    """``implementation`` with each call spread over ``mesh``.

    Raises:
      ValueError: the mesh lacks one of the axes "fsdp", "tensor".
    """
    for axis in (PARTS, VOCAB):
        if axis not in mesh.shape:
            raise ValueError(f"token_logprob: the mesh has no axis {axis!r}; its axes: {', '.join(mesh.shape)}")
    return Implementation(
        f"sharded {implementation.name}",
        functools.partial(forward, implementation, mesh),
        functools.partial(backward, implementation, mesh),
    )


def pad_to(x: Array | None, size: int) -> Array | None:
    """``x`` padded with zeros at the end of its leading axis to the given size."""
    return None if x is None else jnp.pad(x, [(0, size - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


def fitted(problem: Problem, mesh: Mesh) -> Problem:
    """The problem with tokens and vocabulary padded to sizes that the mesh divides; added entries are masked."""
    (n, _), (v, _) = problem.hidden.shape, problem.table.shape
    tokens, shards = size_of(mesh, token_axes(mesh)), mesh.shape[VOCAB]
    n_to, v_to = -(-n // tokens) * tokens, -(-v // shards) * shards
    mask, q = problem.vocab_mask, problem.other
    if v_to > v and mask is None:
        mask = jnp.ones(v, bool)
    if q is not None:
        q = Other(pad_to(q.hidden, n_to), pad_to(q.table, v_to), pad_to(q.bias, v_to))
    return problem._replace(
        hidden=pad_to(problem.hidden, n_to),
        table=pad_to(problem.table, v_to),
        targets=pad_to(problem.targets, n_to),
        bias=pad_to(problem.bias, v_to),
        vocab_mask=pad_to(mask, v_to),
        other=q,
    )


def specs(problem: Problem, mesh: Mesh) -> Problem:
    """A `PartitionSpec` for each array of the problem."""
    tokens, vocab, whole = PartitionSpec(token_axes(mesh)), PartitionSpec(VOCAB), PartitionSpec()
    q = problem.other
    return Problem(
        hidden=tokens,
        table=vocab,
        targets=tokens,
        bias=None if problem.bias is None else vocab,
        vocab_mask=None if problem.vocab_mask is None else vocab,
        temperature=whole,
        second_temperature=None if problem.second_temperature is None else whole,
        other=None if q is None else Other(tokens, vocab, None if q.bias is None else vocab),
    )


def of_shard(problem: Problem) -> tuple[Problem, Array]:
    """The problem with targets counted from the first row of this device's part of the vocabulary; and that row."""
    first = jax.lax.axis_index(VOCAB) * problem.table.shape[0]
    return problem._replace(targets=problem.targets - first.astype(problem.targets.dtype)), first


def spread(f: Any, mesh: Mesh, in_specs: Any, out_specs: Any) -> Any:
    """`jax.shard_map` without the check of replication, which Pallas calls do not pass."""
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def collect(names: Sequence[str], reduce: Any, sums: Sums) -> Sums:
    """Reduce the fields ``names`` of the sums over the shards, in one collective of [fields, N]."""
    names = [name for name in names if getattr(sums, name) is not None]
    reduced = reduce(jnp.stack([getattr(sums, name) for name in names]), VOCAB)
    return sums._replace(**dict(zip(names, reduced, strict=True)))


def merged(sums: Sums, first: Array, problem: Problem) -> Sums:
    """Merge the `Sums` of the shards to those of the whole vocabulary, the same on every shard."""
    t, top = problem.temperature, collect(("m", "target", "m_q"), jax.lax.pmax, sums)
    shift = (sums.m - top.m) / t
    scale = jnp.exp(shift)
    part = sums._replace(s=scale * sums.s)
    if sums.sz is not None:
        part = part._replace(sz=scale * (sums.sz + shift * sums.s))
    if sums.sp2 is not None:
        part = part._replace(sp2=jnp.square(scale) * sums.sp2)
    if sums.s2 is not None:
        part = part._replace(s2=jnp.exp((sums.m - top.m) / problem.second_temperature) * sums.s2)
    if sums.sd is not None:
        part = part._replace(sd=scale * sums.sd, s_q=jnp.exp((sums.m_q - top.m_q) / t) * sums.s_q)
    out = collect(("s", "sz", "sp2", "s2", "s_q", "sd"), jax.lax.psum, part)
    if sums.id is not None:
        last = jnp.iinfo(jnp.int32).max
        mine = jnp.where(sums.m == top.m, sums.id + first.astype(jnp.int32), last)
        out = out._replace(id=jax.lax.pmin(mine, VOCAB))
    return out._replace(m=top.m, target=top.target, m_q=top.m_q)


def forward(implementation: Implementation, mesh: Mesh, statics: Statics, problem: Problem) -> Sums:
    """See `core.Implementation`."""

    def local(problem: Problem) -> Sums:
        problem, first = of_shard(problem)
        return merged(implementation.forward(statics, problem), first, problem)

    n, padded = problem.hidden.shape[0], fitted(problem, mesh)
    sums = spread(local, mesh, (specs(padded, mesh),), PartitionSpec(token_axes(mesh)))(padded)
    return jax.tree.map(lambda x: x[:n], sums)


def scatters(problem: Problem, mesh: Mesh) -> bool:
    """Whether the table's gradient is scattered over "fsdp", so that each device gets only the features of its own
    part: if "fsdp" has several devices and divides the features."""
    return mesh.shape[PARTS] > 1 and problem.table.shape[1] % mesh.shape[PARTS] == 0


def gradient_specs(problem: Problem, mesh: Mesh) -> Gradients:
    """A `PartitionSpec` for each gradient that `summed` returns."""
    features = PARTS if scatters(problem, mesh) else None
    return Gradients(PartitionSpec(token_axes(mesh)), PartitionSpec(VOCAB, features), PartitionSpec(VOCAB))


def summed(grads: Gradients, problem: Problem, mesh: Mesh) -> Gradients:
    """Sum the gradients of a shard's tokens and vocabulary over the devices that hold the other parts."""
    scatter, wide = scatters(problem, mesh), jax.tree.map(lambda x: x.astype(problem.temperature.dtype), grads)
    tokens = token_axes(mesh)
    hidden, bias = jax.lax.psum(wide.hidden, VOCAB), jax.lax.psum(wide.bias, tokens)
    table = jax.lax.psum(wide.table, tuple(axis for axis in tokens if axis != PARTS) if scatter else tokens)
    if scatter and table is not None:
        table = jax.lax.psum_scatter(table, PARTS, scatter_dimension=1, tiled=True)
    return Gradients(hidden, table, bias)


def backward(implementation: Implementation, mesh: Mesh, statics: Statics, problem: Problem, rows: Rows) -> Gradients:
    """See `core.Implementation`."""

    def local(problem: Problem, rows: Rows) -> Gradients:
        return summed(implementation.backward(statics, of_shard(problem)[0], rows), problem, mesh)

    (n, _), (v, _), padded = problem.hidden.shape, problem.table.shape, fitted(problem, mesh)
    rows = jax.tree.map(lambda x: pad_to(x, padded.hidden.shape[0]), rows)
    of_rows = jax.tree.map(lambda _: PartitionSpec(token_axes(mesh)), rows)
    grads = spread(local, mesh, (specs(padded, mesh), of_rows), gradient_specs(problem, mesh))(padded, rows)

    def cut(x: Array | None, size: int) -> Array | None:
        return None if x is None else x[:size]

    return Gradients(cut(grads.hidden, n), cut(grads.table, v), cut(grads.bias, v))
