"""Where queries meet keys: plain attention, and the form that runs each prompt once for all of its completions."""

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

QUERIES_AT_ONCE = 1024  # in the attention of longer sequences
LONG = 1024  # keys from which on "auto" takes the fused form

log = logging.getLogger(__name__)


def prompt_mask(prompt_length: Array | None, rows: int, width: int) -> Array:
    """[rows, P] bool: real prompt tokens (left-padded)."""
    if prompt_length is None:
        return jnp.ones((rows, width), bool)
    return jnp.arange(width) >= width - prompt_length[:, None]


def narrowed(mask: Array, distance: Array, window: int | Array | None) -> Array:
    """``mask`` without what lies ``window`` positions back, or more. ``distance``: how far each key lies back."""
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
    """Attention of the last tokens of sequences to what is before them and to themselves: q [B, Tq, H, d], k, v
    [B, Tk, KV, d] -> [B, Tq, H, d].

    The last query is the last key. A query sees the keys of its own segment (``of_query`` [B, Tq], ``of_key``
    [B, Tk]) up to itself, within ``window`` (None = all). The form is ``config.attention``: "xla", "splash" (fused, on
    TPUs: `jaxpo.policy.splash`), or "auto".

    Args:
      mesh: over which rows and heads are spread; the fused form needs it, where there are several devices.

    Raises:
      ValueError: "splash" where it cannot run; the reason is given.
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

    Of long sequences the scores [B, H, Tq, Tk] of `QUERIES_AT_ONCE` queries are held at a time, and made again in the
    backward pass: 8192 tokens of 32 heads would be 8.6 GB a row.
    """
    width = q.shape[1]
    if width <= 2 * QUERIES_AT_ONCE:
        return _attention(config, q, k, v, mask)
    n = -(-width // QUERIES_AT_ONCE)
    size = -(-width // n)
    # Gradients of keys and values are sums over the parts: in float32, as one product would make them.
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
    """The library's attention has no soft-cap; with one, the scores are made here."""
    if config.attention_softcap is None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=config.attention_scale)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    score = jnp.einsum("bqgrd,bkgd->bgrqk", grouped, k, preferred_element_type=dtype) * config.attention_scale
    score = softcap(score, config.attention_softcap)
    # finite, as the library's is: a padding query sees nothing, and must not be NaN
    weight = jax.nn.softmax(jnp.where(mask[:, None, None], score, jnp.finfo(dtype).min / 2), -1)
    return jnp.einsum("bgrqk,bkgd->bqgrd", weight.astype(v.dtype), v).reshape(q.shape)


def prompt_attend(config: TransformerConfig, ok: Array, mesh: Mesh | None = None) -> Attend:
    """Attention of left-padded prompts to themselves; keeps keys and values. ``ok`` [G, P] marks real tokens."""

    def attend(q: Array, k: Array, v: Array, window: int | Array | None) -> tuple[Array, tuple[Array, Array]]:
        return causal_attention(config, q, k, v, ok, ok, window, mesh), (k, v)

    return attend


def joined(prompt: Array, own: Array, parts: int = 1) -> Array:
    """Prompts [G, P, ...] and their completions [G K, T, ...] as [G, P + K T, ...]: each prompt, and after it its K
    completions, one behind the other. With ``parts``, which divide P and T, that of the first P / parts and T / parts
    positions of each, then of the next: equal cuts of it hold equal shares of all."""
    (g, p), (b, t), rest = prompt.shape[:2], own.shape[:2], own.shape[2:]
    prompt = prompt.reshape(g, parts, p // parts, *rest)
    own = own.reshape(g, b // g, parts, t // parts, *rest).swapaxes(1, 2)
    own = own.reshape(g, parts, b // g * t // parts, *rest)
    return jnp.concatenate([prompt, own], 2).reshape(g, p + b // g * t, *rest)


def parted(x: Array, prompt_width: int, per_prompt: int, parts: int = 1) -> tuple[Array, Array]:
    """The prompts and the completions that `joined` put together."""
    (g, n), rest, first = x.shape[:2], x.shape[2:], prompt_width // parts
    t, x = (n - prompt_width) // per_prompt, x.reshape(g, parts, n // parts, *rest)
    own = x[:, :, first:].reshape(g, parts, per_prompt, t // parts, *rest).swapaxes(1, 2)
    return x[:, :, :first].reshape(g, prompt_width, *rest), own.reshape(g * per_prompt, t, *rest)


def shared_prompt_attend(
    config: TransformerConfig, per_prompt: int, width: int, prompt_ok: Array, mesh: Mesh | None = None
) -> Attend:
    """Attention over [G, P + K T] tokens, each prompt with its K = ``per_prompt`` completions of T = ``width`` tokens,
    as `joined` puts them together.

    A prompt attends to itself; a completion attends to the keys of its prompt, which were computed once for all K,
    and to itself. ``prompt_ok`` [G, P] marks real prompt tokens.

    Where the ``mesh`` spreads positions over C > 1 devices, each has the queries of its part of them, and gathers the
    keys and values of all: it receives ``(C - 1) / C`` of those of a layer, forward and again backward, where as many
    bytes of gradients are scattered. It multiplies 1 / C of the queries with all keys, those of the future
    included, so that all do the same work.
    """
    parts, prompt_width = 1 if mesh is None else mesh.shape[POSITIONS], prompt_ok.shape[1]
    real = prompt_ok.astype(jnp.int32)  # a segment; what is padding is another one
    around = mesh if parts == 1 else None  # over several parts, each device is on its own

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

    if config.remat == "none":  # else the block is: keys and values are gathered again for the gradient, not stored
        local = jax.checkpoint(local)
    lies, rows, whole = PartitionSpec(ROWS, POSITIONS, "tensor"), PartitionSpec(ROWS), PartitionSpec()
    spread = jax.shard_map(local, mesh=mesh, in_specs=(lies, lies, lies, rows, whole), out_specs=lies, check_vma=False)
    return lambda q, k, v, window: (spread(q, k, v, real, window), None)


def _up_to(
    part: int | Array, parts: int, cut: int, keys: Array, values: Array, segments: Array
) -> tuple[Array, Array, Array]:
    """What the queries of one of the ``parts`` of the last ``cut`` positions may see, for `causal_attention`, where the
    last query is the last key: [B, n, ...] turned around, the future first and in a segment of its own."""
    if parts == 1:
        return keys, values, segments
    future = (parts - 1 - part) * (cut // parts)
    keys, values, segments = (jnp.roll(x, future, 1) for x in (keys, values, segments))
    return keys, values, jnp.where(jnp.arange(segments.shape[1]) < future, -1, segments)
