"""GPU form (Pallas, Triton): tiles of logits stay in registers.

- forward: one program for each tile of the logits writes the `Sums` of its tile. They are a few floats [blocks of the
  vocabulary, N] (40 MB each at N = 16384, V = 151936), which are merged afterwards. 2 N D V operations.
- backward: for each chunk of the vocabulary, a kernel computes the logits of all tokens again and writes dx [N, chunk]
  in the dtype of the table; cuBLAS computes the two products with it. 6 N D V operations; kernels that write no dx, as
  on TPUs, take 8. Since a chunk has all tokens, a block of dtable is finished when it is written; dhidden is added up.

Nothing here has been timed. The numbers are estimates for an H100 (700 TFLOP/s in cuBLAS's bfloat16 products, 3 TB/s)
at N = 16384, D = 4096, V = 151936, where N D V is 10.2e12:

- A tile of 128 x 256 fills the registers of a multiprocessor (128 sums in each of 256 threads). It does 85 operations
  for each byte from the L2 cache; a tile of 128 x 128 does 64. Three parts of 64 features on their way take 144 of 228
  KiB of shared memory. Compiled for sm_90 by Triton 3.6 (XLA has its own), a step over D is four 64 x 256 x 16 tensor
  core instructions without a spill; the rest of a program is about 20 instructions an element, 8% more.
- Forward: such loops are known for 550 to 620 TFLOP/s; with those 8% this gives 36 to 40 ms. `xla` needs 29 ms for the
  product, and 10 ms to write float32 logits and to read them twice. Neither is expected to be much faster; this form
  holds 0.2 GB, `xla` holds 1.2 GB. "auto" takes `xla` until both have been timed.
- Backward: 36 to 40 ms for the logits, 58 ms for the two products, 5 ms to write dx once and read it twice, 1 ms to add
  up dhidden. 1 GiB of dx is 30464 entries of the vocabulary at a time, five chunks; about 3.5 GB are alive besides the
  arguments, dtable (1.2 GB) included.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxpo.kernels.token_logprob import gpu_kernels, xla
from jaxpo.kernels.token_logprob.core import (
    Gradients,
    Implementation,
    Problem,
    Rows,
    Statics,
    Sums,
    TokenLogProb,
    needed_sums,
)
from jaxpo.kernels.token_logprob.gpu_kernels import LEAST, Tiles
from jaxpo.kernels.token_logprob.xla import Columns, Tokens

DX_BYTES = 2**30  # bytes of dx that are held at a time
# Tokens and entries of the vocabulary in a tile, by dtype. float32 products do not use the tensor cores.
BLOCKS = {"bfloat16": (128, 256), "float32": (64, 64)}
MOST_LOGITS = 128 * 256  # logits that a program can hold: more do not fit the registers
STAGES = 3  # parts of hidden and table on their way to shared memory


def why_not(statics: Statics, problem: Problem) -> str | None:
    """The reason why these kernels cannot compute a problem, or None."""
    pairs = {"hidden and unembed": problem} | ({} if problem.other is None else {"kl_to": problem.other})
    for name, pair in pairs.items():
        dtypes = pair.hidden.dtype.name, pair.table.dtype.name
        if dtypes not in (("bfloat16", "bfloat16"), ("float32", "float32")):
            return f"{name} have to be both bfloat16 or both float32, not {' and '.join(dtypes)}"
    if problem.hidden.shape[0] == 0:
        return "there are no tokens"
    if statics.grad_filter_eps:
        return "grad_filter_eps has no effect on products that are cuBLAS's; leave it 0, or take impl='pallas_tpu'"
    for name in ("block_tokens", "block_vocab"):
        given = getattr(statics, name)
        if given is not None and given != power_of_two(given):
            return f"{name}={given} is no power of two of at least {LEAST}; nearest: {power_of_two(given)}"
    held = logits_held(statics, problem)
    if held > MOST_LOGITS:
        return f"with these block_sizes a program holds {held} logits, and the registers at most {MOST_LOGITS}"
    return None


def forward(statics: Statics, problem: Problem) -> Sums:
    """`Sums` of a problem; see `Implementation`."""
    tokens, columns = xla.split(problem)
    tiles = tiles_of(statics, problem, columns)
    names = {"m", "target", "s"} | needed_sums(statics.want)
    dtypes = {name: jnp.int32 if name == "id" else jnp.float32 for name in Sums._fields if name in names}
    shape = tiles.grid[1], tiles.n
    out = {name: jax.ShapeDtypeStruct(shape, dtypes[name]) if name in names else None for name in Sums._fields}
    spec = pl.BlockSpec((None, tiles.tokens), lambda i: tiles.place(i)[::-1])
    (parts,) = call(gpu_kernels.forward, tiles, statics, problem, tokens, columns, [(Sums(**out), spec)])
    return merged(parts, problem)


def merged(parts: Sums, problem: Problem) -> Sums:
    """Merge the `Sums` [blocks, N] of the blocks of the vocabulary to [N], by pairs of neighbors: of equal entries the
    first stays the first."""
    while (blocks := parts.m.shape[0]) > 1:
        even = blocks // 2 * 2
        pairs = (jax.tree.map(lambda x, i=i, n=even: x[i:n:2], parts) for i in (0, 1))
        halves = xla.merge(*pairs, problem)
        parts = jax.tree.map(lambda half, x, n=even: jnp.concatenate([half, x[n:]]), halves, parts)
    return jax.tree.map(lambda x: x[0], parts)


def backward(statics: Statics, problem: Problem, rows: Rows) -> Gradients:
    """`Gradients` of a problem; see `Implementation`. hidden and bias are float32, table has the table's dtype."""
    tokens, columns = xla.split(problem, rows)
    n, dtype = problem.hidden.shape[0], problem.table.dtype

    def chunk(grads: Gradients, block: Columns, first: Any) -> Gradients:
        tiles = tiles_of(statics, problem, block)

        def output(length: int, dtype: Any, block_rows: int | None) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
            shape = jax.ShapeDtypeStruct((length, tiles.v), dtype)
            return shape, pl.BlockSpec((block_rows, tiles.vocab), tiles.place)

        outputs = [output(n, dtype, tiles.tokens)]
        if "bias" in statics.grads:  # one sum for each block of tokens
            outputs.append(output(tiles.grid[0], jnp.float32, None))
        part = tokens._replace(targets=tokens.targets - first)
        dx, *dbias = call(gpu_kernels.dx, tiles, statics, problem, part, block, outputs)
        hidden, table, bias = grads
        if hidden is not None:
            hidden = hidden + dot(dx, block.table, 1, 0, jnp.float32)
        if table is not None:
            table = xla.put(table, dot(dx, tokens.hidden, 0, 0, dtype), first)
        if bias is not None:
            bias = xla.put(bias, dbias[0].sum(0), first)
        return Gradients(hidden, table, bias)

    start = xla.zeros_of(statics, problem, jnp.float32, dtype)
    return xla.over_blocks(chunk, start, columns, chunk_of(statics, problem))


def one_pass(statics: Statics, problem: Problem, g_logp: Array) -> tuple[TokenLogProb, Gradients]:
    """See `Implementation`. This is `xla.one_pass`, which holds the logits of a block of tokens over the whole
    vocabulary: dx of a token needs the token's sums first, so its logits must be kept, or computed twice."""
    return xla.one_pass(dataclasses.replace(statics, block_tokens=None, block_vocab=None), problem, g_logp)


def dot(a: Array, b: Array, axis_a: int, axis_b: int, dtype: Any) -> Array:
    """Sum over an axis of each, added up in float32; float32 inputs are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=dtype)


# --- problem -> blocks ------------------------------------------------------------------------------------------------


def power_of_two(size: int) -> int:
    """The next power of two from ``size`` up, at least `LEAST`."""
    return max(LEAST, pl.next_power_of_2(size))


def blocks_of(statics: Statics, problem: Problem) -> tuple[int, int]:
    """Tokens and entries of the vocabulary in a tile: as given, or chosen by the dtype and not larger than needed. With
    the pair of ``kl_to`` the registers have to hold two tiles."""
    (n, _), (v, _) = problem.hidden.shape, problem.table.shape
    tokens, vocab = BLOCKS[problem.table.dtype.name]
    vocab = vocab if problem.other is None else vocab // 2
    return statics.block_tokens or min(tokens, power_of_two(n)), statics.block_vocab or min(vocab, power_of_two(v))


def logits_held(statics: Statics, problem: Problem) -> int:
    """The number of logits that a program holds, with those of the pair of ``kl_to``."""
    return math.prod(blocks_of(statics, problem)) * (1 if problem.other is None else 2)


def tiles_of(statics: Statics, problem: Problem, columns: Columns) -> Tiles:
    """The tiles of the logits of all tokens and a part of the vocabulary."""
    return Tiles(problem.hidden.shape[0], columns.table.shape[0], *blocks_of(statics, problem), statics.softcap)


def chunk_of(statics: Statics, problem: Problem) -> int:
    """Entries of the vocabulary whose dx is held at a time: whole tiles, in chunks of about the same size."""
    (n, _), (v, _) = problem.hidden.shape, problem.table.shape
    vocab = blocks_of(statics, problem)[1]
    most = max(1, DX_BYTES // (n * problem.table.dtype.itemsize * vocab))
    blocks = pl.cdiv(v, vocab)
    return pl.cdiv(blocks, pl.cdiv(blocks, most)) * vocab


# --- the call ---------------------------------------------------------------------------------------------------------


def call(
    kernel: Any,
    tiles: Tiles,
    statics: Statics,
    problem: Problem,
    tokens: Tokens,
    columns: Columns,
    outputs: list[tuple[Any, pl.BlockSpec]],
) -> list[Any]:
    """Run a kernel, one program for each tile.

    Args:
      outputs: the shapes of each output, and the block that a program writes."""

    def spec(axis: int, x: Any) -> pl.BlockSpec:
        return pl.BlockSpec(
            (tiles.tokens if axis == 0 else tiles.vocab, *x.shape[1:]),
            lambda i: (tiles.place(i)[axis], *[0] * (x.ndim - 1)),
        )

    second = problem.temperature if problem.second_temperature is None else problem.second_temperature
    tokens = tokens._replace(targets=tokens.targets.astype(jnp.int32))
    scalars = 1 / jnp.stack([problem.temperature, second]).astype(jnp.float32)
    blocks, vocab_blocks = tiles.grid
    warps = 8 if logits_held(statics, problem) > MOST_LOGITS // 2 else 4
    return pl.pallas_call(
        partial(kernel, tiles),
        grid=(blocks * vocab_blocks,),
        in_specs=[pl.BlockSpec(), *(jax.tree.map(partial(spec, i), x) for i, x in enumerate((tokens, columns)))],
        out_specs=[jax.tree.map(lambda _, spec=spec: spec, shapes) for shapes, spec in outputs],
        out_shape=[shapes for shapes, _ in outputs],
        # These parameters make it a Triton kernel: the default on GPUs is Mosaic, which takes other programs.
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=STAGES),
        interpret=statics.interpret,
        name=f"token_logprob_{kernel.__name__}",
    )(scalars, tokens, columns)


IMPLEMENTATION = Implementation("pallas_gpu", forward, backward, why_not, one_pass)
