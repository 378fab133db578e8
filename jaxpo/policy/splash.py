"""Fused attention on TPUs: the library's splash attention, which keeps the scores in the chip's own memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as library
from jax.sharding import Mesh, PartitionSpec

from jaxpo.kernels.chips import on_one_device, target_platform
from jaxpo.parallel import ROWS, batch_shards
from jaxpo.policy.config import EVERYWHERE, TransformerConfig

LANES = 128  # sizes of blocks are multiples of this
BLOCK = 512  # queries, and keys, of a block of scores


def why_not(q: Array, mesh: Mesh | None) -> str | None:
    """The reason why splash attention cannot run for such queries; None = it can."""
    if target_platform() != "tpu":
        return f"it runs on TPUs, not on {target_platform()}"
    if jnp.dtype(q.dtype).itemsize > 4:
        return f"it computes in float32, not in {q.dtype}"
    if mesh is None and not on_one_device():
        return "it takes the mesh that the arrays are spread over, which the caller did not give"
    return None


def attention(
    config: TransformerConfig,
    q: Array,
    k: Array,
    v: Array,
    of_query: Array,
    of_key: Array,
    window: int | Array | None,
    mesh: Mesh | None = None,
    *,
    interpret: bool = False,
) -> Array:
    """q [B, Tq, H, d], k, v [B, Tk, KV, d] -> [B, Tq, H, d]: like `jaxpo.policy.attention.causal_attention`, which
    explains the arguments. Queries are padded at the end and keys at both ends, to multiples of the blocks.

    On a ``mesh`` each device has its rows (the axes ``ROWS``) and heads (axis ``tensor``).

    Raises:
      ValueError: the axis ``tensor`` does not divide the heads.
    """
    b, tq, heads, _ = q.shape
    kv = k.shape[2]
    queries = padded(tq)[1]
    behind = queries - tq
    keys = padded(k.shape[1] + behind)[1]
    before = keys - k.shape[1] - behind
    q = jnp.pad(q * config.attention_scale, ((0, 0), (0, behind), (0, 0), (0, 0))).swapaxes(1, 2)
    k, v = (jnp.pad(x, ((0, 0), (before, behind), (0, 0), (0, 0))).swapaxes(1, 2) for x in (k, v))
    of_query = jnp.pad(of_query, ((0, 0), (0, behind))).astype(jnp.int32)
    of_key = jnp.pad(of_key, ((0, 0), (before, behind))).astype(jnp.int32)
    tensor = 1 if mesh is None else mesh.shape["tensor"]

    def local(window: int | None, *arrays: Array) -> Array:
        run = kernel(heads // tensor, queries, keys, window, config.attention_softcap, interpret)
        return jax.vmap(lambda q, k, v, a, b: run(q, k, v, library.SegmentIds(a, b)))(*arrays)

    def spread(window: int | None) -> Array:
        arrays = q, k, v, of_query, of_key
        if mesh is None or mesh.size == 1:
            return local(window, *arrays)
        rows = ROWS if b % batch_shards(mesh) == 0 else None  # else each device computes all rows
        of_heads, of_rows = PartitionSpec(rows, "tensor"), PartitionSpec(rows)
        specs = (of_heads, of_heads, of_heads, of_rows, of_rows)
        f = jax.shard_map(
            lambda *arrays: local(window, *arrays), mesh=mesh, in_specs=specs, out_specs=of_heads, check_vma=False
        )
        return f(*arrays)

    if heads % tensor or kv % tensor:
        raise ValueError(f"mesh.tensor {tensor} must divide policy.heads {heads} and policy.kv_heads {kv}")
    if isinstance(window, Array):  # a scanned layer's window: it is EVERYWHERE or config.window
        out = jax.lax.cond(window == EVERYWHERE, lambda: spread(None), lambda: spread(config.window))
    else:
        out = spread(window)
    return out.swapaxes(1, 2)[:, :tq]


def padded(length: int) -> tuple[int, int]:
    """(size of a block, ``length`` rounded up to a whole number of them)."""
    block = min(BLOCK, -(-length // LANES) * LANES)
    return block, -(-length // block) * block


def kernel(
    heads: int, queries: int, keys: int, window: int | None, softcap: float | None, interpret: bool
) -> Callable[..., Array]:
    """The kernel of causal attention for the last ``queries`` of ``keys`` positions. It skips fully masked blocks."""
    shape, offset = (queries, keys), keys - queries
    if window is None or window >= keys:
        mask = library.CausalMask(shape, offset)
    else:
        mask = library.LocalMask(shape, (window - 1, 0), offset)
    q, k = padded(queries)[0], padded(keys)[0]
    blocks = library.BlockSizes(
        *(q, k, k), block_q_dkv=q, block_kv_dkv=k, block_kv_dkv_compute=k, block_q_dq=q, block_kv_dq=k
    )
    return library.make_splash_mha(
        library.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
