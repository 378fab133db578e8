"""GPU form (Pallas, Triton): one program for each block of rows and tokens writes its gradients and partial sums.

Each array is read once. An XLA fusion does about the same (its reductions and its gradients may be two kernels, which
read twice what the caches do not hold). This form has been lowered and compiled for GPUs, but not yet run on one.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxpo.kernels.policy_surrogate.core import Outcome, Settings, Sums, Tokens, named, token

BLOCK = 1024  # tokens of a program, 8 in each of 128 threads; Triton wants powers of two


def one_pass(settings: Settings, tokens: Tokens) -> Outcome:
    """See `core.Outcome`."""
    shape = rows, length = tokens.logp.shape
    width = min(BLOCK, pl.next_power_of_2(length))
    block = min(BLOCK // width, pl.next_power_of_2(rows)), width
    grid = tuple(pl.cdiv(size, step) for size, step in zip(shape, block, strict=True))

    def spec(x: Any) -> pl.BlockSpec:
        """The blocks of an array of ``shape``, or of one with axes of size 1."""
        moves = [size > 1 for size in x.shape]
        lengths = tuple(step if m else 1 for step, m in zip(block, moves, strict=True))
        return pl.BlockSpec(lengths, lambda i, j: (i * moves[0], j * moves[1]))

    partial_sums, gradient = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (grid, shape))
    sums = Sums(**dict.fromkeys(Sums._fields) | dict.fromkeys(named(settings), partial_sums))
    out = Outcome(sums, gradient, gradient if settings.kl else None)
    one, whole = (pl.BlockSpec(lengths, lambda i, j: (i, j)) for lengths in ((1, 1), block))
    (done,) = pl.pallas_call(
        partial(kernel, settings, shape),
        grid=grid,
        in_specs=[jax.tree.map(spec, tokens)],
        out_specs=[jax.tree.map(lambda x: one if x is partial_sums else whole, out)],
        out_shape=[out],
        # These parameters make it a Triton kernel: the default on GPUs is Mosaic, which takes other programs.
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=settings.interpret,
        name="policy_surrogate",
    )(tokens)
    return done._replace(sums=jax.tree.map(jnp.sum, done.sums))


def kernel(settings: Settings, shape: tuple[int, int], refs: Tokens, out: Outcome) -> None:
    """Compute one block. Entries beyond the end of the arrays are read as zero, and add nothing."""
    inside = []
    for axis, length in enumerate(out.dpolicy.shape):
        ids = pl.program_id(axis) * length + jnp.arange(length, dtype=jnp.int32)
        inside.append(jnp.expand_dims(ids < shape[axis], 1 - axis))

    def mask(ref: Any) -> Any:
        """The mask of entries inside the array. An axis of size 1 needs none: it is broadcast, or has one block for
        each element."""
        masks = [jnp.broadcast_to(m, ref.shape) for m, size in zip(inside, ref.shape, strict=True) if size > 1]
        return masks[0] & masks[-1] if masks else None

    def read(ref: Any) -> Any:
        where = mask(ref)
        return ref[...] if where is None else plgpu.load(ref, mask=where, other=0.0)

    terms, *gradients = token(settings, jax.tree.map(read, refs))
    for ref, gradient in zip(out[1:], gradients, strict=True):
        if ref is not None:
            plgpu.store(ref, gradient, mask=mask(ref))
    for ref, term in zip(out.sums, terms, strict=True):
        if ref is not None:
            ref[0, 0] = jnp.sum(term)
