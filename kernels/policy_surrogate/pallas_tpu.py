"""TPU form (Pallas, Mosaic): each block of rows and tokens writes its gradients and its own partial sums."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxpo.kernels.policy_surrogate.core import Outcome, Settings, Sums, Tokens, named, token

BLOCK = 128, 512  # rows, tokens: 256 KiB an array; a dozen arrays, each held twice, are far below VMEM
TILE = 8, 128  # the smallest block that can be written; its first entries are a block's sums


def one_pass(settings: Settings, tokens: Tokens) -> Outcome:
    """See `core.Outcome`."""
    shape = tokens.logp.shape
    block = tuple(size if size <= most else most for size, most in zip(shape, BLOCK, strict=True))
    grid = tuple(pl.cdiv(size, length) for size, length in zip(shape, block, strict=True))

    def spec(x: Any) -> pl.BlockSpec:
        """The blocks of an array of ``shape``, or of one with axes of size 1."""
        moves = [size > 1 for size in x.shape]
        lengths = tuple(length if m else 1 for length, m in zip(block, moves, strict=True))
        return pl.BlockSpec(lengths, lambda i, j: (i * moves[0], j * moves[1]))

    whole = pl.BlockSpec(block, lambda i, j: (i, j))
    gradients = 1 if settings.kl is None else 2
    partial, *slopes = pl.pallas_call(
        functools.partial(kernel, settings, shape),
        grid=grid,
        in_specs=[jax.tree.map(spec, tokens)],
        out_specs=[pl.BlockSpec(TILE, lambda i, j: (i, j)), *[whole] * gradients],
        out_shape=[
            jax.ShapeDtypeStruct((grid[0] * TILE[0], grid[1] * TILE[1]), jnp.float32),
            *[jax.ShapeDtypeStruct(shape, jnp.float32)] * gradients,
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=50 * shape[0] * shape[1],
            transcendentals=(1 + gradients) * shape[0] * shape[1],
            bytes_accessed=4 * (sum(x.size for x in jax.tree.leaves(tokens)) + gradients * shape[0] * shape[1]),
        ),
        interpret=settings.interpret,
        name="policy_surrogate",
    )(tokens)
    totals = partial.reshape(-1, TILE[0], grid[1], TILE[1])[:, 0].sum((0, 1))
    sums = Sums(**dict.fromkeys(Sums._fields) | {name: totals[i] for i, name in enumerate(named(settings))})
    return Outcome(sums, slopes[0], None if settings.kl is None else slopes[1])


def kernel(settings: Settings, shape: tuple[int, int], refs: Tokens, partial: Any, *slopes: Any) -> None:
    """Compute one block. Entries beyond the end of the arrays add nothing."""
    block = slopes[0].shape
    x = Tokens(*(None if ref is None else ref[...] for ref in refs))
    inside = jnp.ones(block, bool)
    for axis in (0, 1):
        ids = pl.program_id(axis) * block[axis] + jax.lax.broadcasted_iota(jnp.int32, block, axis)
        inside = inside & (ids < shape[axis])
    weights = {
        name: None if getattr(x, name) is None else jnp.where(inside, getattr(x, name), 0)
        for name in ("weight", "count", "kl_weight")
    }
    terms, *gradients = token(settings, x._replace(**weights))
    for ref, gradient in zip(slopes, gradients, strict=False):
        ref[...] = gradient
    place = jax.lax.broadcasted_iota(jnp.int32, TILE, 1)
    sums = [jnp.sum(term) for term in terms if term is not None]
    partial[...] = sum(jnp.where(place == i, value, 0.0) for i, value in enumerate(sums))
