"""`token_logprob`: the one entry point; implementations are chosen by name."""

from typing import Literal, NamedTuple

from jax import Array

from jaxpo.kernels.token_logprob import reference, xla


class LogProbStats(NamedTuple):
    """[N] float32 each. Entropy and logsumexp are of the tempered, soft-capped distribution that ``logp`` is of."""

    logp: Array
    entropy: Array
    logsumexp: Array


Implementation = Literal["auto", "xla", "reference"]


def token_logprob(
    hidden: Array,
    unembed: Array,
    targets: Array,
    *,
    temperature: float | Array = 1.0,
    softcap: float | None = None,
    impl: Implementation = "auto",
    block_vocab: int | None = None,
) -> LogProbStats:
    """``logp_n = log_softmax(z_n)[target_n]``, ``H_n = -sum_v p log p``, with ``z = cap(hidden @ unembed) /
    temperature``.

    ``cap(x) = softcap * tanh(x / softcap)``. Differentiable in hidden and unembed for any cotangent of the three
    outputs
    (``dz_v = g_logp (1[v = target] - p_v) - g_H p_v (log p_v + H) + g_lse p_v``); logits are recomputed in the
    backward pass, block by block.

    Args:
      hidden: [N, D] float. unembed: [D, V] float. targets: [N] int in [0, V).
      temperature: positive scalar. softcap: positive, or None for none.
      impl: "xla" (blocks of the vocabulary, no [N, V] array), "reference" (naive), or "auto" (= "xla").
      block_vocab: columns per block; None = from a budget of 8 MiB for one block of logits.

    Returns:
      `LogProbStats`; maxima, sums and logits are float32 whatever the inputs are (float64 for float64).

    Raises:
      ValueError: shapes that do not fit, an option out of range, or an unknown implementation.
    """
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
    for name, value in (("temperature", temperature), ("softcap", softcap), ("block_vocab", block_vocab)):
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"token_logprob: {name} must be positive, not {value}")
    if impl == "reference" and block_vocab is not None:
        raise ValueError(
            "token_logprob: block_vocab has no effect with impl='reference', which makes all logits at once"
        )
    if impl == "reference":
        return LogProbStats(*reference.token_logprob(hidden, unembed, targets, temperature, softcap))
    if impl in ("auto", "xla"):
        return LogProbStats(*xla.token_logprob(hidden, unembed, targets, temperature, softcap, block_vocab))
    raise ValueError(f"unknown implementation {impl!r} of token_logprob: known: auto, xla, reference")
