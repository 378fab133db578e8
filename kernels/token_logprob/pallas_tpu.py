"""TPU form (Pallas, Mosaic): tiles of logits stay in VMEM and are never written to HBM.

There are three kernels (`tpu_kernels`), with grids (outer, inner, parts of D). The outer dimension is "parallel", and
the data of an outer block stay in VMEM while the inner blocks pass:

- forward: tokens outer, vocabulary inner; the `Sums` of a block of tokens are kept in their output block;
- dhidden: tokens outer, vocabulary inner; logits again, dx of the tile, ``dhidden += dx @ table``;
- dtable: vocabulary outer, tokens inner; logits again, dx of the tile, ``dtable += dx.T @ hidden`` and its sum, dbias.

2 N D V operations forward, 4 N D V for each gradient. The kernels take the table as [D, V], which is how
`jaxpo.kernels.token_logprob` gets it: its transpose to [V, D] and the transpose here cancel (a tied embedding is copied
once). On a mesh of several devices the kernels must be inside a ``shard_map``, where `sharded` puts them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxpo.kernels.token_logprob import chips, tpu_kernels
from jaxpo.kernels.token_logprob.core import (
    MASKED,
    Gradients,
    Implementation,
    Problem,
    Rows,
    Statics,
    Sums,
    needed_sums,
)
from jaxpo.kernels.token_logprob.tpu_kernels import BEYOND, MAX_VOCAB, Operands, Tiles


def why_not(statics: Statics, problem: Problem) -> str | None:
    """The reason why these kernels cannot compute a problem, or None."""
    pairs = {"hidden and unembed": problem} | ({} if problem.other is None else {"kl_to": problem.other})
    for name, pair in pairs.items():
        dtypes = pair.hidden.dtype.name, pair.table.dtype.name
        if dtypes not in (("bfloat16", "bfloat16"), ("float32", "float32")):
            return f"{name} have to be both bfloat16 or both float32, not {' and '.join(dtypes)}"
    if problem.table.shape[0] >= MAX_VOCAB:
        return f"a vocabulary of {problem.table.shape[0]} is not below 2^24"
    if problem.hidden.shape[0] == 0:
        return "there are no tokens"
    try:
        for kernel in ("forward", "dhidden", "dtable"):
            blocks_of(kernel, statics, problem)
    except ValueError as error:
        return str(error)
    return None


def forward(statics: Statics, problem: Problem) -> Sums:
    """`Sums` of a problem; see `Implementation`."""
    names = tuple(name for name in Sums._fields if name in {"m", "target", "s"} | needed_sums(statics.want))
    tiles = tiles_of("forward", statics, problem, names)
    out = call(
        tpu_kernels.forward,
        tiles,
        statics,
        operands_of(tiles, problem, targets_of(problem)[:, None], "sd" in names),
        outputs={"rows": jax.ShapeDtypeStruct((tiles.n, len(names)), jnp.float32)},
        products=1,
        exponentials=1 + ("s2" in names) + ("sd" in names),
    )
    sums = dict(zip(names, out[0].T, strict=True))
    if "id" in sums:
        sums["id"] = sums["id"].astype(jnp.int32)
    return Sums(**sums)


def backward(statics: Statics, problem: Problem, rows: Rows) -> Gradients:
    """`Gradients` of a problem; see `Implementation`. hidden and bias are float32, table has the table's dtype.

    With ``grad_filter_eps`` > 0 a tile whose largest ``|dx|`` is below it is left out of both products (its logits are
    still computed, and it still counts in dbias). An element of dhidden is then off by at most ``grad_filter_eps *
    sum_v |table[v, d]|``, and one of dtable by at most ``grad_filter_eps * sum_n |hidden[n, d]|``, with sums over the
    tiles that were left out.
    """
    values = {name: x.astype(jnp.float32) for name, x in rows._asdict().items() if x is not None}
    values["target"] = targets_of(problem).astype(jnp.float32)
    packed = jnp.stack(list(values.values()), 1)

    def run(kernel: chips.Kernel, outputs: Any) -> list[Array]:
        tiles = tiles_of(kernel, statics, problem, tuple(values))
        return call(
            getattr(tpu_kernels, kernel),
            tiles,
            statics,
            operands_of(tiles, problem, packed, rows.log_ratio is not None),
            outputs,
            products=2,
            exponentials=1 + (rows.second is not None),
        )

    hidden = table = bias = None
    (n, d), (v, _) = problem.hidden.shape, problem.table.shape
    if "hidden" in statics.grads:
        (hidden,) = run("dhidden", {"hidden": jax.ShapeDtypeStruct((n, d), jnp.float32)})
    if statics.grads & {"table", "bias"}:
        shapes = {"table": ((d, v), problem.table.dtype), "bias": ((1, v), jnp.float32)}
        table, bias = run("dtable", {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()})
    return Gradients(
        hidden, table.T if "table" in statics.grads else None, bias[0] if "bias" in statics.grads else None
    )


# --- problem -> blocks and operands -----------------------------------------------------------------------------------


def blocks_of(kernel: chips.Kernel, statics: Statics, problem: Problem) -> chips.Blocks:
    """The blocks that fit the chip, or those that are given. Raises ``ValueError`` if nothing fits."""
    (n, d), (v, _) = problem.hidden.shape, problem.table.shape
    d_q = 0 if problem.other is None else problem.other.hidden.shape[1]
    given = statics.block_tokens, statics.block_vocab
    return chips.plan(kernel, n, d, v, problem.table.dtype.itemsize, chips.current_chip(), *given, d_q)


def tiles_of(kernel: chips.Kernel, statics: Statics, problem: Problem, rows: tuple[str, ...]) -> Tiles:
    """The static description that a kernel is built for."""
    q_bias = problem.other is not None and problem.other.bias is not None
    return Tiles(
        kernel=kernel,
        n=problem.hidden.shape[0],
        d=problem.hidden.shape[1],
        v=problem.table.shape[0],
        blocks=blocks_of(kernel, statics, problem),
        dtype=problem.table.dtype,
        softcap=statics.softcap,
        rows=rows,
        columns=("ceiling", *["bias"] * (problem.bias is not None), *["bias_q"] * q_bias),
        grad_filter_eps=statics.grad_filter_eps,
    )


def targets_of(problem: Problem) -> Array:
    """[N] int32 targets; those outside the vocabulary become -1, which matches no column."""
    t = problem.targets
    return jnp.where((t >= 0) & (t < problem.table.shape[0]), t, -1).astype(jnp.int32)


def operands_of(tiles: Tiles, problem: Problem, rows: Array, with_q: bool) -> Operands:
    """The inputs of a kernel. rows and columns are small, and are padded to full blocks."""
    tokens, vocab, _ = tiles.blocks
    second = problem.temperature if problem.second_temperature is None else problem.second_temperature
    mask, q = problem.vocab_mask, problem.other
    columns = {
        "ceiling": jnp.full(tiles.v, jnp.inf) if mask is None else jnp.where(mask, jnp.inf, MASKED),
        "bias": problem.bias,
        "bias_q": None if q is None else q.bias,
    }
    padded = [
        jnp.pad(columns[x].astype(jnp.float32), (0, -tiles.v % vocab), constant_values=BEYOND if x == "ceiling" else 0)
        for x in tiles.columns
    ]
    return Operands(
        scalars=1 / jnp.stack([problem.temperature, second])[None].astype(jnp.float32),
        hidden=problem.hidden,
        table=problem.table.T,
        rows=jnp.pad(rows, ((0, -tiles.n % tokens), (0, 0))),
        columns=jnp.stack(padded),
        hidden_q=q.hidden if with_q else None,
        table_q=q.table.T if with_q else None,
    )


def specs_of(tiles: Tiles, x: Operands) -> Operands:
    """The blocks that the inputs are read in."""
    tokens, vocab, depth = tiles.blocks
    return Operands(
        scalars=pl.BlockSpec(memory_space=pltpu.SMEM),
        hidden=tiles.spec((tokens, depth), "tokens", "depth"),
        table=tiles.spec((depth, vocab), "depth", "vocab"),
        rows=tiles.spec((tokens, x.rows.shape[1]), "tokens", ""),
        columns=tiles.spec((x.columns.shape[0], vocab), "", "vocab"),
        hidden_q=None if x.hidden_q is None else tiles.spec((tokens, x.hidden_q.shape[1]), "tokens", ""),
        table_q=None if x.table_q is None else tiles.spec((x.table_q.shape[0], vocab), "", "vocab"),
    )


# --- the call ---------------------------------------------------------------------------------------------------------


def call(
    kernel: Any,
    tiles: Tiles,
    statics: Statics,
    operands: Operands,
    outputs: dict[str, jax.ShapeDtypeStruct],
    products: int,
    exponentials: int,
) -> list[Array]:
    """Run a kernel.

    Args:
      outputs: shapes of the outputs by name: "rows", "hidden", "table", "bias".
      products, exponentials: the number of products like hidden @ table, and of exponentials for each logit. The
        compiler schedules by this estimate of the cost."""
    tokens, vocab, _ = tiles.blocks
    specs = {
        "rows": tiles.spec((tokens, len(tiles.rows)), "tokens", ""),
        "hidden": tiles.spec((tokens, tiles.d), "tokens", ""),
        "table": tiles.spec((tiles.d, vocab), "", "vocab"),
        "bias": tiles.spec((1, vocab), "", "vocab"),
    }
    product, dx = pltpu.VMEM((tokens, vocab), jnp.float32), pltpu.VMEM((tokens, vocab), tiles.dtype)
    scratch = {
        "forward": [product],
        "dhidden": [product, dx, pltpu.SMEM((1,), jnp.int32)],
        "dtable": [product, dx, pltpu.SMEM((1,), jnp.int32), pltpu.VMEM((tiles.d, vocab), jnp.float32)],
    }
    d_q = 0 if operands.hidden_q is None else operands.hidden_q.shape[1]
    return pl.pallas_call(
        functools.partial(kernel, tiles),
        grid=tiles.grid,
        in_specs=[specs_of(tiles, operands)],
        out_specs=[specs[name] for name in outputs],
        out_shape=list(outputs.values()),
        scratch_shapes=scratch[tiles.kernel],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            # All but a sixteenth of VMEM; the default, 16 MiB, is too little for tiles that keep the chip busy.
            vmem_limit_bytes=chips.current_chip().vmem * 15 // 16,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tiles.n * tiles.v * (products * tiles.d + d_q),
            transcendentals=tiles.n * tiles.v * (exponentials + (tiles.softcap is not None)),
            bytes_accessed=bytes_read(tiles) + sum(x.size * x.dtype.itemsize for x in outputs.values()),
        ),
        interpret=statics.interpret,
        name=f"token_logprob_{tiles.kernel}",
    )(operands)


def bytes_read(tiles: Tiles) -> int:
    """Bytes of hidden and table that are read: the operand of the inner blocks once for every outer block. If D is in
    parts, the operand of the outer blocks is also read once for every inner block."""
    outer, inner, _ = tiles.grid
    size = jnp.dtype(tiles.dtype).itemsize * tiles.d
    stays, moves = (tiles.v, tiles.n) if tiles.kernel == "dtable" else (tiles.n, tiles.v)
    return size * (outer * moves + (stays if tiles.parts == 1 else inner * stays))


IMPLEMENTATION = Implementation("pallas_tpu", forward, backward, why_not)
