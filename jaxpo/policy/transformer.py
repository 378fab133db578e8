"""Decoder-only transformer in flax.nnx: RMSNorm, rotary positions, grouped-query attention, gated MLP or experts, tied
or untied head. `TransformerConfig` chooses among the features of the model families.

The modules hold the mathematics. At the boundary they are split into a graph definition and a pure dict of arrays
(``init``), so the rest of the code sees functions of ``params``. The blocks are stacked: every block parameter has a
leading axis of layers.

One `Block` serves training, prefill and decoding. Attention is a function that the caller passes in (``attend``);
everything else works token by token.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from jaxpo.parallel import constrain
from jaxpo.parallel.offload import fetched
from jaxpo.policy import experts, lora
from jaxpo.policy.config import ACTIVATIONS, REMAT, TransformerConfig, of_layers

__all__ = ["Attend", "Model", "Params", "TransformerConfig", "build", "init", "parameter_count"]

Params = Any
# (q [..., H, d], k, v [..., KV, d], window of the layer) -> attention output [..., H, d], and anything that the caller
# wants to keep
Attend = Callable[[Array, Array, Array, int | Array | None], tuple[Array, Any]]


def rms_norm(x: Array, scale: Array, eps: float, *, plus_one: bool = False) -> Array:
    """``x / rms(x) * scale`` (``1 + scale`` with ``plus_one``) over the last axis, computed in float32."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    y, scale = x.astype(dtype), scale.astype(dtype)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    return (y * (1 + scale if plus_one else scale)).astype(x.dtype)


def softcap(x: Array, cap: float | None) -> Array:
    """``cap tanh(x / cap)``; ``x`` if there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rope(x: Array, positions: Array, frequency: Array) -> Array:
    """Rotary position embedding (arXiv:2104.09864), halves convention; x [..., H, d], positions [...]."""
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Block(nnx.Module):
    """One layer: attention and a gated MLP (or experts), each on a normalised residual stream."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        c, dtype = config, jnp.dtype(config.param_dtype)

        def matrix(fan_in: int, *shape: int, scale: float = 1.0) -> nnx.Param:
            return nnx.Param(
                (scale * jax.random.normal(rngs.params(), shape, jnp.float32) / jnp.sqrt(fan_in)).astype(dtype)
            )

        def zeros(*shape: int) -> nnx.Param:
            return nnx.Param(jnp.zeros(shape, dtype))

        norm = partial(unit_norm, config)
        each = () if c.experts is None else (c.experts,)
        out_scale = (2 * c.layers) ** -0.5  # the residual stream keeps its size whatever the depth (GPT-2)
        self.attn_norm, self.mlp_norm = norm(c.width), norm(c.width)
        self.wq = matrix(c.width, c.width, c.heads, c.head_dim)
        self.wk = matrix(c.width, c.width, c.kv_heads, c.head_dim)
        self.wv = matrix(c.width, c.width, c.kv_heads, c.head_dim)
        self.wo = matrix(c.heads * c.head_dim, c.heads, c.head_dim, c.width, scale=out_scale)
        if c.qkv_bias:
            self.bq, self.bk, self.bv = (zeros(n, c.head_dim) for n in (c.heads, c.kv_heads, c.kv_heads))
        if c.qk_norm:
            self.q_norm, self.k_norm = norm(c.head_dim), norm(c.head_dim)
        if c.post_norms:
            self.attn_post_norm, self.mlp_post_norm = norm(c.width), norm(c.width)
        if each:
            self.router = matrix(c.width, c.width, c.experts)
        self.w_in = matrix(c.width, *each, c.width, 2, c.mlp_width)  # gate and up side by side: one product, not two
        self.w_down = matrix(c.mlp_width, *each, c.mlp_width, c.width, scale=out_scale)
        self.config = config

    def __call__(
        self,
        x: Array,
        positions: Array,
        attend: Attend,
        *,
        window: int | Array | None,
        frequency: Array,
        mesh: Mesh | None = None,
    ) -> tuple[Array, Any]:
        """x [..., D], positions [...]; returns the new x, and what ``attend`` kept.

        Args:
          window, frequency [d/2]: arguments of the layer (`jaxpo.policy.config.of_layers`).
          mesh: experts are spread over it.
        """
        c = self.config
        h = self.norm(x, "attn_norm")
        q, k, v = (self.product(h, f"w{name}") for name in "qkv")
        if c.qkv_bias:
            q, k, v = (y + b[...].astype(x.dtype) for y, b in ((q, self.bq), (k, self.bk), (v, self.bv)))
        if c.qk_norm:
            q, k = self.norm(q, "q_norm"), self.norm(k, "k_norm")
        o, kept = attend(rope(q, positions, frequency), rope(k, positions, frequency), v, window)
        o = self.product(o, "wo", 2)
        x = x + (self.norm(o, "attn_post_norm") if c.post_norms else o)
        h = self.norm(x, "mlp_norm")
        y = self.mlp(h) if c.experts is None else self.mixture(h, mesh)
        return x + (self.norm(y, "mlp_post_norm") if c.post_norms else y), kept

    def norm(self, x: Array, name: str) -> Array:
        """The RMSNorm called ``name``."""
        return rms_norm(x, getattr(self, name)[...], self.config.norm_eps, plus_one=self.config.norm_plus_one)

    def product(self, x: Array, name: str, axes: int = 1) -> Array:
        """Multiply ``x`` with the matrix called ``name``, over the last ``axes`` axes of x. All products pass here."""
        return lora.product(x, getattr(self, name).get_value(), axes)

    def mlp(self, x: Array) -> Array:
        """``w_down (act(gate) * up)`` of x [..., D]."""
        gate_up = self.product(x, "w_in")
        return self.product(ACTIVATIONS[self.config.activation](gate_up[..., 0, :]) * gate_up[..., 1, :], "w_down")

    def mixture(self, x: Array, mesh: Mesh | None) -> Array:
        """``sum_e p_e mlp_e(x)`` over the ``experts_per_token`` experts of largest router probability p; x [..., D].
        See `jaxpo.policy.experts`."""
        weight, chosen = experts.route(self.config, self.product(x, "router"))
        w_in, w_down = (getattr(self, name)[...] for name in ("w_in", "w_down"))
        return experts.mixture(self.config, x, weight, chosen, w_in, w_down, mesh)


def unit_norm(config: TransformerConfig, size: int) -> nnx.Param:
    """The initial scale of a norm, which multiplies by 1."""
    return nnx.Param(jnp.full(size, 0.0 if config.norm_plus_one else 1.0, config.param_dtype))


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
        self.final_norm = unit_norm(config, config.width)
        if not config.tied:
            self.head = table(rngs.params())
        self.config = config


class Model(NamedTuple):
    """A transformer without its parameters: pure functions of ``params`` (a nested dict of arrays).

    config: shape and numerics.
    block: the graph definition of a `Block`.
    mesh: the mesh that experts are spread over; None = one device, or the partitioner decides.
    """

    config: TransformerConfig
    block: nnx.GraphDef
    mesh: Mesh | None = None

    def embed(self, params: Params, tokens: Array) -> Array:
        """[...] ids -> [..., D] in the computation's dtype."""
        x = params["embedding"][tokens].astype(self.config.dtype)
        return x * jnp.asarray(self.config.width**0.5, x.dtype) if self.config.embedding_scaled else x

    def layers(self, params: Params) -> tuple[Params, dict[str, Array]]:
        """The parameters of all blocks and their other arguments that differ, with a leading axis of layers."""
        return params["blocks"], of_layers(self.config)[1]

    def layer(self, params: Params, i: int) -> tuple[Params, dict[str, Array]]:
        """The entry of `layers` for block ``i``."""
        return jax.tree.map(lambda p: p[i], self.layers(params))

    def run_block(
        self, layer: tuple[Params, dict[str, Array]], x: Array, positions: Array, attend: Attend
    ) -> tuple[Array, Any]:
        """Run one block; ``layer`` comes from `layer`, or is a slice of `layers`. Parameters in the memory of the host
        are copied to the device here, so the device holds one layer at a time."""
        params, own = fetched(layer[0]), layer[1]
        own = {**of_layers(self.config)[0], **own, "mesh": self.mesh}
        return nnx.merge(self.block, nnx.State(params))(x, positions, attend, **own)

    def run_blocks(self, params: Params, x: Array, positions: Array, attend: Attend) -> tuple[Array, Any]:
        """Run all blocks in turn with the same ``attend``; the values that it keeps are stacked over layers."""
        run = partial(self.run_block, positions=positions, attend=attend)
        if self.config.remat != "none":
            run = jax.checkpoint(run, policy=REMAT[self.config.remat])
        if self.config.scan_layers:
            return jax.lax.scan(lambda x, layer: run(layer, x), x, self.layers(params))
        kept = []
        for i in range(self.config.layers):
            x, keep = run(self.layer(params, i), x)
            kept.append(keep)
        return x, jax.tree.map(lambda *k: jnp.stack(k), *kept)

    def final(self, params: Params, x: Array) -> Array:
        """Normalised hidden states, ready for the head."""
        return rms_norm(x, params["final_norm"], self.config.norm_eps, plus_one=self.config.norm_plus_one)

    def unembed(self, params: Params) -> Array:
        """[V, D] in the computation's dtype."""
        return (params["embedding"] if self.config.tied else params["head"]).astype(self.config.dtype)

    def logits(self, params: Params, hidden: Array) -> Array:
        """[..., D] -> [..., V], soft-capped, accumulated in float32 (at least)."""
        dtype = jnp.promote_types(hidden.dtype, jnp.float32)
        z = jax.lax.dot_general(
            hidden, self.unembed(params), (((hidden.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype
        )
        return softcap(z, self.config.final_softcap)


def embedded(model: Model, params: Params, tokens: Array, mesh: Mesh | None = None) -> Array:
    """`Model.embed` on a ``mesh``, from a table whose feature axis is gathered first. With a table cut by fsdp and
    tensor, the partitioner would hold the embeddings of all rows on every device."""
    if mesh is None:
        return model.embed(params, tokens)
    table = params["embedding"]
    vocabulary = "tensor" if table.shape[0] % mesh.shape["tensor"] == 0 else None
    return model.embed({"embedding": constrain(table, mesh, vocabulary)}, tokens)


def build(config: TransformerConfig, mesh: Mesh | None = None) -> Model:
    """The pure functions of a transformer of this shape; its parameters are spread over the ``mesh``."""
    block = nnx.eval_shape(lambda: Block(config, nnx.Rngs(params=0)))
    return Model(config, nnx.split(block)[0], mesh)


def init(config: TransformerConfig, key: Array) -> Params:
    """Random parameters: a nested dict of arrays, blocks stacked along a leading axis of layers."""
    model = Transformer(config, nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[1])


def parameter_count(params: Params) -> int:
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(params))
