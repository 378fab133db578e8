"""A mixture of experts: each token goes through the few MLPs that a router chose for it.

Exact: no expert has a capacity, no token is dropped, and every shape is static. Tokens are sorted by expert, and each
expert's run of rows is multiplied by its own matrices (`jax.lax.ragged_dot`): ``experts_per_token`` MLPs a token where
the platform has a grouped product (TPU); elsewhere, CPU among them, XLA multiplies every row with every expert.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jaxpo.parallel import POSITIONS, TOKENS, batch_shards, by_row, by_token
from jaxpo.policy.config import ACTIVATIONS, TransformerConfig

TOKENS_AT_ONCE = 8192  # whose copies, one for each expert chosen, a device holds


def route(config: TransformerConfig, scores: Array) -> tuple[Array, Array]:
    """From the router's scores [..., E]: weights [..., k], in float32 at least, and indices [..., k] of the experts of
    largest probability."""
    probs = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), -1)
    weight, chosen = jax.lax.top_k(probs, config.experts_per_token)
    return weight / weight.sum(-1, keepdims=True) if config.norm_topk else weight, chosen


def mixture(
    config: TransformerConfig, x: Array, weight: Array, chosen: Array, w_in: Array, w_down: Array, mesh: Mesh | None
) -> Array:
    """``sum_j weight_j mlp_(chosen_j)(x)``; x [..., D], weight and chosen [..., k], w_in [E, D, 2, M], w_down
    [E, M, D]. With a ``mesh``: `over_mesh`."""
    flat = partial(by_token, mesh=mesh) if _in_order(x, mesh) else lambda y: y.reshape(-1, y.shape[-1])
    tokens = flat(x), flat(weight), flat(chosen)
    if mesh is None:
        return of_experts(config, *tokens, w_in, w_down).reshape(x.shape)
    out = over_mesh(config, mesh, *tokens, w_in, w_down)
    return by_row(out, x.shape[0], mesh) if _in_order(x, mesh) else out.reshape(x.shape)


def _in_order(x: Array, mesh: Mesh | None) -> bool:
    """Whether x [B, T, D] lies by rows and positions, as when a policy is trained."""
    if mesh is None or x.ndim != 3:
        return False
    return x.shape[0] % batch_shards(mesh) == 0 and x.shape[1] % mesh.shape[POSITIONS] == 0


def of_experts(
    config: TransformerConfig,
    x: Array,
    weight: Array,
    chosen: Array,
    w_in: Array,
    w_down: Array,
    first: int | Array = 0,
) -> Array:
    """What the experts from ``first`` on, as many as there are matrices, add to x [N, D]; the others add nothing."""
    (n, k), count, dtype = chosen.shape, w_in.shape[0], x.dtype
    expert = chosen.reshape(-1) - first
    some = count < config.experts
    if some:  # the rows of the others are a last run, that no matrix is multiplied with
        expert = jnp.where((expert >= 0) & (expert < count), expert, count)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=count + 1)[:count]

    def own(rows: Array) -> Array:  # what a product leaves in rows of no group is not said
        return jnp.where((jnp.arange(n * k) < sizes.sum())[:, None], rows, 0) if some else rows

    w_in, w_down = w_in.astype(dtype).reshape(count, w_in.shape[1], -1), w_down.astype(dtype)
    gate, up = jnp.split(own(jax.lax.ragged_dot(own(x[order // k]), w_in, sizes)), 2, -1)
    out = own(jax.lax.ragged_dot(ACTIVATIONS[config.activation](gate) * up, w_down, sizes))
    out = out * weight.reshape(-1)[order, None].astype(dtype)
    return jnp.zeros_like(x).at[order // k].add(out)


def over_mesh(
    config: TransformerConfig, mesh: Mesh, x: Array, weight: Array, chosen: Array, w_in: Array, w_down: Array
) -> Array:
    """`of_experts` with tokens spread over data, fsdp, expert and context, experts over expert, and matrices cut by
    fsdp and tensor.

    The X devices along expert gather their tokens, each computes its own E / X experts, and the sums are scattered
    back; matrices are gathered over fsdp. With n tokens a device, forward, and as much again backward:

    * received by a device: ``2 (X - 1) n D`` numbers, ``X / k`` times what sending each token to its k experts and
      back would take if no two of them shared a device; and the matrices' parts on other devices of fsdp;
    * products: those of the rows that chose its experts, ``n k`` MLPs if the router is balanced, ``X n k`` at worst,
      when all tokens of the group go to one device (the others wait);
    * memory: copies of `TOKENS_AT_ONCE` tokens, ``k`` of each, whomever they are for; with more tokens they are made
      anew in the backward pass.
    """
    ways = jax.lax.psum_scatter, jax.lax.all_gather
    scatter, gather = (partial(f, axis_name="expert", tiled=True) for f in ways)

    def local(x: Array, weight: Array, chosen: Array, w_in: Array, w_down: Array) -> Array:
        w_in = jax.lax.all_gather(w_in.astype(x.dtype), "fsdp", axis=1, tiled=True)
        w_down = jax.lax.all_gather(w_down.astype(x.dtype), "fsdp", axis=2, tiled=True)
        first = jax.lax.axis_index("expert") * w_in.shape[0]
        out = in_parts(config, gather(x), gather(weight), gather(chosen), w_in, w_down, first)
        return jax.lax.psum(scatter(out), "tensor")

    n, tokens = x.shape[0], PartitionSpec(TOKENS)
    shards = mesh.size // mesh.shape["tensor"]
    fill = ((0, -n % shards), (0, 0))
    matrices = PartitionSpec("expert", "fsdp", None, "tensor"), PartitionSpec("expert", "tensor", "fsdp")
    spread = jax.shard_map(local, mesh=mesh, in_specs=(tokens, tokens, tokens, *matrices), out_specs=tokens)
    return spread(*(jnp.pad(y, fill) for y in (x, weight, chosen)), w_in, w_down)[:n]


def in_parts(
    config: TransformerConfig, x: Array, weight: Array, chosen: Array, w_in: Array, w_down: Array, first: Array
) -> Array:
    """`of_experts`, of many tokens some at a time: made again in the backward pass."""
    n = x.shape[0]
    count = -(-n // TOKENS_AT_ONCE)
    if count == 1:
        return of_experts(config, x, weight, chosen, w_in, w_down, first)
    fill = ((0, -n % count), (0, 0))
    cut = [jnp.pad(y, fill).reshape(count, -(-n // count), -1) for y in (x, weight, chosen)]
    # Gradients of matrices are sums over the parts: in float32, as one product would make them.
    wide = [w.astype(jnp.promote_types(w.dtype, jnp.float32)) for w in (w_in, w_down)]

    @jax.checkpoint
    def of_part(part: list[Array]) -> Array:
        return of_experts(config, *part, *(w.astype(x.dtype) for w in wide), first)

    return jax.lax.map(of_part, cut).reshape(-1, x.shape[1])[:n]
