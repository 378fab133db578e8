"""Block sizes of the portable form, from the platform's budget of bytes."""

from typing import Any, NamedTuple

import jax.numpy as jnp

# One block of logits. On a CPU it should stay in the caches; an accelerator wants few, large products.
BLOCK_BYTES = {"cpu": 8 * 2**20, "gpu": 2**31, "tpu": 2**31}
TOKENS_AT_ONCE = 2048, 8192  # least and most tokens of a block on an accelerator (or all, if there are fewer)


class Blocks(NamedTuple):
    """Tokens and entries of the vocabulary whose logits are held at a time."""

    tokens: int
    vocab: int


def plan(platform: str, n: int, v: int, dtype: Any) -> Blocks:
    """Blocks for ``n`` tokens and a vocabulary of ``v``; ``dtype`` is that of the logits.

    On a CPU a block has all tokens and a few columns: the table is read once, and each block of its gradient is
    finished when it is written. On an accelerator it has the whole vocabulary for 2048 to 8192 tokens: a loop over the
    vocabulary would be slow, as each block reads and writes the statistics and dhidden. The vocabulary is cut too only
    if 2048 tokens do not fit the budget.

    Raises:
      ValueError: the platform is unknown.
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
    # Equal chunks if there are any: a smaller last chunk would be compiled separately.
    equal = (k for k in range(chunks, 2 * chunks) if n % k == 0 and n // k >= least)
    tokens = -(-n // next(equal, chunks))
    return Blocks(tokens, min(v, max(128, entries // tokens // 128 * 128)))


def rows_of_whole_vocabulary(platform: str, n: int, v: int, dtype: Any) -> int:
    """Tokens of a block that must hold the whole vocabulary, even if a few tokens exceed the budget.

    Each block of tokens reads the whole table, so a CPU gets more bytes than for a block of columns.
    """
    least, times = (8, 4) if platform == "cpu" else (128, 1)
    rows = max(least, times * BLOCK_BYTES[platform] // (jnp.dtype(dtype).itemsize * max(v, 1)))
    return max(1, min(n, rows))


def whole_vocabulary_slices(
    platform: str, rows: int, width: int, v: int, unit: int = 1, *, token_shards: int = 1, vocab_shards: int = 1
) -> int | None:
    """The fewest equal slices of [rows, width] tokens for which the float32 logits of a slice over the vocabulary of
    ``v`` fit the budget. A slice has whole units of rows, and the number of slices is a multiple of ``token_shards``,
    since each device has its own slices.

    None = there is no such number, or it is better to compute the logits twice. So it is on a CPU: a slice reads and
    writes the whole table's gradient for few tokens, and this brought no gain.
    """
    if platform == "cpu":
        return None
    most = max(TOKENS_AT_ONCE[0], BLOCK_BYTES[platform] * vocab_shards // (4 * max(v, 1)))
    most = min(TOKENS_AT_ONCE[1], most)
    fits = (c for c in range(token_shards, rows + 1, token_shards) if rows % (c * unit) == 0)
    return next((c for c in fits if rows // c * width <= most), None)
