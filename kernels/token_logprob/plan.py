"""Block sizes of the portable form, from a budget of bytes and the platform."""

from typing import Any, NamedTuple

import jax.numpy as jnp

# One block of logits. On a CPU it should stay in the caches; an accelerator wants few, large products.
BLOCK_BYTES = {"cpu": 8 * 2**20, "gpu": 2**31, "tpu": 2**31}
TOKENS_AT_ONCE = 2048, 8192  # on an accelerator, when there are so many


class Blocks(NamedTuple):
    """Tokens and entries of the vocabulary whose logits are held at a time."""

    tokens: int
    vocab: int


def plan(platform: str, n: int, v: int, dtype: Any) -> Blocks:
    """Blocks for ``n`` tokens and a vocabulary of ``v``; ``dtype`` is that of the logits.

    On a CPU all tokens and a few columns: the table is read once, and each block of its gradient is finished when it
    is written. On an accelerator the whole vocabulary for 2048 to 8192 tokens: a loop over the vocabulary reads and
    writes the statistics and dhidden once a block, which is what makes it slow there. Only where 2048 tokens do not
    fit the budget is the vocabulary cut too.

    Raises:
      ValueError: a platform that is not known.
    """
    if platform not in BLOCK_BYTES:
        raise ValueError(f"no block sizes for platform {platform!r}; known: {', '.join(BLOCK_BYTES)}")
    size, n, v = jnp.dtype(dtype).itemsize, max(n, 1), max(v, 1)
    entries = BLOCK_BYTES[platform] // size
    if platform == "cpu":
        return Blocks(n, min(v, max(128, entries // n // 128 * 128)))
    least, most = TOKENS_AT_ONCE
    tokens = min(n, max(least, min(most, entries // v)))
    chunks = -(-n // tokens)
    # Equal chunks where there are some: a smaller last one is compiled a second time.
    equal = (k for k in range(chunks, 2 * chunks) if n % k == 0 and n // k >= least)
    tokens = -(-n // next(equal, chunks))
    return Blocks(tokens, min(v, max(128, entries // tokens // 128 * 128)))


def rows_of_whole_vocabulary(platform: str, n: int, v: int, dtype: Any) -> int:
    """Tokens at a time where the whole vocabulary has to be there at once, whatever it costs.

    Each chunk of tokens reads the whole table, so a CPU is given more bytes than for a block of columns.
    """
    least, times = (8, 4) if platform == "cpu" else (128, 1)
    rows = max(least, times * BLOCK_BYTES[platform] // (jnp.dtype(dtype).itemsize * max(v, 1)))
    return max(1, min(n, rows))


def whole_vocabulary_slices(
    platform: str, rows: int, width: int, v: int, unit: int = 1, *, token_shards: int = 1, vocab_shards: int = 1
) -> int | None:
    """The fewest equal slices of [rows, width] tokens, of whole units of rows, whose float32 logits over the vocabulary
    of ``v`` fit the budget; a multiple of ``token_shards``, each device having its own.

    None = there are none, or the logits had better be made twice. So it is on a CPU, where a slice reads and writes the
    whole table's gradient for few tokens, and nothing was gained.
    """
    if platform == "cpu":
        return None
    most = max(TOKENS_AT_ONCE[0], BLOCK_BYTES[platform] * vocab_shards // (4 * max(v, 1)))
    most = min(TOKENS_AT_ONCE[1], most)
    fits = (c for c in range(token_shards, rows + 1, token_shards) if rows % (c * unit) == 0)
    return next((c for c in fits if rows // c * width <= most), None)
