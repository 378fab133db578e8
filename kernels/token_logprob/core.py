"""The interface of the implementations, and the derivative that they share.

An implementation is a pair of functions over blocks of logits (`Implementation`). It never sees the cotangent of an
output, and never finishes a statistic:

- ``forward(statics, problem) -> Sums``: per row, a maximum and sums over the vocabulary that can be merged (over
  blocks, over shards);
- ``backward(statics, problem, rows) -> Gradients``: gradients of hidden, table and bias from per-row coefficients of
  ``dz`` (`Rows`), with the logits recomputed.

`finish` computes the statistics from the sums, and `coefficients` computes the coefficients from the cotangents;
`evaluate` connects them with one custom derivative. With N tokens, D features, V entries of the vocabulary (or shard):

    x = hidden @ table.T + bias          [N, V]
    z = softcap * tanh(x / softcap)      (x without a softcap), and MASKED where vocab_mask is False
    p = softmax(z / temperature),  p2 = softmax(z / second_temperature),  q = softmax(z' / temperature), z' of ``other``

Everything that depends on the logits is float32 (float64 for float64 inputs) whatever the inputs are.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

# z of a masked entry: finite, so that no 0 * inf appears, and so low that exp((MASKED - m) / temperature) is 0.
MASKED = -1e20
WANTS = ("logp", "entropy", "logsumexp", "top1", "sum_p2", "logp_at_temperature", "kl_to")


class TokenLogProb(NamedTuple):
    """The statistics, [N] each, float32 at least; None if it was not asked for.

    logp, entropy, logsumexp, sum_p2 and top1_logp belong to ``p``, logp_at_temperature to ``p2``; kl is ``KL(p || q)``.
    top1_id (int32, of equal entries the first) and top1_logp have no gradient.
    """

    logp: Array | None = None
    entropy: Array | None = None
    logsumexp: Array | None = None
    top1_id: Array | None = None
    top1_logp: Array | None = None
    sum_p2: Array | None = None
    logp_at_temperature: Array | None = None
    kl: Array | None = None


class Other(NamedTuple):
    """The constant pair that ``kl_to`` compares with: hidden [N, D'], table [V, D'], bias [V] or None."""

    hidden: Array
    table: Array
    bias: Array | None


class Problem(NamedTuple):
    """The arrays of a call. In a shard: its rows of the vocabulary, and targets counted from its first row."""

    hidden: Array  # [N, D]
    table: Array  # [V, D]: a row for each entry of the vocabulary
    targets: Array  # [N] int32; a target outside [0, V) matches no entry
    bias: Array | None  # [V], added before the softcap
    vocab_mask: Array | None  # [V] bool
    temperature: Array  # [] of `accumulator`
    second_temperature: Array | None  # [] of `accumulator`; given exactly if "logp_at_temperature" is wanted
    other: Other | None  # given exactly if "kl_to" is wanted


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Statics:
    """The static options of a compiled program.

    want: some of ``WANTS``.
    softcap: bound of the logits; None = no softcap.
    block_tokens, block_vocab: sizes of a block; None = the implementation chooses.
    grads: the gradients that `backward` computes, some of "hidden", "table", "bias" (the others are None). `evaluate`
      fills this in from what is being differentiated.
    grad_filter_eps: blocks whose largest |dz| is below this may be skipped in the backward pass (0 = none).
    interpret: run Pallas kernels interpreted.
    """

    want: frozenset[str] = frozenset({"logp", "entropy"})
    softcap: float | None = None
    block_tokens: int | None = None
    block_vocab: int | None = None
    grads: frozenset[str] = frozenset()
    grad_filter_eps: float = 0.0
    interpret: bool = False


class Sums(NamedTuple):
    """Maxima and sums over the vocabulary, [N] each; None if `needed_sums` does not name it. ``m`` is in units of z,
    before any temperature."""

    m: Array  # max_v z
    target: Array  # z of the target; -inf if it is not here (merged by maximum)
    s: Array  # sum_v exp((z - m) / T)
    sz: Array | None = None  # sum_v exp((z - m) / T) (z - m) / T
    sp2: Array | None = None  # sum_v exp(2 (z - m) / T)
    s2: Array | None = None  # sum_v exp((z - m) / T2)
    id: Array | None = None  # int32, first v with z = m
    m_q: Array | None = None  # max_v z'
    s_q: Array | None = None  # sum_v exp((z' - m_q) / T)
    sd: Array | None = None  # sum_v exp((z - m) / T) (z - z') / T


class Rows(NamedTuple):
    """Coefficients [N] of the derivative in z, which include 1 / temperature; None = no such term:

        dz_v = hit 1[v = target] + p_v (one + log_p log p_v + p p_v + log_ratio (log p_v - log q_v)) - second p2_v
        log p = z / T - lse,   log p2 = z / T2 - lse_second,   log q = z' / T - lse_q

    and ``dx = dz (1 - tanh(x / softcap)^2)``, ``dhidden = dx @ table``, ``dtable = dx.T @ hidden``,
    ``dbias = sum_n dx``. At masked entries p = q = 0, and a masked target has ``hit`` = 0.
    """

    lse: Array
    hit: Array
    one: Array
    log_p: Array | None = None
    p: Array | None = None
    log_ratio: Array | None = None
    lse_q: Array | None = None
    second: Array | None = None
    lse_second: Array | None = None


class Gradients(NamedTuple):
    """The gradients; None if ``statics.grads`` does not name it.

    hidden: [N, D] in the dtype of `accumulator` (the parts of the shards are not summed yet).
    table: [V, D] in any float dtype.
    bias: [V] in any float dtype.
    """

    hidden: Array | None
    table: Array | None
    bias: Array | None


class Implementation(NamedTuple):
    """The functions of an implementation; see the docstring of this file. They are functions of a module, so that equal
    implementations have equal hashes.

    why_not: the reason why it cannot compute this problem (from shapes and dtypes only), or None.
    one_pass: ``(statics, problem, g_logp)`` -> the statistics, and the gradients ``statics.grads`` of
      ``sum_n g_logp_n logp_n``, from the same logits. None = not available.
    """

    name: str
    forward: Callable[[Statics, Problem], Sums]
    backward: Callable[[Statics, Problem, Rows], Gradients]
    why_not: Callable[[Statics, Problem], str | None] = lambda statics, problem: None
    one_pass: Callable[[Statics, Problem, Array], tuple[TokenLogProb, Gradients]] | None = None


def accumulator(dtype: Any) -> Any:
    """The dtype of logits and sums: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def needed_sums(want: frozenset[str]) -> frozenset[str]:
    """The optional fields of `Sums` that ``want`` needs."""
    fields = {"entropy": "sz", "sum_p2": "sp2", "logp_at_temperature": "s2", "top1": "id"}
    kl = {"m_q", "s_q", "sd"} if "kl_to" in want else set()
    return frozenset({field for name, field in fields.items() if name in want} | kl)


class Finished(NamedTuple):
    """The values that the backward pass keeps of the sums, [N] each."""

    lse: Array
    entropy: Array | None
    sum_p2: Array | None
    kl: Array | None
    lse_second: Array | None
    lse_q: Array | None
    hits: Array  # bool: the target is in the vocabulary and not masked


def finish(problem: Problem, sums: Sums, want: frozenset[str]) -> tuple[TokenLogProb, Finished]:
    """Compute the statistics ``want`` from the sums, and the values that their derivative needs."""
    t, log_s = problem.temperature, jnp.log(sums.s)
    lse, hits = sums.m / t + log_s, sums.target > MASKED / 2
    target = jnp.where(hits, sums.target - sums.m, -jnp.inf)
    entropy = None if sums.sz is None else log_s - sums.sz / sums.s
    sum_p2 = None if sums.sp2 is None else sums.sp2 / jnp.square(sums.s)
    kl = lse_q = lse_second = second = None
    if sums.sd is not None:
        lse_q = sums.m_q / t + jnp.log(sums.s_q)
        kl = sums.sd / sums.s - lse + lse_q
    if sums.s2 is not None:
        t2, log_s2 = problem.second_temperature, jnp.log(sums.s2)
        lse_second, second = sums.m / t2 + log_s2, target / t2 - log_s2
    out = TokenLogProb(
        logp=target / t - log_s if "logp" in want else None,
        entropy=entropy,
        logsumexp=lse if "logsumexp" in want else None,
        top1_id=sums.id,
        top1_logp=None if sums.id is None else -log_s,
        sum_p2=sum_p2,
        logp_at_temperature=second,
        kl=kl,
    )
    return out, Finished(lse, entropy, sum_p2, kl, lse_second, lse_q, hits)


def coefficients(problem: Problem, done: Finished, g: TokenLogProb) -> Rows:
    """`Rows` from the cotangents ``g``, where None is zero. A target that matches no entry has no gradient."""
    zero = jnp.zeros_like(done.lse)
    t, logp = problem.temperature, zero if g.logp is None else jnp.where(done.hits, g.logp, 0)
    hit, one = logp / t, -logp
    log_p = p = log_ratio = second = None
    if g.logsumexp is not None:
        one = one + g.logsumexp
    if g.entropy is not None:
        one, log_p = one - g.entropy * done.entropy, -g.entropy / t
    if g.sum_p2 is not None:
        one, p = one - 2 * g.sum_p2 * done.sum_p2, 2 * g.sum_p2 / t
    if g.kl is not None:
        one, log_ratio = one - g.kl * done.kl, g.kl / t
    if g.logp_at_temperature is not None:
        second = jnp.where(done.hits, g.logp_at_temperature, 0) / problem.second_temperature
        hit = hit + second
    lse_q = None if log_ratio is None else done.lse_q
    lse_second = None if second is None else done.lse_second
    return Rows(done.lse, hit, one / t, log_p, p, log_ratio, lse_q, second, lse_second)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def evaluate(implementation: Implementation, statics: Statics, problem: Problem) -> TokenLogProb:
    """The statistics ``statics.want``, differentiable in hidden, table and bias.

    Only the gradients that are asked for are computed: with ``jax.lax.stop_gradient`` of the table, or if the table is
    not differentiated, the backward pass has no product for it. Outputs without a cotangent cost nothing either. If
    only logp can be differentiated, and only in hidden, dlogp_n/dhidden_n [N, D] is stored and the logits are not
    computed again: dhidden is the stored array times the cotangent.
    """
    return finish(problem, implementation.forward(statics, problem), statics.want)[0]


def perturbed_of(statics: Statics, problem: Any) -> tuple[Statics, Problem]:
    """Split the arguments of a forward rule with symbolic zeros: ``statics`` with ``grads`` set to the arrays that are
    differentiated, and the plain arrays."""
    names = ("hidden", "table", "bias")
    grads = frozenset(name for name in names if getattr(getattr(problem, name), "perturbed", False))
    problem = jax.tree.map(lambda x: x.value, problem, is_leaf=lambda x: hasattr(x, "perturbed"))
    return dataclasses.replace(statics, grads=grads), problem


def _forward(implementation: Implementation, statics: Statics, problem: Any) -> tuple[TokenLogProb, Any]:
    statics, problem = perturbed_of(statics, problem)
    if implementation.one_pass and statics.grads == {"hidden"} and statics.want <= {"logp", "top1"}:
        one = jnp.ones(problem.hidden.shape[0], problem.temperature.dtype)
        out, slopes = implementation.one_pass(statics, problem, one)
        return out, (statics, problem, None, slopes.hidden.astype(problem.hidden.dtype))
    out, done = finish(problem, implementation.forward(statics, problem), statics.want)
    return out, (statics, problem, done, None)


def _backward(implementation: Implementation, _: Statics, residuals: Any, g: Any) -> tuple[Problem]:
    statics, problem, done, slopes = residuals
    g = TokenLogProb(*(None if isinstance(x, SymbolicZero) else x for x in g))
    if slopes is None:
        grads = implementation.backward(statics, problem, coefficients(problem, done, g))
    else:
        grads = Gradients(jnp.zeros_like(slopes) if g.logp is None else g.logp[:, None] * slopes, None, None)

    def like(name: str) -> Array | None:
        x = getattr(grads, name)
        return None if x is None else x.astype(getattr(problem, name).dtype)

    # A temperature is a setting, not a parameter. Its gradient is not computed, so it is NaN: zero would be wrong.
    nan = jnp.full_like(problem.temperature, jnp.nan)
    second = None if problem.second_temperature is None else nan
    return (Problem(like("hidden"), like("table"), None, like("bias"), None, nan, second, None),)


evaluate.defvjp(_forward, _backward, symbolic_zeros=True)
