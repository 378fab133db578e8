"""A mixture of experts: each token goes through the few MLPs that a router chose for it.

The result is exact: experts have no capacity limit, no token is dropped, and every shape is static. Tokens are sorted
by expert, and each expert's run of rows is multiplied by its own matrices (`jax.lax.ragged_dot`). This costs
``experts_per_token`` MLPs a token if the platform has a grouped product (TPU). Elsewhere, also on CPUs, XLA multiplies
every row with every expert.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jaxpo.parallel import POSITIONS, TOKENS, batch_shards, by_row, by_token
from jaxpo.policy.config import ACTIVATIONS, TransformerConfig

TOKENS_AT_ONCE = 8192  # a device holds the copies of this many tokens at a time, one copy for each chosen expert


def route(config: TransformerConfig, scores: Array) -> tuple[Array, Array]:
    """Choose the k experts of largest probability from the router's scores [..., E]: their weights [..., k], in float32
    at least, and their indices [..., k]."""
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
    """Whether x [B, T, D] is spread by rows and positions, as in training."""
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
    """[N, D] sum of the outputs of the experts whose matrices are given; the first of them is expert ``first``."""
    (n, k), count, dtype = chosen.shape, w_in.shape[0], x.dtype
    expert = chosen.reshape(-1) - first
    some = count < config.experts
    if some:  # the rows of the other experts come last, in a run that is multiplied with no matrix
        expert = jnp.where((expert >= 0) & (expert < count), expert, count)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=count + 1)[:count]

    def own(rows: Array) -> Array:  # a grouped product leaves rows of no group undefined
        return jnp.where((jnp.arange(n * k) < sizes.sum())[:, None], rows, 0) if some else rows

    w_in, w_down = w_in.astype(dtype).reshape(count, w_in.shape[1], -1), w_down.astype(dtype)
    gate, up = jnp.split(own(jax.lax.ragged_dot(own(x[order // k]), w_in, sizes)), 2, -1)
    out = own(jax.lax.ragged_dot(ACTIVATIONS[config.activation](gate) * up, w_down, sizes))
    out = out * weight.reshape(-1)[order, None].astype(dtype)
    return jnp.zeros_like(x).at[order // k].add(out)


def over_mesh(
    config: TransformerConfig, mesh: Mesh, x: Array, weight: Array, chosen: Array, w_in: Array, w_down: Array
) -> Array:
    """`of_experts` on a mesh: tokens are spread over data, fsdp, expert and context, experts over expert, and matrices
    are cut by fsdp and tensor.

    The X devices along expert gather their tokens, each computes its own E / X experts, and the sums are scattered
    back; matrices are gathered over fsdp. The cost for n tokens a device, forward, and as much again backward:

    * a device receives ``2 (X - 1) n D`` numbers, and the parts of the matrices on other devices of fsdp. To send each
      token to its k experts and back would take ``k / X`` times as many numbers, if no two of them shared a device;
    * a device multiplies the rows that chose its experts: ``n k`` MLPs if the router is balanced, ``X n k`` at worst,
      when all tokens of the group go to one device (the others wait);
    * a device holds ``k`` copies of each of `TOKENS_AT_ONCE` tokens, even of those that chose other devices' experts;
      with more tokens the backward pass makes the copies again.
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
    """`of_experts` for many tokens, in parts that the backward pass recomputes."""
    n = x.shape[0]
    count = -(-n // TOKENS_AT_ONCE)
    if count == 1:
        return of_experts(config, x, weight, chosen, w_in, w_down, first)
    fill = ((0, -n % count), (0, 0))
    cut = [jnp.pad(y, fill).reshape(count, -(-n // count), -1) for y in (x, weight, chosen)]
    # Gradients of matrices are sums over the parts: add them in float32, as a single product would.
    wide = [w.astype(jnp.promote_types(w.dtype, jnp.float32)) for w in (w_in, w_down)]

    @jax.checkpoint
    def of_part(part: list[Array]) -> Array:
        return of_experts(config, *part, *(w.astype(x.dtype) for w in wide), first)

    return jax.lax.map(of_part, cut).reshape(-1, x.shape[1])[:n]
