"""Portable form: plain arithmetic, which XLA compiles to one fusion."""

import jax
import jax.numpy as jnp

from jaxpo.kernels.policy_surrogate.core import Outcome, Settings, Tokens, token


def one_pass(settings: Settings, tokens: Tokens) -> Outcome:
    """See `core.Outcome`."""
    terms, dpolicy, dkl = token(settings, tokens, jnp.expm1)
    return Outcome(jax.tree.map(jnp.sum, terms), dpolicy, dkl)
