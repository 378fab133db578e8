"""`token_logprob`: the public function, which chooses an implementation by name."""

import dataclasses
import difflib
import importlib
import logging
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jaxpo.kernels.chips import on_one_device, target_platform
from jaxpo.kernels.token_logprob import reference, sharded, xla
from jaxpo.kernels.token_logprob.core import (
    WANTS,
    Implementation,
    Other,
    Problem,
    Statics,
    TokenLogProb,
    accumulator,
    evaluate,
)

Impl = Literal["auto", "reference", "xla", "pallas_tpu", "pallas_gpu"]
# Modules with an `IMPLEMENTATION`, imported when they are chosen: Pallas takes a second to import.
MODULES = {name: f"jaxpo.kernels.token_logprob.{name}" for name in ("xla", "pallas_tpu", "pallas_gpu")}
IMPLS = ("auto", "reference", *MODULES)
BY_PLATFORM = {"tpu": "pallas_tpu"}  # what "auto" tries before xla; on GPUs pallas_gpu is not expected to be faster


class LogProbGradients(NamedTuple):
    """Gradients of ``sum_n g_logp_n logp_n`` in hidden [N, D], unembed [D, V] and bias [V]; None = not computed."""

    hidden: Array
    unembed: Array | None
    bias: Array | None


log = logging.getLogger(__name__)


def token_logprob(
    hidden: Array,
    unembed: Array,
    targets: Array,
    *,
    bias: Array | None = None,
    temperature: float | Array = 1.0,
    softcap: float | None = None,
    vocab_mask: Array | None = None,
    want: Sequence[str] = ("logp", "entropy"),
    second_temperature: float | Array | None = None,
    kl_to: tuple[Array, Array] | tuple[Array, Array, Array] | None = None,
    impl: Impl = "auto",
    block_sizes: tuple[int, int] | None = None,
    mesh: Mesh | None = None,
    grad_filter_eps: float = 0.0,
    interpret: bool = False,
) -> TokenLogProb:
    """Compute statistics of ``softmax(z / temperature)``, ``z = cap(hidden @ unembed + bias)``, without the logits
    [N, V] in memory; ``cap(x) = softcap * tanh(x / softcap)``.

    ======================  ================================================================  ====================
    want                    field of the result, [N]                                          dz of its cotangent g
    ======================  ================================================================  ====================
    "logp"                  logp = log p[target]                                              g (1[v = target] - p)
    "entropy"               entropy = H = -sum p log p                                        -g p (log p + H)
    "logsumexp"             logsumexp = log sum exp(z / temperature)                          g p
    "sum_p2"                sum_p2 = sum p^2                                                  2 g p (p - sum_p2)
    "top1"                  top1_id (int32), top1_logp: the most probable entry               none
    "logp_at_temperature"   logp_at_temperature = log p2[target],                             g (1[v = target] - p2)
                            p2 = softmax(z / second_temperature)
    "kl_to"                 kl = sum p (log p - log q), q = softmax(z' / temperature)         g p (log p - log q - kl)
                            of the pair ``kl_to``
    ======================  ================================================================  ====================

    (dz is in units of the tempered logits.) Differentiable in hidden, unembed and bias. The backward pass recomputes
    the logits: 8 N D V operations in all. Only the gradients that are asked for are computed. Without the gradient of
    unembed, for example with ``jax.lax.stop_gradient(unembed)``, it takes 6 N D V operations; 4 N D V if only "logp"
    (and "top1") are wanted, since then one pass gives the statistics and dlogp_n/dhidden_n.

    Args:
      hidden: [N, D] float.
      unembed: [D, V] float.
      targets: [N] int in [0, V). A target outside, or one that ``vocab_mask`` excludes, has logp -inf and no gradient;
        concrete targets outside are refused.
      bias: [V], finite.
      temperature, second_temperature: positive scalars; the second is needed for "logp_at_temperature".
      softcap: positive, or None = no softcap.
      vocab_mask: [V] bool, False = the entry has probability 0. At least one entry must be True.
      want: the statistics to compute; the other fields of the result are None.
      kl_to: needed for "kl_to": (hidden' [N, D'], unembed' [D', V]), or with a bias [V] as third. It is a constant,
        under the same softcap, vocab_mask and temperature.
      impl: "xla" (blocks in plain XLA), "pallas_tpu", "pallas_gpu", "reference" (naive, computes all logits), or
        "auto": on TPUs the Pallas form if it takes this problem, else "xla" (the reason is logged).
      block_sizes: (tokens, entries of the vocabulary) whose logits are held at a time; None = chosen by platform.
      mesh: spread the vocabulary over its axis "tensor" and the tokens over its other axes (see `sharded`).
      grad_filter_eps: blocks whose largest |dz| is below this may be left out of the gradients (pallas_tpu only).
      interpret: run Pallas kernels interpreted, to test them without such a chip.

    Returns:
      `TokenLogProb`; maxima, sums and logits are float32 whatever the inputs are (float64 for float64).

    Raises:
      ValueError: shapes do not fit, an option is out of range or has no effect, concrete targets are out of range, or
        the implementation is unknown or does not take this problem.
    """
    problem = problem_of(hidden, unembed, targets, bias, temperature, vocab_mask, want, second_temperature, kl_to)
    tokens, vocab = (None, None) if block_sizes is None else block_sizes
    for name, value in (("softcap", softcap), ("block_sizes", tokens), ("block_sizes", vocab)):
        positive(name, value)
    statics = Statics(
        want=frozenset(want),
        softcap=softcap,
        block_tokens=tokens,
        block_vocab=vocab,
        grad_filter_eps=grad_filter_eps,
        interpret=interpret,
    )
    if impl == "reference":
        for name, given in (("block_sizes", block_sizes), ("mesh", mesh)):
            if given is not None:
                raise ValueError(
                    f"token_logprob: {name} has no effect with impl='reference', which makes all logits at once"
                )
        return reference.token_logprob(statics, problem)
    implementation = choose(impl, statics, problem, one_device=mesh is not None or on_one_device())
    if implementation is xla.IMPLEMENTATION and (grad_filter_eps or interpret):
        name = "grad_filter_eps" if grad_filter_eps else "interpret"
        raise ValueError(f"token_logprob: {name} has no effect with impl='xla'; it is an option of the Pallas forms")
    if mesh is not None:
        implementation = sharded.over(implementation, mesh)
    return evaluate(implementation, statics, problem)


def token_logprob_grad(
    hidden: Array,
    unembed: Array,
    targets: Array,
    g_logp: Array,
    *,
    bias: Array | None = None,
    temperature: float | Array = 1.0,
    softcap: float | None = None,
    vocab_mask: Array | None = None,
    want: Sequence[str] = ("logp", "entropy"),
    frozen: bool = False,
    block_tokens: int | None = None,
) -> tuple[TokenLogProb, LogProbGradients]:
    """Compute the statistics ``want`` and the gradients of ``sum_n g_logp_n logp_n`` in one pass over the logits.

    Use it if the cotangent is known before the pass, as in a first on-policy step, where
    ``d loss / d logp = -A / normalizer``. It takes 6 N D V operations, where `token_logprob` and its derivative take 8
    N D V. The logits of ``block_tokens`` tokens over the whole vocabulary are held at a time.

    Args:
      g_logp: [N] float, the cotangent of logp; the other cotangents are zero.
      frozen: unembed and bias are constants: only the gradient in hidden is computed, 4 N D V operations.
      block_tokens: tokens whose logits are held at a time; None = chosen by platform.
      Others as in `token_logprob`; ``want`` must not hold "kl_to" and "logp_at_temperature".

    Returns:
      `TokenLogProb`, and the gradients in the dtypes of their arrays.

    Raises:
      ValueError: as in `token_logprob`.
    """
    for name in ("logp_at_temperature", "kl_to"):
        if name in want:
            raise ValueError(f"token_logprob_grad: {name!r} cannot be wanted; use token_logprob")
    problem = problem_of(hidden, unembed, targets, bias, temperature, vocab_mask, want, None, None)
    positive("softcap", softcap)
    positive("block_tokens", block_tokens)
    if g_logp.shape != targets.shape:
        raise ValueError(f"token_logprob_grad: g_logp {g_logp.shape} must have the shape of targets {targets.shape}")
    statics = Statics(want=frozenset(want), softcap=softcap, block_tokens=block_tokens)
    names = {"hidden"} if frozen else {"hidden", "table", "bias"} - ({"bias"} if bias is None else set())
    out, grads = xla.one_pass(dataclasses.replace(statics, grads=frozenset(names)), problem, g_logp)
    return out, LogProbGradients(
        hidden=grads.hidden.astype(hidden.dtype),
        unembed=None if grads.table is None else grads.table.astype(unembed.dtype).T,
        bias=None if grads.bias is None else grads.bias.astype(bias.dtype),
    )


def positive(name: str, value: Any) -> None:
    """Raise ``ValueError`` for a concrete number that is not positive."""
    if isinstance(value, int | float) and not value > 0:
        raise ValueError(f"token_logprob: {name} must be positive, not {value}")


def nearest(what: str, name: str, choices: Sequence[str]) -> str:
    """The error message for a ``name`` that is not among the ``choices``."""
    near = difflib.get_close_matches(name, choices, 1)
    hint = f": did you mean {near[0]!r}?" if near else ";"
    return f"unknown {what} {name!r} of token_logprob{hint} known: {', '.join(choices)}"


def choose(impl: str, statics: Statics, problem: Problem, *, one_device: bool = True) -> Implementation:
    """The implementation called ``impl``; for "auto", the best one on this platform that takes the problem. If the
    compiler spreads the arrays over several devices that is xla: it cannot spread a kernel outside a ``shard_map``."""
    if impl not in IMPLS:
        raise ValueError(nearest("implementation", impl, IMPLS))
    name = BY_PLATFORM.get(target_platform(), "xla") if impl == "auto" else impl
    if impl == "auto" and name != "xla" and not one_device:
        log.info("token_logprob: xla in place of %s: give the mesh that the arrays are spread over", name)
        return xla.IMPLEMENTATION
    implementation = importlib.import_module(MODULES[name]).IMPLEMENTATION
    reason = implementation.why_not(statics, problem)
    if reason is None:
        return implementation
    if impl != "auto":
        raise ValueError(f"token_logprob: impl={impl!r} does not take this problem: {reason}")
    log.info("token_logprob: xla in place of %s: %s", name, reason)
    return xla.IMPLEMENTATION


def problem_of(
    hidden: Array,
    unembed: Array,
    targets: Array,
    bias: Array | None,
    temperature: float | Array,
    vocab_mask: Array | None,
    want: Sequence[str],
    second_temperature: float | Array | None,
    kl_to: Sequence[Array] | None,
) -> Problem:
    """Check the arrays of a call, and return them as a `Problem`."""
    check_shapes(hidden, unembed, targets, bias, vocab_mask)
    if isinstance(want, str):
        raise ValueError(f"token_logprob: want must be a sequence of names such as ({want!r},), not a string")
    for name in want:
        if name not in WANTS:
            raise ValueError(nearest("want", name, WANTS))
    if not want:
        raise ValueError(f"token_logprob: want is empty; choose of: {', '.join(WANTS)}")
    for name, option, value in (
        ("logp_at_temperature", "second_temperature", second_temperature),
        ("kl_to", "kl_to", kl_to),
    ):
        if (name in want) != (value is not None):
            raise ValueError(f"token_logprob: {name!r} in want and the option {option} must be given together")
    positive("temperature", temperature)
    positive("second_temperature", second_temperature)
    check_values(targets, vocab_mask, unembed.shape[1])
    hidden, unembed, targets = jnp.asarray(hidden), jnp.asarray(unembed), jnp.asarray(targets)
    dtype = accumulator(jnp.promote_types(hidden.dtype, unembed.dtype))
    return Problem(
        hidden=hidden,
        # Rows of the vocabulary are contiguous in [V, D]; for a tied head this transpose cancels the caller's.
        table=unembed.T,
        targets=targets,
        bias=None if bias is None else jnp.asarray(bias),
        vocab_mask=None if vocab_mask is None else jnp.asarray(vocab_mask, bool),
        temperature=jnp.asarray(temperature, dtype),
        second_temperature=None if second_temperature is None else jnp.asarray(second_temperature, dtype),
        other=None if kl_to is None else other_of(kl_to, hidden.shape[0], unembed.shape[1]),
    )


def check_shapes(hidden: Array, unembed: Array, targets: Array, bias: Array | None, vocab_mask: Array | None) -> None:
    """Raise ``ValueError`` for arrays that do not fit together."""
    if hidden.ndim != 2 or unembed.ndim != 2 or targets.ndim != 1:
        raise ValueError(
            f"token_logprob takes hidden [N, D], unembed [D, V], targets [N], not {hidden.shape}, "
            f"{unembed.shape}, {targets.shape}"
        )
    if hidden.shape[1] != unembed.shape[0] or hidden.shape[0] != targets.shape[0]:
        raise ValueError(
            f"token_logprob: hidden {hidden.shape}, unembed {unembed.shape} and targets {targets.shape} do "
            "not fit together"
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"token_logprob: targets must be integers, not {targets.dtype}")
    for name, x in (("bias", bias), ("vocab_mask", vocab_mask)):
        if x is not None and x.shape != unembed.shape[1:]:
            raise ValueError(f"token_logprob: {name} {x.shape} must have one entry for each of {unembed.shape[1]}")


def concrete(x: Any) -> np.ndarray | None:
    """The numbers of ``x``, or None if they are not available: traced, or on devices of other hosts."""
    if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
        return None
    return np.asarray(x)


def check_values(targets: Array, vocab_mask: Array | None, v: int) -> None:
    """Raise ``ValueError`` for concrete targets outside [0, v), and for a concrete mask without an entry."""
    seen = concrete(targets)
    if seen is not None and seen.size and (seen.min() < 0 or seen.max() >= v):
        raise ValueError(f"token_logprob: targets must be in [0, {v}), but range from {seen.min()} to {seen.max()}")
    seen = None if vocab_mask is None else concrete(vocab_mask)
    if seen is not None and not seen.any():
        raise ValueError("token_logprob: vocab_mask has no entry that is True")


def other_of(kl_to: Sequence[Array], n: int, v: int) -> Other:
    """The pair ``kl_to`` as a constant."""
    hidden, unembed, bias = (*kl_to, None) if len(kl_to) == 2 else kl_to
    if hidden.ndim != 2 or unembed.shape != (hidden.shape[1], v) or hidden.shape[0] != n:
        raise ValueError(
            f"token_logprob: kl_to must be (hidden [{n}, D'], unembed [D', {v}]), not {hidden.shape} and "
            f"{unembed.shape}"
        )
    if bias is not None and bias.shape != (v,):
        raise ValueError(f"token_logprob: the bias of kl_to {bias.shape} must be ({v},)")
    return jax.lax.stop_gradient(jax.tree.map(jnp.asarray, Other(hidden, unembed.T, bias)))
