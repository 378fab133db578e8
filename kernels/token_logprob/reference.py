"""The naive form, for tests and for reading: it computes the logits [N, V], with JAX's own derivative."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxpo.kernels.token_logprob.core import Problem, Statics, TokenLogProb, accumulator


def token_logprob(statics: Statics, problem: Problem) -> TokenLogProb:
    """The statistics in ``statics.want``, [N] each, by log_softmax of the whole logits."""
    t, targets, want = problem.temperature, problem.targets, statics.want

    def logits(hidden: Array, table: Array, bias: Array | None) -> Array:
        x = jnp.dot(hidden, table.T, preferred_element_type=accumulator(hidden.dtype))
        x = x if bias is None else x + bias.astype(x.dtype)
        x = x if statics.softcap is None else statics.softcap * jnp.tanh(x / statics.softcap)
        return x if problem.vocab_mask is None else jnp.where(problem.vocab_mask, x, -jnp.inf)

    def of_target(log_p: Array) -> Array:
        inside = (targets >= 0) & (targets < log_p.shape[1])
        chosen = jnp.take_along_axis(log_p, jnp.where(inside, targets, 0)[:, None], 1)[:, 0]
        return jnp.where(inside & (chosen > -jnp.inf), chosen, -jnp.inf)  # -inf has no gradient

    def total(p: Array, x: Array) -> Array:  # at masked entries 0 * inf counts as 0
        return jnp.sum(p * jnp.where(p > 0, x, 0), -1)

    z = logits(problem.hidden, problem.table, problem.bias)
    log_p = jax.nn.log_softmax(z / t)
    p, out = jnp.exp(log_p), TokenLogProb()
    if "logp" in want:
        out = out._replace(logp=of_target(log_p))
    if "entropy" in want:
        out = out._replace(entropy=-total(p, log_p))
    if "logsumexp" in want:
        out = out._replace(logsumexp=jax.nn.logsumexp(z / t, axis=-1))
    if "top1" in want:
        top = jnp.argmax(z, -1).astype(jnp.int32)
        top_logp = jnp.take_along_axis(jax.lax.stop_gradient(log_p), top[:, None], 1)[:, 0]
        out = out._replace(top1_id=top, top1_logp=top_logp)
    if "sum_p2" in want:
        out = out._replace(sum_p2=jnp.sum(jnp.square(p), -1))
    if "logp_at_temperature" in want:
        out = out._replace(logp_at_temperature=of_target(jax.nn.log_softmax(z / problem.second_temperature)))
    if "kl_to" in want:
        log_q = jax.lax.stop_gradient(jax.nn.log_softmax(logits(*problem.other) / t))
        out = out._replace(kl=total(p, jnp.where(p > 0, log_p - log_q, 0)))
    return out
