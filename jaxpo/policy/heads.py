"""Linear heads on the final hidden state, besides the vocabulary head: a value of each position, a score and an
embedding of a row, the gate of its prompt."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Params = Any
NAMES = ("value", "score", "embed", "gate")
AFTER_ALL = ("score", "embed")  # they read the state after the last token


def init(width: int, shapes: Mapping[str, tuple[int, ...]], key: Array) -> Params:
    """``{"heads": {name: {"weight": [D, ...], "bias": [...]}}}`` for the given shapes: () for a number, (n,) for a
    vector. {} if there are no shapes.

    All are zero, so that a new head gives 0 everywhere, except the weights of ``embed``, which are random with variance
    1/D: an embedding of 0 has no direction, and the product of two such embeddings has no gradient."""

    def one(name: str, shape: tuple[int, ...]) -> Params:
        zero = jnp.zeros((width, *shape), jnp.float32)
        weight = jax.random.normal(key, zero.shape) / width**0.5 if name == "embed" else zero
        return {"weight": weight, "bias": jnp.zeros(shape, jnp.float32)}

    heads = {name: one(name, shape) for name, shape in shapes.items()}
    return {"heads": heads} if heads else {}


def apply(params: Params, name: str, hidden: Array) -> Array:
    """``hidden w + b`` [..., *shape] of hidden [..., D], in float32 (at least).

    Raises:
      ValueError: the parameters have no such head.
    """
    if name not in params.get("heads", {}):
        raise ValueError(
            f"the policy's parameters have no {name} head: add heads.init(width, {{{name!r}: shape}}, key) to them"
        )
    head, dtype = params["heads"][name], jnp.promote_types(hidden.dtype, jnp.float32)
    return hidden.astype(dtype) @ head["weight"].astype(dtype) + head["bias"]


def last(mask: Array) -> Array:
    """[B] position of the last 1 in mask [B, T]; 0 for a row without any."""
    return jnp.max(jnp.arange(mask.shape[1]) * (mask > 0), -1)
