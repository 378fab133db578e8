"""Attention: the plain form, and the form that runs each prompt only once for all of its completions."""

import importlib
import logging

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jaxpo.kernels.chips import target_platform
from jaxpo.parallel import POSITIONS, ROWS
from jaxpo.policy.config import TransformerConfig
from jaxpo.policy.transformer import Attend, softcap

QUERIES_AT_ONCE = 1024  # queries of a long sequence whose scores are held at a time
LONG = 1024  # "auto" takes the fused form from this many keys

log = logging.getLogger(__name__)


def prompt_mask(prompt_length: Array | None, rows: int, width: int) -> Array:
    """[rows, P] bool: real prompt tokens (left-padded)."""
    if prompt_length is None:
        return jnp.ones((rows, width), bool)
    return jnp.arange(width) >= width - prompt_length[:, None]


def narrowed(mask: Array, distance: Array, window: int | Array | None) -> Array:
    """``mask`` without the keys that lie ``window`` or more positions back; ``distance`` says how far back each is."""
    return mask if window is None else mask & (distance < window)


def causal_attention(
    config: TransformerConfig,
    q: Array,
    k: Array,
    v: Array,
    of_query: Array,
    of_key: Array,
    window: int | Array | None,
    mesh: Mesh | None = None,
) -> Array:
    """Causal attention of the last tokens of sequences: q [B, Tq, H, d], k, v [B, Tk, KV, d] -> [B, Tq, H, d].

    The last query belongs to the same token as the last key. A query sees the keys of its own segment (``of_query``
    [B, Tq], ``of_key`` [B, Tk]) up to its own position, within ``window`` (None = all). ``config.attention`` chooses
    the form: "xla", "splash" (fused, on TPUs: `jaxpo.policy.splash`), or "auto".

    Args:
      mesh: rows and heads are spread over it; the fused form needs it if there are several devices.

    Raises:
      ValueError: "splash" is asked for and cannot run; the reason is given.
    """
    if config.attention != "xla" and (config.attention == "splash" or target_platform() == "tpu"):
        splash = importlib.import_module("jaxpo.policy.splash")  # Pallas takes a second to import
        reason = splash.why_not(q, mesh)
        if reason and config.attention == "splash":
            raise ValueError(f"policy.attention='splash' cannot be used: {reason}; set it to 'auto' or 'xla'")
        if not reason and (config.attention == "splash" or k.shape[1] >= LONG):
            return splash.attention(config, q, k, v, of_query, of_key, window, mesh)
        log.info("attention: xla in place of splash: %s", reason or f"only {k.shape[1]} keys")
    at = jnp.arange(k.shape[1])
    distance = at[k.shape[1] - q.shape[1] :, None] - at
    mask = (distance >= 0) & (of_query[:, :, None] == of_key[:, None])
    return attention(config, q, k, v, narrowed(mask, distance, window))


def attention(config: TransformerConfig, q: Array, k: Array, v: Array, mask: Array) -> Array:
    """q [B, Tq, H, d], k, v [B, Tk, KV, d], mask [B, Tq, Tk] bool -> [B, Tq, H, d].

    For long sequences only the scores [B, H, Tq, Tk] of `QUERIES_AT_ONCE` queries are held at a time, and the backward
    pass recomputes them: at 8192 tokens and 32 heads all scores would take 8.6 GB a row.
    """
    width = q.shape[1]
    if width <= 2 * QUERIES_AT_ONCE:
        return _attention(config, q, k, v, mask)
    n = -(-width // QUERIES_AT_ONCE)
    size = -(-width // n)
    # Gradients of keys and values are sums over the parts: add them in float32, as a single product would.
    wide = jnp.promote_types(k.dtype, jnp.float32)
    k_wide, v_wide = k.astype(wide), v.astype(wide)

    def parts(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, n * size - width)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], n, size, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def of_part(part: tuple[Array, Array]) -> Array:
        return _attention(config, part[0], k_wide.astype(k.dtype), v_wide.astype(v.dtype), part[1])

    out = jax.lax.map(of_part, (parts(q), parts(mask)))
    return out.swapaxes(0, 1).reshape(q.shape[0], n * size, *q.shape[2:])[:, :width]


def _attention(config: TransformerConfig, q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Attention in one part. The library's attention has no soft-cap; with a soft-cap the scores are computed here."""
    if config.attention_softcap is None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=config.attention_scale)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    score = jnp.einsum("bqgrd,bkgd->bgrqk", grouped, k, preferred_element_type=dtype) * config.attention_scale
    score = softcap(score, config.attention_softcap)
    # Finite, as in the library: a padding query sees no key, and must not give NaN.
    weight = jax.nn.softmax(jnp.where(mask[:, None, None], score, jnp.finfo(dtype).min / 2), -1)
    return jnp.einsum("bgrqk,bkgd->bqgrd", weight.astype(v.dtype), v).reshape(q.shape)


def prompt_attend(config: TransformerConfig, ok: Array, mesh: Mesh | None = None) -> Attend:
    """Attention of left-padded prompts to themselves. It keeps keys and values. ``ok`` [G, P] marks real tokens."""

    def attend(q: Array, k: Array, v: Array, window: int | Array | None) -> tuple[Array, tuple[Array, Array]]:
        return causal_attention(config, q, k, v, ok, ok, window, mesh), (k, v)

    return attend


def joined(prompt: Array, own: Array, parts: int = 1) -> Array:
    """Join prompts [G, P, ...] and their completions [G K, T, ...] to [G, P + K T, ...]: each prompt, followed by its K
    completions.

    With ``parts``, which must divide P and T, the first P / parts positions of the prompt and the first T / parts
    positions of each completion come first, then the next ones, and so on. If the result is cut into ``parts`` equal
    pieces, each piece has an equal share of the prompt and of each completion."""
    (g, p), (b, t), rest = prompt.shape[:2], own.shape[:2], own.shape[2:]
    prompt = prompt.reshape(g, parts, p // parts, *rest)
    own = own.reshape(g, b // g, parts, t // parts, *rest).swapaxes(1, 2)
    own = own.reshape(g, parts, b // g * t // parts, *rest)
    return jnp.concatenate([prompt, own], 2).reshape(g, p + b // g * t, *rest)


def parted(x: Array, prompt_width: int, per_prompt: int, parts: int = 1) -> tuple[Array, Array]:
    """The inverse of `joined`: the prompts and the completions."""
    (g, n), rest, first = x.shape[:2], x.shape[2:], prompt_width // parts
    t, x = (n - prompt_width) // per_prompt, x.reshape(g, parts, n // parts, *rest)
    own = x[:, :, first:].reshape(g, parts, per_prompt, t // parts, *rest).swapaxes(1, 2)
    return x[:, :, :first].reshape(g, prompt_width, *rest), own.reshape(g * per_prompt, t, *rest)


def shared_prompt_attend(
    config: TransformerConfig, per_prompt: int, width: int, prompt_ok: Array, mesh: Mesh | None = None
) -> Attend:
    """Attention over [G, P + K T] tokens: each prompt with its K = ``per_prompt`` completions of T = ``width`` tokens,
    in the order of `joined`.

    A prompt attends to itself; a completion attends to the keys of its prompt, which were computed once for all K,
    and to itself. ``prompt_ok`` [G, P] marks real prompt tokens.

    If the ``mesh`` spreads positions over C > 1 devices, each device has the queries of its part of the positions, and
    gathers the keys and values of all positions. In the forward pass it receives ``(C - 1) / C`` of a layer's keys and
    values, and the same again in the backward pass, which also scatters as many bytes of gradients. Each device
    multiplies 1 / C of the queries with all keys, future keys included, so that all devices do the same work.
    """
    parts, prompt_width = 1 if mesh is None else mesh.shape[POSITIONS], prompt_ok.shape[1]
    real = prompt_ok.astype(jnp.int32)  # real tokens are one segment, padding is another
    around = mesh if parts == 1 else None  # with several parts, the code below runs inside a shard_map

    def of_part(q: Array, k: Array, v: Array, real: Array, window: int | Array | None, part: int | Array = 0) -> Array:
        qp, qc = parted(q, prompt_width // parts, per_prompt)
        (kp, kc), (vp, vc) = (parted(x, prompt_width, per_prompt, parts) for x in (k, v))
        mine = jax.lax.dynamic_slice_in_dim(real, part * qp.shape[1], qp.shape[1], 1)
        before = _up_to(part, parts, prompt_width, kp, vp, real)
        of_prompt = causal_attention(config, qp, *before[:2], mine, before[2], window, around)
        if width == 0:
            return of_prompt
        keys, values, ok = (
            jnp.concatenate([jnp.repeat(prompt, per_prompt, 0), own], 1)
            for prompt, own in ((kp, kc), (vp, vc), (real, jnp.ones(kc.shape[:2], real.dtype)))
        )
        before = _up_to(part, parts, width, keys, values, ok)
        mine = jnp.ones(qc.shape[:2], real.dtype)
        return joined(of_prompt, causal_attention(config, qc, *before[:2], mine, before[2], window, around))

    if parts == 1:
        return lambda q, k, v, window: (of_part(q, k, v, real, window), None)

    def local(q: Array, k: Array, v: Array, real: Array, window: int | Array | None) -> Array:
        k, v = (jax.lax.all_gather(x, POSITIONS, axis=1, tiled=True) for x in (k, v))
        return of_part(q, k, v, real, window, jax.lax.axis_index(POSITIONS))

    if config.remat == "none":  # gather keys and values again for the gradient; else the block's checkpoint does it
        local = jax.checkpoint(local)
    lies, rows, whole = PartitionSpec(ROWS, POSITIONS, "tensor"), PartitionSpec(ROWS), PartitionSpec()
    spread = jax.shard_map(local, mesh=mesh, in_specs=(lies, lies, lies, rows, whole), out_specs=lies, check_vma=False)
    return lambda q, k, v, window: (spread(q, k, v, real, window), None)


def _up_to(
    part: int | Array, parts: int, cut: int, keys: Array, values: Array, segments: Array
) -> tuple[Array, Array, Array]:
    """Arrange keys, values and segments [B, n, ...] for the queries of one of the ``parts`` of the last ``cut``
    positions. `causal_attention` wants the last query to be the last key, so the future positions are rolled to the
    front, into a segment of their own that no query sees."""
    if parts == 1:
        return keys, values, segments
    future = (parts - 1 - part) * (cut // parts)
    keys, values, segments = (jnp.roll(x, future, 1) for x in (keys, values, segments))
    return keys, values, jnp.where(jnp.arange(segments.shape[1]) < future, -1, segments)
