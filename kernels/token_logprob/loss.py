"""A loss of the statistics and its gradients, from one pass over the logits.

`token_logprob` and its derivative compute the logits twice, since the loss has to be known in between: 8 N D V
operations. If the loss is a sum over slices of the tokens, it can be computed slice by slice. The logits of a slice
over the whole vocabulary are computed once; from them come its statistics, its loss, the cotangents and both gradients.
This takes 6 N D V operations, 4 N D V with a frozen table.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jaxpo.kernels.token_logprob import sharded
from jaxpo.kernels.token_logprob.api import positive, problem_of
from jaxpo.kernels.token_logprob.core import (
    Gradients,
    Problem,
    Statics,
    Sums,
    TokenLogProb,
    coefficients,
    finish,
    needed_sums,
    perturbed_of,
)
from jaxpo.kernels.token_logprob.xla import block_dx, block_sums, both_logits, products, split

# (statistics of a slice, other data of the slice) -> (its part of the loss [], anything)
SliceLoss = Callable[[TokenLogProb, Any], tuple[Array, Any]]


def token_logprob_loss(
    loss: SliceLoss,
    hidden: Array,
    unembed: Array,
    targets: Array,
    parts: Any,
    *,
    bias: Array | None = None,
    temperature: float | Array = 1.0,
    softcap: float | None = None,
    vocab_mask: Array | None = None,
    want: Sequence[str] = ("logp", "entropy"),
    second_temperature: float | Array | None = None,
    mesh: Mesh | None = None,
) -> tuple[Array, Any]:
    """``sum_c loss(statistics of slice c, parts[c])`` over C slices of N / C consecutive tokens each.

    Differentiable in hidden, unembed and bias: the gradients are computed together with the value, and stored. The
    logits [N / C, V] of one slice are held at a time.

    Args:
      loss: differentiated in the statistics; everything that it reads from ``parts``, or closes over, is constant.
      parts: other data of the slices, leaves [C, ...].
      mesh: as in `token_logprob`; its token axes have to divide C, except the axis "context", if there is one. Each
        device along that axis has an equal part of every slice, and ``loss`` gets the statistics of all parts, one
        after the other.
      Others as in `token_logprob`; ``want`` must not hold "kl_to".

    Returns:
      The sum, and the second output of ``loss``, stacked [C, ...].

    Raises:
      ValueError: as in `token_logprob`; also if the slices do not divide the tokens, or the mesh does not divide the
        slices.
    """
    if "kl_to" in want:
        raise ValueError("token_logprob_loss: 'kl_to' cannot be wanted; use token_logprob")
    problem = problem_of(hidden, unembed, targets, bias, temperature, vocab_mask, want, second_temperature, None)
    positive("softcap", softcap)
    n, count = targets.shape[0], jax.tree.leaves(parts)[0].shape[0]
    shards = 1 if mesh is None else sharded.size_of(mesh, sharded.row_axes(mesh))
    within = 1 if mesh is None else mesh.shape.get(sharded.POSITIONS, 1)  # of a slice
    if n % (count * within) or count % shards:
        raise ValueError(
            f"token_logprob_loss: {n} tokens cannot be cut into {count} slices over {shards} x {within} devices"
        )
    return evaluate(loss, mesh, Statics(want=frozenset(want), softcap=softcap), problem, parts)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def evaluate(loss: SliceLoss, mesh: Mesh | None, statics: Statics, problem: Problem, parts: Any) -> tuple[Array, Any]:
    """The value without gradients, when nothing is differentiated."""
    return run(loss, mesh, statics, problem, parts)[:2]


def _forward(loss: SliceLoss, mesh: Mesh | None, statics: Statics, problem: Any, parts: Any) -> tuple[Any, Any]:
    statics, problem = perturbed_of(statics, problem)
    parts = jax.tree.map(lambda x: x.value, parts, is_leaf=lambda x: hasattr(x, "perturbed"))
    value, aux, grads = run(loss, mesh, statics, problem, parts)
    names = ("hidden", "table", "bias")
    stored = {x: getattr(grads, x).astype(getattr(problem, x).dtype) for x in names if getattr(grads, x) is not None}
    temperatures = problem.temperature, problem.second_temperature
    return (value, aux), (Gradients(*(stored.get(x) for x in names)), temperatures)


def _backward(loss: SliceLoss, mesh: Mesh | None, statics: Statics, residuals: Any, g: Any) -> tuple[Problem, None]:
    grads, temperatures = residuals
    scaled = jax.tree.map(lambda x: (g[0] * x).astype(x.dtype), grads)
    # As in `core.evaluate`: the gradient of a temperature is not computed.
    nan, second = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), temperatures)
    return Problem(scaled.hidden, scaled.table, None, scaled.bias, None, nan, second, None), None


evaluate.defvjp(_forward, _backward, symbolic_zeros=True)


def run(
    loss: SliceLoss, mesh: Mesh | None, statics: Statics, problem: Problem, parts: Any
) -> tuple[Array, Any, Gradients]:
    """The sum, the second output of each slice, and the gradients that ``statics.grads`` names."""
    if mesh is None:
        return in_slices(loss, statics, problem, parts, lambda sums: sums)
    axes, v = sharded.row_axes(mesh), problem.table.shape[0]
    along = sharded.POSITIONS if mesh.shape.get(sharded.POSITIONS, 1) > 1 else None
    padded = sharded.fitted(problem, mesh)

    def local(problem: Problem, parts: Any) -> tuple[Array, Any, Gradients]:
        mine, first = sharded.of_shard(problem)
        value, aux, grads = in_slices(loss, statics, mine, parts, lambda s: sharded.merged(s, first, mine), along)
        return jax.lax.psum(value, axes), aux, sharded.summed(grads, problem, mesh)

    rows = PartitionSpec(axes)
    out = PartitionSpec(), rows, sharded.gradient_specs(problem, mesh)
    value, aux, grads = sharded.spread(local, mesh, (sharded.specs(padded, mesh), rows), out)(padded, parts)
    table, bias = (None if x is None else x[:v] for x in grads[1:])
    return value, aux, grads._replace(table=table, bias=bias)


def in_slices(
    loss: SliceLoss,
    statics: Statics,
    problem: Problem,
    parts: Any,
    merge: Callable[[Sums], Sums],
    along: str | None = None,
) -> tuple[Array, Any, Gradients]:
    """Compute one slice after the other.

    Args:
      merge: completes sums over a part of the vocabulary.
      along: the mesh axis that each slice is cut over; each device along it computes the loss of the whole slice. None
        = slices are not cut."""
    need, dtype = needed_sums(statics.want), problem.temperature.dtype
    tokens, columns = split(problem)
    count = jax.tree.leaves(parts)[0].shape[0]
    cut = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), tokens)

    def step(carry: tuple[Array, Any, Any], x: tuple[Any, Any]) -> tuple[Any, Any]:
        (mine, part), (total, table, bias) = x, carry
        z, slope, _ = both_logits(mine, columns, statics)
        stats, done = finish(problem, merge(block_sums(z, None, mine.targets, 0, problem, need)), statics.want)
        value, aux, g = with_cotangents(loss, gathered(stats, along), part)
        g = own_part(g, along)
        dx = block_dx(z, slope, None, mine.targets, 0, coefficients(problem, done, g), problem)
        more = products(dx, mine, columns, statics)
        hidden = None if more.hidden is None else more.hidden.astype(problem.hidden.dtype)
        return (total + value, *jax.tree.map(jnp.add, (table, bias), more[1:])), (aux, hidden)

    def zeros(name: str) -> Array | None:
        return jnp.zeros(getattr(problem, name).shape, dtype) if name in statics.grads else None

    start = jnp.zeros((), dtype), zeros("table"), zeros("bias")
    (value, table, bias), (aux, hidden) = jax.lax.scan(step, start, (cut, parts))
    return value, aux, Gradients(None if hidden is None else hidden.reshape(problem.hidden.shape), table, bias)


def gathered(stats: TokenLogProb, along: str | None) -> TokenLogProb:
    """The statistics of the whole slice, if slices are cut over the mesh axis ``along``."""
    return stats if along is None else jax.lax.all_gather(stats, along, tiled=True)


def own_part(g: TokenLogProb, along: str | None) -> TokenLogProb:
    """The part of each array that belongs to this device."""
    if along is None:
        return g
    return jax.tree.map(lambda x: x.reshape(jax.lax.axis_size(along), -1)[jax.lax.axis_index(along)], g)


def with_cotangents(loss: SliceLoss, stats: TokenLogProb, part: Any) -> tuple[Array, Any, TokenLogProb]:
    """The loss of a slice, its second output, and its derivative in the statistics; top1 has no derivative."""
    top = dict(top1_id=stats.top1_id, top1_logp=stats.top1_logp)

    def of(x: TokenLogProb) -> tuple[Array, Any]:
        return loss(x._replace(**top), part)

    (value, aux), g = jax.value_and_grad(of, has_aux=True)(stats._replace(top1_id=None, top1_logp=None))
    return value, aux, g
