"""Sizes of the blocks of logits that fit a TPU chip."""

import itertools
import math
from typing import Literal, NamedTuple

import jax

from jaxpo.kernels.chips import CHIPS, MIB, Chip

LANES = 128
INNER_BLOCK = 512
SUBLANES = 16  # rows of a bfloat16 tile; float32 needs half
Kernel = Literal["forward", "dhidden", "dtable"]


class Blocks(NamedTuple):
    """Sizes of a tile of logits.

    tokens, vocab: the tile.
    depth: the part of D that is multiplied at a time.
    """

    tokens: int
    vocab: int
    depth: int


def current_chip() -> Chip:
    """The chip that is being traced for. Inside ``shard_map`` or ``jax.set_mesh`` it is the chip of the mesh (whose
    devices need not be attached), elsewhere that of the default backend. If that is not a TPU (interpreted kernels), it
    is the chip with the least VMEM, whose blocks fit every other chip.

    Raises:
      ValueError: a TPU that is not in `CHIPS`.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    for chip in CHIPS.values():
        if kind in chip.kinds:
            return chip
    if kind.startswith("TPU"):
        raise ValueError(f"token_logprob: no block sizes for chip {kind!r}; known: {', '.join(CHIPS)}; take impl='xla'")
    return min(CHIPS.values(), key=lambda chip: chip.vmem)


def vmem_bytes(kernel: Kernel, blocks: Blocks, d: int, itemsize: int, d_q: int = 0) -> int:
    """An estimate of the VMEM that a kernel needs. Blocks that the grid moves are held twice: the kernel computes with
    one while the other is being copied.

    Args:
      itemsize: bytes of an element of hidden and table.
      d_q: hidden size of the pair of ``kl_to``, which is not cut into parts; 0 = no pair."""
    tokens, vocab, depth = blocks
    moving = 2 * itemsize * (depth + d_q) * (tokens + vocab)
    logits = (4 if d_q == 0 else 6) * 4 * tokens * vocab  # the float32 product, and values computed from it
    gradient = {"forward": 0, "dhidden": 2 * 4 * tokens * d, "dtable": (4 + 2 * itemsize) * vocab * d}[kernel]
    rows = 3 * 2 * 4 * LANES * tokens  # a column [tokens, 1] takes whole vectors of 128 lanes
    return moving + logits + gradient + rows


def plan(
    kernel: Kernel,
    n: int,
    d: int,
    v: int,
    itemsize: int,
    chip: Chip,
    tokens: int | None = None,
    vocab: int | None = None,
    d_q: int = 0,
) -> Blocks:
    """The largest blocks whose estimate is at most three quarters of the chip's VMEM.

    The operand of the inner blocks (the table; for dtable, hidden) is read once for every outer block. So an outer
    block must be at least `Chip.flops_per_byte` long, or the products wait for memory; the aim is `outer_block`. A
    longer inner block would only save steps of the grid, and slows down the compiler. If blocks of that size do not
    fit, D is cut into parts: multiples of 128 that divide it.

    Args:
      tokens, vocab: sizes that the caller gives; None = chosen here.

    Raises:
      ValueError: a given size is not a multiple of the tile's, or no blocks fit.
    """
    for name, given, multiple, whole in (("tokens", tokens, SUBLANES, n), ("vocab", vocab, LANES, v)):
        if given is not None and given < whole and given % multiple:
            nearest = max(multiple, round(given / multiple) * multiple)
            raise ValueError(f"token_logprob: block_{name}={given} is no multiple of {multiple}; nearest: {nearest}")
    outer = outer_block(chip)
    outers, inners = ([size >> i for i in range(4) if size >> i >= LANES] for size in (outer, INNER_BLOCK))
    depths = [depth for depth in (d, *range(d // 2 // LANES * LANES, 0, -LANES)) if d % depth == 0]
    for long, short, depth in itertools.product(outers, inners, depths):
        chosen = (short, long) if kernel == "dtable" else (long, short)
        blocks = Blocks(_even(n, tokens or chosen[0], SUBLANES), min(v, vocab or chosen[1]), depth)
        if vmem_bytes(kernel, blocks, d, itemsize, d_q) <= chip.vmem * 3 // 4:
            return blocks
    raise ValueError(
        f"token_logprob: no blocks of hidden size {d} fit the {chip.vmem // MIB} MiB of VMEM of {chip.name}"
        f"{'' if tokens is vocab is None else ' with the block sizes given'}; take impl='xla'"
    )


def outer_block(chip: Chip) -> int:
    """A power of two, at least 1.7 times `Chip.flops_per_byte`: 512 on v5e and v5p, 1024 on v6e."""
    return 2 ** math.ceil(math.log2(1.7 * chip.flops_per_byte))


def _even(n: int, block: int, multiple: int) -> int:
    """A block of at most this size that cuts ``n`` into the same number of pieces, of nearly equal size."""
    if n <= block:
        return max(n, 1)
    return -(-n // -(-n // block) // multiple) * multiple
