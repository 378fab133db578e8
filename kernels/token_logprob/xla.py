"""Portable form: loops over blocks of tokens and of the vocabulary, in plain XLA.

At most one block of logits [block_tokens, block_vocab] is alive at a time (two with ``other``). `plan` chooses the
blocks: a loop over tokens outermost on accelerators, all tokens at once on a CPU.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxpo.kernels.chips import target_platform
from jaxpo.kernels.token_logprob.core import (
    MASKED,
    Gradients,
    Implementation,
    Problem,
    Rows,
    Statics,
    Sums,
    TokenLogProb,
    accumulator,
    coefficients,
    finish,
    needed_sums,
)
from jaxpo.kernels.token_logprob.plan import Blocks, plan, rows_of_whole_vocabulary


class Columns(NamedTuple):
    """The arrays of the vocabulary, or of a block of it: leaves [V, ...]."""

    table: Array
    bias: Array | None
    mask: Array | None
    table_q: Array | None
    bias_q: Array | None


class Tokens(NamedTuple):
    """The arrays of the tokens, or of a block of them: leaves [N, ...]."""

    hidden: Array
    targets: Array
    hidden_q: Array | None
    rows: Rows | None  # in the backward pass


def split(problem: Problem, rows: Rows | None = None) -> tuple[Tokens, Columns]:
    """Split the arrays of the problem by the axis that they are cut along."""
    q = problem.other
    hidden_q, table_q, bias_q = (None, None, None) if q is None else q
    return (
        Tokens(problem.hidden, problem.targets, hidden_q, rows),
        Columns(problem.table, problem.bias, problem.vocab_mask, table_q, bias_q),
    )


def blocks_of(statics: Statics, problem: Problem) -> Blocks:
    """The block sizes that are given, or else those of the plan."""
    n, v = problem.hidden.shape[0], problem.table.shape[0]
    planned = plan(target_platform(), n, v, accumulator(problem.hidden.dtype))
    return Blocks(
        min(statics.block_tokens or planned.tokens, max(n, 1)), min(statics.block_vocab or planned.vocab, max(v, 1))
    )


# --- one block --------------------------------------------------------------------------------------------------------


def logits(
    hidden: Array, table: Array, bias: Array | None, mask: Array | None, softcap: float | None
) -> tuple[Array, Array | None]:
    """z [n, v] and d z / d x (None = 1 wherever p is not 0)."""
    x = jax.lax.dot_general(hidden, table, (((1,), (1,)), ((), ())), preferred_element_type=accumulator(hidden.dtype))
    x = x if bias is None else x + bias.astype(x.dtype)
    slope = None
    if softcap is not None:
        tanh = jnp.tanh(x / softcap)
        x, slope = softcap * tanh, 1 - jnp.square(tanh)
    return x if mask is None else jnp.where(mask, x, MASKED), slope


def both_logits(tokens: Tokens, columns: Columns, statics: Statics) -> tuple[Array, Array | None, Array | None]:
    """z, its slope, and z' of the other pair."""
    z, slope = logits(tokens.hidden, columns.table, columns.bias, columns.mask, statics.softcap)
    if columns.table_q is None:
        return z, slope, None
    return z, slope, logits(tokens.hidden_q, columns.table_q, columns.bias_q, columns.mask, statics.softcap)[0]


def block_sums(z: Array, z_q: Array | None, targets: Array, start: Array | int, problem: Problem, need: Any) -> Sums:
    """`Sums` of the block of the vocabulary that begins at ``start``."""
    t = problem.temperature
    m = z.max(-1)
    y = (z - m[:, None]) / t
    e = jnp.exp(y)
    local = targets - start
    target = jnp.take_along_axis(z, jnp.clip(local, 0, z.shape[1] - 1)[:, None], 1)[:, 0]
    sums = Sums(m, jnp.where((local >= 0) & (local < z.shape[1]), target, -jnp.inf), e.sum(-1))
    if "sz" in need:
        sums = sums._replace(sz=jnp.sum(e * y, -1))
    if "sp2" in need:
        sums = sums._replace(sp2=jnp.sum(jnp.square(e), -1))
    if "s2" in need:
        sums = sums._replace(s2=jnp.sum(jnp.exp((z - m[:, None]) / problem.second_temperature), -1))
    if "id" in need:
        sums = sums._replace(id=jnp.argmax(z, -1).astype(jnp.int32) + start)
    if z_q is not None:
        m_q = z_q.max(-1)
        s_q = jnp.exp((z_q - m_q[:, None]) / t).sum(-1)
        sums = sums._replace(m_q=m_q, s_q=s_q, sd=jnp.sum(e * (z - z_q), -1) / t)
    return sums


def no_sums(n: int, dtype: Any, need: Any) -> Sums:
    """`Sums` over no entry of the vocabulary, for ``n`` rows."""
    zero, low = jnp.zeros(n, dtype), jnp.full(n, MASKED, dtype)
    start = dict(m_q=low, id=jnp.zeros(n, jnp.int32))
    return Sums(low, zero - jnp.inf, zero, **{name: start.get(name, zero) for name in need})


def merge(a: Sums, b: Sums, problem: Problem) -> Sums:
    """`Sums` over two disjoint parts of the vocabulary, ``a`` the earlier one."""
    t, m = problem.temperature, jnp.maximum(a.m, b.m)
    shift_a, shift_b = (a.m - m) / t, (b.m - m) / t
    scale_a, scale_b = jnp.exp(shift_a), jnp.exp(shift_b)

    def sum_of(x: Array | None, y: Array | None, power: int = 1) -> Array | None:
        return None if x is None else scale_a**power * x + scale_b**power * y

    out = Sums(m, jnp.maximum(a.target, b.target), sum_of(a.s, b.s), sp2=sum_of(a.sp2, b.sp2, 2), sd=sum_of(a.sd, b.sd))
    if a.sz is not None:  # centered at the new maximum
        out = out._replace(sz=sum_of(a.sz + shift_a * a.s, b.sz + shift_b * b.s))
    if a.s2 is not None:
        t2 = problem.second_temperature
        out = out._replace(s2=jnp.exp((a.m - m) / t2) * a.s2 + jnp.exp((b.m - m) / t2) * b.s2)
    if a.id is not None:
        out = out._replace(id=jnp.where(b.m > a.m, b.id, a.id))
    if a.m_q is not None:
        m_q = jnp.maximum(a.m_q, b.m_q)
        s_q = jnp.exp((a.m_q - m_q) / t) * a.s_q + jnp.exp((b.m_q - m_q) / t) * b.s_q
        out = out._replace(m_q=m_q, s_q=s_q)
    return out


def block_dx(
    z: Array, slope: Array | None, z_q: Array | None, targets: Array, start: Array | int, rows: Rows, problem: Problem
) -> Array:
    """``dx`` [n, v] of `Rows`, for the block of the vocabulary that begins at ``start``."""
    log_p = z / problem.temperature - rows.lse[:, None]
    p = jnp.exp(log_p)
    factor = rows.one[:, None]
    if rows.log_p is not None:
        factor = factor + rows.log_p[:, None] * log_p
    if rows.p is not None:
        factor = factor + rows.p[:, None] * p
    if rows.log_ratio is not None:
        factor = factor + rows.log_ratio[:, None] * (log_p - (z_q / problem.temperature - rows.lse_q[:, None]))
    hit = (targets - start)[:, None] == jnp.arange(z.shape[1], dtype=targets.dtype)
    dz = jnp.where(hit, rows.hit[:, None], 0) + p * factor
    if rows.second is not None:
        p2 = jnp.exp(z / problem.second_temperature - rows.lse_second[:, None])
        dz = dz - rows.second[:, None] * p2
    return dz if slope is None else dz * slope


def products(dx: Array, tokens: Tokens, columns: Columns, statics: Statics) -> Gradients:
    """The gradients from ``dx`` [n, v] of a block, in the dtype of dx."""
    dtype, grads = dx.dtype, statics.grads
    bias = dx.sum(0) if "bias" in grads else None
    dx = dx.astype(columns.table.dtype)
    hidden = table = None
    if "hidden" in grads:
        hidden = jnp.dot(dx, columns.table, preferred_element_type=dtype)
    if "table" in grads:
        table = jax.lax.dot_general(dx, tokens.hidden, (((0,), (0,)), ((), ())), preferred_element_type=dtype)
    return Gradients(hidden, table, bias)


# --- loops ------------------------------------------------------------------------------------------------------------


def over_blocks(f: Callable[[Any, Any, Any], Any], carry: Any, arrays: Any, size: int) -> Any:
    """Call ``f(carry, block, start)`` for each block of ``size`` entries of the arrays' leading axis, in turn; the last
    block may be smaller."""
    total = jax.tree.leaves(arrays)[0].shape[0]
    full = total // size * size

    def at(start: Any, length: int) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, length), arrays)

    if full == size:
        carry = f(carry, jax.tree.map(lambda x: x[:size], arrays), 0)
    elif full:
        starts = jnp.arange(0, full, size, dtype=jnp.int32)
        carry = jax.lax.scan(lambda c, start: (f(c, at(start, size), start), None), carry, starts)[0]
    if full < total:
        carry = f(carry, jax.tree.map(lambda x: x[full:], arrays), full)
    return carry


def put(whole: Any, part: Any, start: Any) -> Any:
    """``whole`` with the rows from ``start`` on replaced by ``part``, for each leaf."""
    return jax.tree.map(lambda w, x: jax.lax.dynamic_update_slice_in_dim(w, x.astype(w.dtype), start, 0), whole, part)


def add(whole: Any, part: Any, start: Any) -> Any:
    """``whole`` with ``part`` added to the rows from ``start`` on, for each leaf."""

    def at(w: Array, x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(w, start, x.shape[0]) + x

    return put(whole, jax.tree.map(at, whole, part), start)


def zeros_of(statics: Statics, problem: Problem, hidden: Any, table: Any) -> Gradients:
    """Gradients of zero, in these dtypes."""
    dtypes = dict(hidden=hidden, table=table, bias=problem.temperature.dtype)
    return Gradients(
        *(
            jnp.zeros(getattr(problem, name).shape, dtype) if name in statics.grads else None
            for name, dtype in dtypes.items()
        )
    )


def forward(statics: Statics, problem: Problem) -> Sums:
    """See `core.Implementation`."""
    need, blocks, dtype = needed_sums(statics.want), blocks_of(statics, problem), problem.temperature.dtype
    tokens, columns = split(problem)

    def chunk(out: Sums, part: Tokens, first: Any) -> Sums:
        def step(sums: Sums, block: Columns, start: Any) -> Sums:
            z, _, z_q = both_logits(part, block, statics)
            return merge(sums, block_sums(z, z_q, part.targets, start, problem, need), problem)

        return put(out, over_blocks(step, no_sums(part.hidden.shape[0], dtype, need), columns, blocks.vocab), first)

    return over_blocks(chunk, no_sums(tokens.hidden.shape[0], dtype, need), tokens, blocks.tokens)


def backward(statics: Statics, problem: Problem, rows: Rows) -> Gradients:
    """See `core.Implementation`."""
    blocks, dtype = blocks_of(statics, problem), problem.temperature.dtype
    tokens, columns = split(problem, rows)
    once = blocks.tokens >= tokens.hidden.shape[0]  # each block of the table's gradient is finished when it is written

    def chunk(out: Gradients, part: Tokens, first: Any) -> Gradients:
        def step(carry: Gradients, block: Columns, start: Any) -> Gradients:
            z, slope, z_q = both_logits(part, block, statics)
            grads = products(block_dx(z, slope, z_q, part.targets, start, part.rows, problem), part, block, statics)
            table, bias = (put if once else add)(carry[1:], grads[1:], start)
            return Gradients(jax.tree.map(jnp.add, carry.hidden, grads.hidden), table, bias)

        empty = None if out.hidden is None else jnp.zeros(part.hidden.shape, dtype)
        done = over_blocks(step, out._replace(hidden=empty), columns, blocks.vocab)
        return done._replace(hidden=put(out.hidden, done.hidden, first))

    start = zeros_of(statics, problem, dtype, problem.table.dtype if once else dtype)
    return over_blocks(chunk, start, tokens, blocks.tokens)


def one_pass(statics: Statics, problem: Problem, g_logp: Array) -> tuple[TokenLogProb, Gradients]:
    """See `core.Implementation`. The logits of a block of tokens over the whole vocabulary are held at a time."""
    need, dtype = needed_sums(statics.want), problem.temperature.dtype
    tokens, columns = split(problem)
    (n, _), (v, _) = problem.hidden.shape, problem.table.shape
    if statics.block_tokens is None:
        size = rows_of_whole_vocabulary(target_platform(), n, v, dtype)
    else:  # as many logits as were asked for
        size = max(1, statics.block_tokens * min(statics.block_vocab or v, v) // max(v, 1))

    def chunk(carry: tuple, part: tuple[Tokens, Array], first: Any) -> tuple:
        (out, grads), (part, g) = carry, part
        z, slope, _ = both_logits(part, columns, statics)
        stats, done = finish(problem, block_sums(z, None, part.targets, 0, problem, need), statics.want)
        rows = coefficients(problem, done, TokenLogProb(logp=g))
        more = products(block_dx(z, slope, None, part.targets, 0, rows, problem), part, columns, statics)
        hidden = put(grads.hidden, more.hidden, first)
        table, bias = jax.tree.map(jnp.add, grads[1:], more[1:])
        return put(out, stats, first), Gradients(hidden, table, bias)

    shapes = jax.eval_shape(lambda: finish(problem, no_sums(n, dtype, need), statics.want)[0])
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    start = empty, zeros_of(statics, problem, problem.hidden.dtype, dtype)
    return over_blocks(chunk, start, (tokens, g_logp.astype(dtype)), min(size, max(n, 1)))


IMPLEMENTATION = Implementation("xla", forward, backward, one_pass=one_pass)
