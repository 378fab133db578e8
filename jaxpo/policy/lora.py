"""LoRA (arXiv:2106.09685): frozen matrices W with trained low-rank products next to them, ``x W + scale (x A) B``.

Adapters are a separate pure dict of arrays, ``{"blocks": {"wq": {"a": [L, D, r], "b": [L, r, H, d]}, ...}}``. Every
matrix of Hugging Face has an A and a B of its own, as in ``peft``; ``w_in`` holds two of them side by side. The
optimizer moves only these, and a checkpoint holds only these. `attach` puts them next to the base weights for a forward
pass. The two products are computed separately, and W and A B are never added: a merged copy would be a second model in
memory, and its gradient a third. This way only ``x A``, rank numbers a token, is stored for the backward pass, and no
gradient of W is computed. Sampler and trainer multiply in the same way, so their log-probs agree as they do without
adapters. `merge` is for export.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxpo import arguments
from jaxpo.registry import unknown

Params = Any
INPUT_AXES = {"wq": 1, "wk": 1, "wv": 1, "wo": 2, "w_in": 1, "w_down": 1}  # input axes of each matrix
TARGETS = tuple(INPUT_AXES)
SIDE_BY_SIDE = ("w_in",)  # two matrices in one array, gate and up [..., 2, M], of which each has an A of its own


class Adapted(NamedTuple):
    """A frozen matrix with its adapter.

    weight: [in ..., out ...].
    a: [in ..., r], or [in ..., 2, r] for two matrices side by side.
    b: [r, out ...], already scaled.
    """

    weight: Array
    a: Array
    b: Array


def product(x: Array, weight: Array | Adapted, axes: int = 1) -> Array:
    """``x weight``, or with an adapter ``x weight + (x a) b``, over the last ``axes`` axes of x; in the dtype of x."""
    if isinstance(weight, Adapted):
        low = product(x, weight.a, axes)
        if weight.a.ndim == axes + 1:
            return product(x, weight.weight, axes) + product(low, weight.b)
        return product(x, weight.weight, axes) + jnp.einsum("...sr,rsm->...sm", low, weight.b.astype(x.dtype))
    return jnp.tensordot(x, weight.astype(x.dtype), axes)


def check(rank: int, targets: Sequence[str], *, experts: bool = False) -> None:
    """Raise ``ValueError`` for a rank below 1, no targets, an unknown target, or the MLP of a mixture of experts."""
    arguments.check("lora.rank", rank, arguments.Whole)
    if not targets:
        raise ValueError(f"lora.targets is empty: name some of {', '.join(TARGETS)}")
    for name in targets:
        if name not in TARGETS:
            raise ValueError(unknown("lora target", name, TARGETS))
        if experts and name in ("w_in", "w_down"):
            raise ValueError(f"lora.targets: {name} of a mixture of experts has no adapter; choose wq, wk, wv, wo")


def init(base: Params, key: Array, *, rank: int, targets: Sequence[str]) -> Params:
    """Adapters of the matrices called ``targets`` in every block of ``base`` (arrays or their shapes), in float32.

    ``a`` is uniform in ``+-1 / sqrt(inputs)`` and ``b`` is zero, so the policy starts as the base, bit for bit.
    """
    blocks = {}
    for name, key_ in zip(targets, jax.random.split(key, len(targets)), strict=True):
        shape, axes = base["blocks"][name].shape, INPUT_AXES[name]
        inputs, outputs = shape[1 : 1 + axes], shape[1 + axes :]
        bound, sides = math.prod(inputs) ** -0.5, outputs[:1] if name in SIDE_BY_SIDE else ()
        a = jax.random.uniform(key_, (shape[0], *inputs, *sides, rank), jnp.float32, -bound, bound)
        blocks[name] = {"a": a, "b": jnp.zeros((shape[0], rank, *outputs), jnp.float32)}
    return {"blocks": blocks}


def attach(base: Params, adapters: Params, scale: float) -> Params:
    """The parameters of a policy: ``base`` with adapters next to the matrices that have one. Nothing is copied.

    Args:
      adapters: as `init` returns them. Entries other than ``blocks`` (heads) go into the parameters unchanged.
      scale: alpha / rank.
    """
    own = {name: Adapted(base["blocks"][name], x["a"], scale * x["b"]) for name, x in adapters["blocks"].items()}
    return {**base, **adapters, "blocks": {**base["blocks"], **own}}


def merge(base: Params, adapters: Params, scale: float) -> Params:
    """The parameters of a plain policy for export: ``W + scale A B`` in the dtype of W."""
    own = {name: _merged(name, base["blocks"][name], x, scale) for name, x in adapters["blocks"].items()}
    return {**base, **adapters, "blocks": {**base["blocks"], **own}}


def _merged(name: str, weight: Array, adapter: Mapping[str, Array], scale: float) -> Array:
    a, b = adapter["a"], adapter["b"]
    layers, rank = weight.shape[0], a.shape[-1]
    if name in SIDE_BY_SIDE:
        update = jnp.einsum("lisr,lrsm->lism", a, b, precision="highest")
    else:
        a, b = a.reshape(layers, -1, rank), b.reshape(layers, rank, -1)
        update = jnp.einsum("lir,lro->lio", a, b, precision="highest").reshape(weight.shape)
    return (weight.astype(jnp.promote_types(weight.dtype, jnp.float32)) + scale * update).astype(weight.dtype)
