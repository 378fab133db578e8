"""Linear heads on the final hidden state besides that of the vocabulary: a value of each position, a score of a row."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

Params = Any
NAMES = ("value", "score")


def init(width: int, names: Sequence[str]) -> Params:
    """``{"heads": {name: {"weight": [D], "bias": []}}}``, zero: a new head says 0 of everything. {} without names."""
    heads = {name: {"weight": jnp.zeros(width, jnp.float32), "bias": jnp.zeros((), jnp.float32)} for name in names}
    return {"heads": heads} if heads else {}


def apply(params: Params, name: str, hidden: Array) -> Array:
    """``hidden w + b`` of hidden [..., D], in float32 (at least).

    Raises:
      ValueError: the parameters have no such head.
    """
    if name not in params.get("heads", {}):
        raise ValueError(f"the policy's parameters have no {name} head: add heads.init(width, [{name!r}]) to them")
    head, dtype = params["heads"][name], jnp.promote_types(hidden.dtype, jnp.float32)
    return hidden.astype(dtype) @ head["weight"].astype(dtype) + head["bias"]


def last(mask: Array) -> Array:
    """[B] position of the last 1 in mask [B, T]; 0 for a row without any."""
    return jnp.max(jnp.arange(mask.shape[1]) * (mask > 0), -1)
