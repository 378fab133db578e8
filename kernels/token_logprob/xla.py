"""Portable form: a scan over blocks of the vocabulary with a hand-written backward pass.

Forward keeps, per row, the running maximum m, sum of exp(z - m), sum of exp(z - m) (z - m), and the target's logit.
Backward recomputes each block's
logits from hidden and unembed. At most one block of logits [N, block] is alive at a time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

BLOCK_BYTES = 8 * 2**20


def token_logprob(
    hidden: Array,
    unembed: Array,
    targets: Array,
    temperature: float | Array,
    softcap: float | None,
    block_vocab: int | None,
) -> tuple[Array, Array, Array]:
    """(logp, entropy, logsumexp), [N] each; see `jaxpo.kernels.token_logprob`."""
    n, v = hidden.shape[0], unembed.shape[1]
    if block_vocab is None:
        block_vocab = max(128, BLOCK_BYTES // (4 * max(n, 1)) // 128 * 128)
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    # Rows of the vocabulary are contiguous in [V, D]; for a tied head this transpose undoes the caller's.
    return _stats(hidden, unembed.T, targets, jnp.asarray(temperature, dtype), softcap, min(block_vocab, v))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _stats(
    hidden: Array, table: Array, targets: Array, temperature: Array, softcap: float | None, block: int
) -> tuple[Array, Array, Array]:
    return _forward(hidden, table, targets, temperature, softcap, block)[0]


def _logits(hidden: Array, rows: Array, temperature: Array, softcap: float | None) -> tuple[Array, Array | None]:
    """z [N, block] of some rows of the table, and d z / d (hidden @ rows.T) up to 1/temperature (None = 1)."""
    x = jax.lax.dot_general(hidden, rows, (((1,), (1,)), ((), ())), preferred_element_type=temperature.dtype)
    if softcap is None:
        return x / temperature, None
    t = jnp.tanh(x / softcap)
    return softcap * t / temperature, 1 - jnp.square(t)


def _over_blocks(
    f: Callable[[Any, Array, Array], tuple[Any, Any]], init: Any, table: Array, block: int
) -> tuple[Any, Any]:
    """Scan ``f(carry, rows, start)`` over the table's full blocks, then over the ragged rest; per-block outputs are
    joined along the vocabulary."""
    v = table.shape[0]
    full = v // block
    carry, out = init, None
    if full == 1:
        carry, out = f(carry, table[:block], jnp.int32(0))
    elif full:
        blocks = table[: full * block].reshape(full, block, -1), jnp.arange(full, dtype=jnp.int32) * block
        carry, out = jax.lax.scan(lambda c, x: f(c, *x), carry, blocks)
        out = jax.tree.map(lambda x: x.reshape(full * block, *x.shape[2:]), out)
    if v % block:
        carry, rest = f(carry, table[full * block :], jnp.int32(full * block))
        out = rest if out is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, rest)
    return carry, out


def _forward(
    hidden: Array, table: Array, targets: Array, temperature: Array, softcap: float | None, block: int
) -> tuple[tuple[Array, Array, Array], Any]:
    n, dtype = hidden.shape[0], temperature.dtype

    def step(carry: tuple[Array, ...], rows: Array, start: Array) -> tuple[tuple[Array, ...], None]:
        m, s, sz, target = carry
        z, _ = _logits(hidden, rows, temperature, softcap)
        new_m = jnp.maximum(m, z.max(-1))
        shift, e = m - new_m, jnp.exp(z - new_m[:, None])
        scale = jnp.exp(shift)
        # sum e (z - new_m): the old sum is re-centred before the new block is added; -inf * 0 of the first block is 0
        sz = scale * (sz + jnp.where(s > 0, shift, 0) * s) + jnp.sum(e * (z - new_m[:, None]), -1)
        s = scale * s + e.sum(-1)
        local = targets - start
        hit = jnp.take_along_axis(z, jnp.clip(local, 0, rows.shape[0] - 1)[:, None], 1)[:, 0]
        target = jnp.where((local >= 0) & (local < rows.shape[0]), hit, target)
        return (new_m, s, sz, target), None

    zero = jnp.zeros(n, dtype)
    (m, s, sz, target), _ = _over_blocks(step, (zero - jnp.inf, zero, zero, zero), table, block)
    log_s = jnp.log(s)
    lse, entropy = m + log_s, log_s - sz / s
    return (target - lse, entropy, lse), (hidden, table, targets, temperature, lse, entropy)


def _backward(
    softcap: float | None, block: int, residuals: Any, cotangents: tuple[Array, Array, Array]
) -> tuple[Array, ...]:
    hidden, table, targets, temperature, lse, entropy = residuals
    g_logp, g_entropy, g_lse = cotangents

    def step(dhidden: Array, rows: Array, start: Array) -> tuple[Array, Array]:
        z, slope = _logits(hidden, rows, temperature, softcap)
        log_p = z - lse[:, None]
        p = jnp.exp(log_p)
        hit = (targets - start)[:, None] == jnp.arange(rows.shape[0], dtype=targets.dtype)
        # dz = g_logp (1[target] - p) - g_H p (log p + H) + g_lse p
        coefficient = (g_lse - g_logp - g_entropy * entropy)[:, None] - g_entropy[:, None] * log_p
        dz = jnp.where(hit, g_logp[:, None], 0) + p * coefficient
        dx = ((dz if slope is None else dz * slope) / temperature).astype(rows.dtype)
        dhidden = dhidden + jnp.dot(dx, rows, preferred_element_type=dhidden.dtype)
        drows = jax.lax.dot_general(dx, hidden, (((0,), (0,)), ((), ())), preferred_element_type=dhidden.dtype)
        return dhidden, drows.astype(table.dtype)

    dhidden, dtable = _over_blocks(step, jnp.zeros(hidden.shape, temperature.dtype), table, block)
    # The temperature is a setting, not a parameter: its gradient is not defined here, and zero would be a lie.
    return dhidden.astype(hidden.dtype), dtable, None, jnp.full_like(temperature, jnp.nan)


_stats.defvjp(_forward, _backward)
