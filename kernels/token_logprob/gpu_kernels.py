"""The kernels of `pallas_gpu`: one program computes one tile of logits in registers, and writes its sums or its dx.

All axes of arrays in Triton are powers of two. The last tiles may be ragged: entries beyond the end of an array are
read as zero and not written, and logits of columns beyond the end of the vocabulary are BEYOND.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxpo.kernels.token_logprob.core import MASKED, Problem, Sums
from jaxpo.kernels.token_logprob.xla import Columns, Tokens, block_dx

BEYOND = 2 * MASKED  # so far below MASKED that its exponential is 0 next to it
LEAST = 16  # fewest rows or columns of a product
DEPTH_BYTES = 128  # bytes of a row of hidden and table that are read at a time
# Blocks of tokens that stay in the L2 cache (16 MiB at D = 4096) while the blocks of the vocabulary pass. Of the
# programs that run at the same time, 16 read the same block of the table, and 8 the same block of hidden.
GROUP = 16


class Tiles(NamedTuple):
    """The logits [n, v] in tiles of [tokens, vocab]."""

    n: int
    v: int
    tokens: int
    vocab: int
    softcap: float | None

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks of tokens, and of the vocabulary."""
        return pl.cdiv(self.n, self.tokens), pl.cdiv(self.v, self.vocab)

    def place(self, program: Any) -> tuple[Any, Any]:
        """The block of tokens and the block of the vocabulary of a program: group by group, tokens innermost."""
        tokens, vocab = self.grid
        program, group = jnp.int32(program), jnp.int32(GROUP * vocab)
        first = jax.lax.div(program, group) * GROUP
        size, inside = jnp.minimum(tokens - first, GROUP), jax.lax.rem(program, group)
        return first + jax.lax.rem(inside, size), jax.lax.div(inside, size)


def depth_of(d: int, dtype: Any) -> int:
    """The number of features, of ``d``, that are read at a time."""
    return min(DEPTH_BYTES // jnp.dtype(dtype).itemsize, max(LEAST, pl.next_power_of_2(d)))


def product(hidden: Any, table: Any, token_inside: Array | None, inside: Array | None) -> Array:
    """hidden @ table.T of a tile, float32, from references [tokens, D] and [vocab, D]. float32 inputs are not rounded.

    Args:
      token_inside, inside: [tokens] and [vocab] bool, the rows inside the arrays; None = all of them."""
    d, dtype = hidden.shape[1], hidden.dtype
    depth = depth_of(d, dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def part(ref: Any, start: Any, rows: Array | None) -> Array:
        at = ref.at[:, pl.ds(start, depth)]
        masks = [] if rows is None else [rows[:, None]]
        if d % depth:
            masks.append((start + jnp.arange(depth, dtype=jnp.int32) < d)[None, :])
        return plgpu.load(at, mask=functools.reduce(operator.and_, masks), other=0.0) if masks else at[...]

    def add(step: Any, total: Array) -> Array:
        a, b = part(hidden, step * depth, token_inside), part(table, step * depth, inside)
        dims = (((1,), (1,)), ((), ()))
        return total + jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)

    start = jnp.zeros((hidden.shape[0], table.shape[0]), jnp.float32)
    return jax.lax.fori_loop(0, pl.cdiv(d, depth), add, start)


class Tile(NamedTuple):
    """Logits of a tile [tokens, vocab].

    z: the logits.
    slope: dz/dx; None = 1.
    z_q: z' of ``kl_to``; None without it.
    first: the first entry of the vocabulary in the tile.
    token_inside: [tokens] bool, the tokens inside the arrays.
    inside: [vocab] bool, the entries inside the arrays.
    """

    z: Array
    slope: Array | None
    z_q: Array | None
    first: Array
    token_inside: Array
    inside: Array


def tile_of(tiles: Tiles, tokens: Tokens, columns: Columns) -> Tile:
    """The logits of this program's tile."""
    block, vocab_block = tiles.place(pl.program_id(0))
    first = vocab_block * tiles.vocab
    token_inside = block * tiles.tokens + jnp.arange(tiles.tokens, dtype=jnp.int32) < tiles.n
    inside = first + jnp.arange(tiles.vocab, dtype=jnp.int32) < tiles.v
    ragged = token_inside if tiles.n % tiles.tokens else None, inside if tiles.v % tiles.vocab else None

    def logits(hidden: Any, table: Any, bias: Any) -> tuple[Array, Array | None]:
        x, slope = product(hidden, table, *ragged), None
        if bias is not None:
            x = x + column(bias, inside).astype(jnp.float32)
        if tiles.softcap is not None:
            tanh = jnp.tanh(x / tiles.softcap)
            x, slope = tiles.softcap * tanh, 1 - tanh * tanh
        if columns.mask is not None:
            x = jnp.where(column(columns.mask, inside), x, MASKED)
        return x if ragged[1] is None else jnp.where(inside[None, :], x, BEYOND), slope

    z, slope = logits(tokens.hidden, columns.table, columns.bias)
    z_q = None if columns.table_q is None else logits(tokens.hidden_q, columns.table_q, columns.bias_q)[0]
    return Tile(z, slope, z_q, first, token_inside, inside)


def column(ref: Any, inside: Array) -> Array:
    """Load values of the vocabulary, [1, vocab]."""
    return plgpu.load(ref, mask=inside, other=ref.dtype.type(0))[None, :]


def store(ref: Any, value: Array, mask: Array) -> None:
    """Write ``value`` where the mask is True."""
    plgpu.store(ref, value.astype(ref.dtype), mask=jnp.broadcast_to(mask, value.shape))


def forward(tiles: Tiles, scalars: Any, tokens: Tokens, columns: Columns, out: Sums) -> None:
    """Write the `Sums` of the tile to ``out``, [tokens] each. ``scalars``: 1 / T, 1 / T2."""
    tile = tile_of(tiles, tokens, columns)
    z, z_q, t = tile.z, tile.z_q, scalars[0]
    m = jnp.max(z, 1)
    below = (z - m[:, None]) * t
    e = jnp.exp(below)
    targets = plgpu.load(tokens.targets, mask=tile.token_inside, other=-1) - tile.first
    hit = targets[:, None] == jnp.arange(tiles.vocab, dtype=jnp.int32)
    sums = Sums(m, jnp.max(jnp.where(hit, z, -jnp.inf), 1), jnp.sum(e, 1))
    if out.sz is not None:
        sums = sums._replace(sz=jnp.sum(e * below, 1))
    if out.sp2 is not None:
        sums = sums._replace(sp2=jnp.sum(e * e, 1))
    if out.s2 is not None:
        sums = sums._replace(s2=jnp.sum(jnp.exp((z - m[:, None]) * scalars[1]), 1))
    if out.id is not None:
        sums = sums._replace(id=tile.first + jax.lax.argmax(z, 1, jnp.int32))
    if out.sd is not None:
        m_q = jnp.max(z_q, 1)
        s_q = jnp.sum(jnp.exp((z_q - m_q[:, None]) * t), 1)
        sums = sums._replace(m_q=m_q, s_q=s_q, sd=jnp.sum(e * ((z - z_q) * t), 1))
    jax.tree.map(lambda ref, value: store(ref, value, tile.token_inside), out, sums)


def dx(tiles: Tiles, scalars: Any, tokens: Tokens, columns: Columns, out: Any, dbias: Any = None) -> None:
    """Write dx of the tile (see `Rows`) to ``out`` [tokens, vocab], and its sum to ``dbias`` [vocab], if given."""
    tile = tile_of(tiles, tokens, columns)
    t = scalars[0]
    # Logits divided by the temperature are the logits of a problem with temperature 1.
    unit = Problem(None, None, None, None, None, 1.0, t / scalars[1], None)
    rows = jax.tree.map(lambda ref: plgpu.load(ref, mask=tile.token_inside, other=0.0), tokens.rows)
    targets = plgpu.load(tokens.targets, mask=tile.token_inside, other=-1)
    z_q = None if tile.z_q is None else tile.z_q * t
    value = block_dx(tile.z * t, tile.slope, z_q, targets, tile.first, rows, unit)
    store(out, value, tile.token_inside[:, None] & tile.inside[None, :])
    if dbias is not None:
        store(dbias, jnp.sum(jnp.where(tile.token_inside[:, None], value, 0), 0), tile.inside)
