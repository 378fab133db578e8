"""Decoder-only transformer in flax.nnx: RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied or untied
head.

The modules hold the mathematics; at the boundary they are split into a graph definition and a pure dict of arrays
(``init``), so everything above
sees functions of ``params``. The blocks are stacked: every block parameter has a leading axis of layers.

One `Block` serves training, prefill and decoding: *how* queries meet keys is a function passed in (``attend``),
everything else is per token.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxpo.registry import unknown

Params = Any
# (layer inputs q [..., H, d], k, v [..., KV, d]) -> attention output [..., H, d] and whatever the caller wants to keep
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


# What the backward pass finds stored of a block: everything, the products with parameters, or only the block's input.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and numerics of the policy.

    head_dim: width // heads when None. dtype: of the computation; log-probs are float32 in any case. param_dtype:
      of the stored parameters.
    scan_layers: one compiled block, scanned (short compile time), instead of one per layer. remat: what of a block is
    recomputed in the backward pass: "none", "dots" (all but the products with parameters), or "full".
    """

    vocab_size: int
    width: int = 64
    layers: int = 3
    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int | None = None
    tied: bool = True
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"

    def __post_init__(self):
        set_ = partial(object.__setattr__, self)
        set_("kv_heads", self.heads if self.kv_heads is None else self.kv_heads)
        set_("head_dim", self.width // max(self.heads, 1) if self.head_dim is None else self.head_dim)
        set_("mlp_width", round(8 / 3 * self.width / 8) * 8 if self.mlp_width is None else self.mlp_width)
        for field in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_width"):
            if getattr(self, field) < 1:
                raise ValueError(f"policy.{field} must be at least 1, not {getattr(self, field)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"policy.kv_heads {self.kv_heads} does not divide policy.heads {self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"policy.head_dim {self.head_dim} must be even for rotary positions")
        if self.remat not in REMAT:
            raise ValueError(unknown("policy.remat", self.remat, REMAT))
        for field in ("dtype", "param_dtype"):
            if getattr(self, field) not in ("float32", "bfloat16", "float64"):
                raise ValueError(f"policy.{field} must be float32 or bfloat16, not {getattr(self, field)!r}")


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """``x / rms(x) * scale`` over the last axis, computed in float32."""
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)


def rope(x: Array, positions: Array, theta: float) -> Array:
    """Rotary position embedding (arXiv:2104.09864), halves convention. x [..., H, d], positions [...]."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Block(nnx.Module):
    """One layer: attention and a gated MLP, each on a normalised residual stream."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        c, dtype = config, jnp.dtype(config.param_dtype)

        def matrix(fan_in: int, *shape: int, scale: float = 1.0) -> nnx.Param:
            return nnx.Param(
                (scale * jax.random.normal(rngs.params(), shape, jnp.float32) / jnp.sqrt(fan_in)).astype(dtype)
            )

        out_scale = (2 * c.layers) ** -0.5  # the residual stream keeps its size whatever the depth (GPT-2)
        self.attn_norm = nnx.Param(jnp.ones(c.width, dtype))
        self.wq = matrix(c.width, c.width, c.heads, c.head_dim)
        self.wk = matrix(c.width, c.width, c.kv_heads, c.head_dim)
        self.wv = matrix(c.width, c.width, c.kv_heads, c.head_dim)
        self.wo = matrix(c.heads * c.head_dim, c.heads, c.head_dim, c.width, scale=out_scale)
        self.mlp_norm = nnx.Param(jnp.ones(c.width, dtype))
        self.w_in = matrix(c.width, c.width, 2, c.mlp_width)  # gate and up side by side: one product in place of two
        self.w_down = matrix(c.mlp_width, c.mlp_width, c.width, scale=out_scale)
        self.config = config

    def __call__(self, x: Array, positions: Array, attend: Attend) -> tuple[Array, Any]:
        """x [..., D], positions [...]; returns the new x and what ``attend`` kept."""
        c, dtype = self.config, x.dtype

        def project(y: Array, w: nnx.Param) -> Array:
            return jnp.tensordot(y, w[...].astype(dtype), 1)

        h = rms_norm(x, self.attn_norm[...], c.norm_eps)
        q, k = rope(project(h, self.wq), positions, c.rope_theta), rope(project(h, self.wk), positions, c.rope_theta)
        o, kept = attend(q, k, project(h, self.wv))
        x = x + jnp.tensordot(o, self.wo[...].astype(dtype), 2)
        h = rms_norm(x, self.mlp_norm[...], c.norm_eps)
        gate_up = project(h, self.w_in)
        return x + project(jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :], self.w_down), kept


class Transformer(nnx.Module):
    """Embedding, stacked blocks, final norm, head. ``embedding`` is [V, D]; an untied ``head`` has the same layout."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.param_dtype)

        def table(key: Array) -> nnx.Param:
            return nnx.Param(
                (jax.random.normal(key, (config.vocab_size, config.width), jnp.float32) * 0.02).astype(dtype)
            )

        self.embedding = table(rngs.params())
        keys = jax.random.split(rngs.params(), config.layers)
        self.blocks = nnx.vmap(lambda key: Block(config, nnx.Rngs(params=key)))(keys)
        self.final_norm = nnx.Param(jnp.ones(config.width, dtype))
        if not config.tied:
            self.head = table(rngs.params())
        self.config = config


class Model(NamedTuple):
    """A transformer without its parameters: pure functions of ``params`` (a nested dict of arrays)."""

    config: TransformerConfig
    block: nnx.GraphDef

    def embed(self, params: Params, tokens: Array) -> Array:
        """[...] ids -> [..., D] in the computation's dtype."""
        return params["embedding"][tokens].astype(self.config.dtype)

    def run_block(self, layer: Params, x: Array, positions: Array, attend: Attend) -> tuple[Array, Any]:
        """One block with the parameters of one layer."""
        return nnx.merge(self.block, nnx.State(layer))(x, positions, attend)

    def run_blocks(self, params: Params, x: Array, positions: Array, attend: Attend) -> tuple[Array, Any]:
        """All blocks in turn, with the same ``attend``; what it keeps is stacked over layers."""
        run = partial(self.run_block, positions=positions, attend=attend)
        if self.config.remat != "none":
            run = jax.checkpoint(run, policy=REMAT[self.config.remat])
        if self.config.scan_layers:
            return jax.lax.scan(lambda x, layer: run(layer, x), x, params["blocks"])
        kept = []
        for i in range(self.config.layers):
            x, keep = run(self.layer(params, i), x)
            kept.append(keep)
        return x, jax.tree.map(lambda *k: jnp.stack(k), *kept)

    def layer(self, params: Params, i: int) -> Params:
        """The parameters of block ``i``."""
        return jax.tree.map(lambda p: p[i], params["blocks"])

    def final(self, params: Params, x: Array) -> Array:
        """Normalised hidden states, ready for the head."""
        return rms_norm(x, params["final_norm"], self.config.norm_eps)

    def unembed(self, params: Params) -> Array:
        """[V, D] in the computation's dtype."""
        return (params["embedding"] if self.config.tied else params["head"]).astype(self.config.dtype)

    def logits(self, params: Params, hidden: Array) -> Array:
        """[..., D] -> [..., V], accumulated in float32 (at least)."""
        dtype = jnp.promote_types(hidden.dtype, jnp.float32)
        return jax.lax.dot_general(
            hidden, self.unembed(params), (((hidden.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype
        )


def build(config: TransformerConfig) -> Model:
    """The pure functions of a transformer of this shape."""
    block = nnx.eval_shape(lambda: Block(config, nnx.Rngs(params=0)))
    return Model(config, nnx.split(block)[0])


def init(config: TransformerConfig, key: Array) -> Params:
    """Random parameters: a nested dict of arrays, blocks stacked along a leading axis of layers."""
    model = Transformer(config, nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[1])


def parameter_count(params: Params) -> int:
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(params))
