"""The kernels of `pallas_tpu`: computations on one tile of logits while it is in VMEM.

The last blocks of tokens and of the vocabulary may be ragged. Entries beyond the end of an array are undefined, and may
be NaN. Columns there have a ceiling of BEYOND, and rows there are not written to the output. Where a product sums over
such rows or columns, the end of its operand is set to zero.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from jaxpo.kernels.token_logprob import chips
from jaxpo.kernels.token_logprob.core import MASKED

# z beyond the end of the vocabulary, and the maximum over no entries: far below MASKED, so that it adds nothing.
BEYOND = 2 * MASKED
MAX_VOCAB = 2**24  # ids are stored with the sums, as float32


class Tiles(NamedTuple):
    """The static description that a kernel is built for: sizes, blocks and options.

    kernel: "forward", "dhidden" or "dtable".
    n, d, v: tokens, features, entries of the vocabulary.
    blocks: sizes of the blocks.
    dtype: dtype of hidden and table.
    softcap: bound of the logits, or None.
    rows: names of the values per token, in order: `Sums` in the forward pass, `Rows` and target in the others.
    columns: names of the values per entry of the vocabulary, in order.
    grad_filter_eps: tiles whose largest |dx| is below this are skipped; 0 = none.
    """

    kernel: chips.Kernel
    n: int
    d: int
    v: int
    blocks: chips.Blocks
    dtype: Any
    softcap: float | None
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    grad_filter_eps: float = 0.0

    @property
    def parts(self) -> int:
        """The number of parts that D is cut into."""
        return self.d // self.blocks.depth

    @property
    def steps(self) -> int:
        """Steps of the innermost dimension: over the parts of D for the logits, and over them again for a gradient. If
        D is in one part, one step does both."""
        return self.parts if self.kernel == "forward" or self.parts == 1 else 2 * self.parts

    @property
    def grid(self) -> tuple[int, int, int]:
        """(outer, inner, steps)."""
        tokens, vocab = pl.cdiv(self.n, self.blocks.tokens), pl.cdiv(self.v, self.blocks.vocab)
        return (vocab, tokens, self.steps) if self.kernel == "dtable" else (tokens, vocab, self.steps)

    def part(self, step: Any) -> Any:
        """The part of D of a step: forth and back, so that the part at the turn is not fetched again."""
        return jnp.minimum(step, 2 * self.parts - 1 - step)

    def of_part(self, step: Any) -> Any:
        """The indices of D in that part; a constant if there is only one part, as the compiler must see its start."""
        depth = self.blocks.depth
        return slice(None) if self.parts == 1 else pl.ds(pl.multiple_of(self.part(step) * depth, depth), depth)

    def spec(self, shape: tuple[int, int], *of: str) -> pl.BlockSpec:
        """Blocks of ``shape``. ``of`` says what each axis moves with: "tokens", "vocab", "depth" or "" (nothing)."""

        def index(outer: Any, inner: Any, step: Any) -> tuple[Any, ...]:
            tokens, vocab = (inner, outer) if self.kernel == "dtable" else (outer, inner)
            at = {"tokens": tokens, "vocab": vocab, "depth": self.part(step), "": 0}
            return tuple(at[axis] for axis in of)

        return pl.BlockSpec(shape, index)


class Operands(NamedTuple):
    """The inputs of every kernel.

    scalars: [1, 2] 1 / T, 1 / T2.
    hidden: [N, D].
    table: [D, V].
    rows: [N, values per token], padded to full blocks.
    columns: [values per entry, V], padded to full blocks.
    hidden_q, table_q: the pair of ``kl_to``, if the kernel needs its logits; None otherwise.
    """

    scalars: Any
    hidden: Any
    table: Any  # [D, V]
    rows: Any
    columns: Any
    hidden_q: Any
    table_q: Any  # [D', V]


# --- parts of the kernels ---------------------------------------------------------------------------------------------


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Sum over axis ``contract[0]`` of a and ``contract[1]`` of b, in float32; float32 inputs are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def add_product(product: Any, step: Any, x: Operands) -> None:
    """Compute a part of hidden @ table; the first step sets the product, later steps add to it."""
    value = dot(x.hidden[...], x.table[...], (1, 0))

    @pl.when(step == 0)
    def _() -> None:
        product[...] = value

    @pl.when(step > 0)
    def _() -> None:
        product[...] += value


def clear_end(ref: Any, axis: int, size: int, block: Any) -> None:
    """Set an operand to zero beyond the end of an axis with ``size`` elements; ``block`` is its block on that axis."""
    length = ref.shape[axis]
    if size % length:

        @pl.when(block == size // length)
        def _() -> None:
            index = jax.lax.broadcasted_iota(jnp.int32, ref.shape, axis)
            ref[...] = jnp.where(index < size % length, ref[...], jnp.zeros_like(ref))


def logits(tiles: Tiles, product: Array, x: Operands, bias: str = "bias") -> tuple[Array, Array | None]:
    """(z, dz/dx) of a tile from hidden @ table; None = 1 for the latter. ``bias`` names its column, if there is one."""
    if bias in tiles.columns:
        i = tiles.columns.index(bias)
        product = product + x.columns[i : i + 1, :]
    ceiling = x.columns[0:1, :]
    if tiles.softcap is None:
        return jnp.where(ceiling > 0, product, ceiling), None
    t = jnp.tanh(product / tiles.softcap)
    return jnp.where(ceiling > 0, tiles.softcap * t, ceiling), jnp.where(ceiling > 0, 1 - t * t, 0)


def logits_q(tiles: Tiles, x: Operands) -> Array | None:
    """z' of the pair ``kl_to``, whose features D' are not cut into parts; None without a pair."""
    return None if x.hidden_q is None else logits(tiles, dot(x.hidden_q[...], x.table_q[...], (1, 0)), x, "bias_q")[0]


def ids_of(tiles: Tiles, block: Any) -> Array:
    """The entries of the vocabulary in a block, [tokens, vocab]."""
    shape = tiles.blocks.tokens, tiles.blocks.vocab
    return block * tiles.blocks.vocab + jax.lax.broadcasted_iota(jnp.int32, shape, 1)


# --- forward ----------------------------------------------------------------------------------------------------------


def forward(tiles: Tiles, x: Operands, out: Any, product: Any) -> None:
    """Collect the sums in ``out`` [tokens, sums] while the vocabulary passes. ``x.rows``: targets [tokens, 1] int32."""
    block, step = pl.program_id(1), pl.program_id(2)
    add_product(product, step, x)

    @pl.when((block == 0) & (step == 0))
    def _() -> None:
        start = {"m": BEYOND, "m_q": BEYOND, "target": -jnp.inf}
        for i, name in enumerate(tiles.rows):
            out[:, i : i + 1] = jnp.full((tiles.blocks.tokens, 1), start.get(name, 0.0), jnp.float32)

    @pl.when(step == tiles.steps - 1)
    def _() -> None:
        z, z_q = logits(tiles, product[...], x)[0], logits_q(tiles, x)
        old = {name: out[:, i : i + 1] for i, name in enumerate(tiles.rows)}
        new = merge(old, z, z_q, ids_of(tiles, block), x)
        for i, name in enumerate(tiles.rows):
            out[:, i : i + 1] = new[name]


def total(x: Array) -> Array:
    """Sum over the vocabulary."""
    return jnp.sum(x, 1, keepdims=True)


def merge(old: dict[str, Array], z: Array, z_q: Array | None, ids: Array, x: Operands) -> dict[str, Array]:
    """Add a tile of logits to the `Sums`, [tokens, 1] each."""
    t, t2 = x.scalars[0, 0], x.scalars[0, 1]
    top = jnp.max(z, 1, keepdims=True)
    m = jnp.maximum(old["m"], top)
    hit = jnp.max(jnp.where(ids == x.rows[...], z, -jnp.inf), 1, keepdims=True)
    new = {"m": m, "target": jnp.maximum(old["target"], hit)}
    below, shift = (z - m) * t, (old["m"] - m) * t
    e, scale = jnp.exp(below), jnp.exp(shift)
    new["s"] = scale * old["s"] + total(e)
    if "sz" in old:  # the old sum is re-centered; where there is none yet, s is 0
        new["sz"] = scale * (old["sz"] + shift * old["s"]) + total(e * below)
    if "sp2" in old:
        new["sp2"] = scale * scale * old["sp2"] + total(e * e)
    if "s2" in old:
        new["s2"] = jnp.exp((old["m"] - m) * t2) * old["s2"] + total(jnp.exp((z - m) * t2))
    if "id" in old:  # of equal entries the first: the smallest id in the tile; a later tile counts only if it is larger
        first = jnp.min(jnp.where(z == top, ids, MAX_VOCAB), 1, keepdims=True)
        new["id"] = jnp.where(top > old["m"], first.astype(jnp.float32), old["id"])
    if "sd" in old:
        m_q = jnp.maximum(old["m_q"], jnp.max(z_q, 1, keepdims=True))
        new["m_q"] = m_q
        new["s_q"] = jnp.exp((old["m_q"] - m_q) * t) * old["s_q"] + total(jnp.exp((z_q - m_q) * t))
        new["sd"] = scale * old["sd"] + total(e * ((z - z_q) * t))
    return new


# --- backward ---------------------------------------------------------------------------------------------------------


def gradient(tiles: Tiles, product: Array, x: Operands, block: Any) -> Array:
    """dx of a tile, by `Rows`; the coefficients of tokens beyond the end are zero."""
    z, slope = logits(tiles, product, x)
    t, row = x.scalars[0, 0], {name: x.rows[:, i : i + 1] for i, name in enumerate(tiles.rows)}
    log_p = z * t - row["lse"]
    p = jnp.exp(log_p)
    factor = row["one"]
    if "log_p" in row:
        factor = factor + row["log_p"] * log_p
    if "p" in row:
        factor = factor + row["p"] * p
    if "log_ratio" in row:
        factor = factor + row["log_ratio"] * (log_p - (logits_q(tiles, x) * t - row["lse_q"]))
    hit = ids_of(tiles, block) == row["target"].astype(jnp.int32)
    dz = jnp.where(hit, row["hit"], 0) + p * factor
    if "second" in row:
        dz = dz - row["second"] * jnp.exp(z * x.scalars[0, 1] - row["lse_second"])
    return dz if slope is None else dz * slope


def store(tiles: Tiles, value: Array, dx: Any, used: Any) -> None:
    """Store dx, and in ``used[0]`` whether the tile is used for the gradients; a tile with a NaN is used."""
    dx[...] = value.astype(tiles.dtype)
    if tiles.grad_filter_eps:
        used[0] = jnp.logical_not(jnp.max(jnp.abs(value)) < tiles.grad_filter_eps).astype(jnp.int32)


def is_used(tiles: Tiles, used: Any) -> Any:
    """Whether the tile is used for the gradients, as `store` found."""
    return used[0] > 0 if tiles.grad_filter_eps else True


def dhidden(tiles: Tiles, x: Operands, out: Any, product: Any, dx: Any, used: Any) -> None:
    """Add up dhidden in ``out`` [tokens, D] float32 while the vocabulary passes."""
    block, step = pl.program_id(1), pl.program_id(2)
    clear_end(x.table, 1, tiles.v, block)

    @pl.when((block == 0) & (step == 0))
    def _() -> None:
        out[...] = jnp.zeros_like(out)

    @pl.when(step < tiles.parts)
    def _() -> None:
        add_product(product, step, x)

    @pl.when(step == tiles.parts - 1)
    def _() -> None:
        store(tiles, gradient(tiles, product[...], x, block), dx, used)

    @pl.when((step >= tiles.steps - tiles.parts) & is_used(tiles, used))
    def _() -> None:
        out[:, tiles.of_part(step)] += dot(dx[...], x.table[...], (1, 1))


def dtable(tiles: Tiles, x: Operands, out: Any, dbias: Any, product: Any, dx: Any, used: Any, sums: Any) -> None:
    """Add up dtable in ``sums`` [D, vocab] and ``dbias`` [1, vocab], float32, while the tokens pass; then ``out`` gets
    the sums."""
    vocab, block, step = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    clear_end(x.hidden, 0, tiles.n, block)
    if x.hidden_q is not None:
        clear_end(x.hidden_q, 0, tiles.n, block)

    @pl.when((block == 0) & (step == 0))
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)
        dbias[...] = jnp.zeros_like(dbias)

    @pl.when(step < tiles.parts)
    def _() -> None:
        add_product(product, step, x)

    @pl.when(step == tiles.parts - 1)
    def _() -> None:
        value = gradient(tiles, product[...], x, vocab)
        store(tiles, value, dx, used)
        dbias[...] += jnp.sum(value, 0, keepdims=True)

    @pl.when((step >= tiles.steps - tiles.parts) & is_used(tiles, used))
    def _() -> None:
        sums[tiles.of_part(step), :] += dot(x.hidden[...], dx[...], (0, 0))

    @pl.when((block == tiles.grid[1] - 1) & (step == tiles.steps - 1))
    def _() -> None:
        out[...] = sums[...].astype(out.dtype)
