"""The naive form, for tests and for reading: makes the logits [N, V]."""

import jax
import jax.numpy as jnp
from jax import Array


def token_logprob(
    hidden: Array, unembed: Array, targets: Array, temperature: float | Array, softcap: float | None
) -> tuple[Array, Array, Array]:
    """(logp, entropy, logsumexp), [N] each, by log_softmax of the whole logits."""
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    z = jnp.dot(hidden, unembed, preferred_element_type=dtype)
    z = (z if softcap is None else softcap * jnp.tanh(z / softcap)) / temperature
    logsumexp = jax.nn.logsumexp(z, axis=-1)
    log_p = z - logsumexp[:, None]
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
    return jnp.take_along_axis(log_p, targets[:, None], 1)[:, 0], entropy, logsumexp
