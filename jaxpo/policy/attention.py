"""Where queries meet keys: plain attention, and the form that runs each prompt once for all of its completions."""

import importlib
import logging
from collections.abc import Callable

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

    Over several parts of a ``mesh``'s axis of positions: `_attend_over_positions`.
    """
    if mesh is not None and mesh.shape[POSITIONS] > 1:
        return _attend_over_positions(config, per_prompt, width, prompt_ok, mesh)
    prompt_width, of_prompts = prompt_ok.shape[1], prompt_attend(config, prompt_ok, mesh)
    own = jnp.ones((prompt_ok.shape[0] * per_prompt, width), bool)
    ok = jnp.concatenate([jnp.repeat(prompt_ok, per_prompt, 0), own], 1)

    def attend(q: Array, k: Array, v: Array, window: int | Array | None) -> tuple[Array, None]:
        (qp, qc), (kp, kc), (vp, vc) = (parted(x, prompt_width, per_prompt) for x in (q, k, v))
        from_prompt = of_prompts(qp, kp, vp, window)[0]
        if width == 0:
            return from_prompt, None
        keys, values = (jnp.concatenate([jnp.repeat(p, per_prompt, 0), own], 1) for p, own in ((kp, kc), (vp, vc)))
        return joined(from_prompt, causal_attention(config, qc, keys, values, own, ok, window, mesh)), None

    return attend


def _attend_over_positions(
    config: TransformerConfig, per_prompt: int, width: int, prompt_ok: Array, mesh: Mesh
) -> Attend:
    """Each device has the queries of its part of the positions, and gathers the keys and values of all: in bytes
    ``2 (C - 1) / C`` of those of a layer, forward and again backward, where their gradients are scattered. A device
    multiplies 1 / C of the queries with all keys, those of the future included, so all do the same work; scores go
    through memory."""
    parts = mesh.shape[POSITIONS]

    @jax.checkpoint  # keys and values of all positions are gathered again for the gradient, not stored
    def local(q: Array, k: Array, v: Array, ok: Array, window: int | Array | None) -> Array:
        k, v = (jax.lax.all_gather(x, POSITIONS, axis=1, tiled=True) for x in (k, v))
        part = _attend_part(config, per_prompt, width, ok, jax.lax.axis_index(POSITIONS), parts)
        return part(q, k, v, window)

    lies, rows, whole = PartitionSpec(ROWS, POSITIONS, "tensor"), PartitionSpec(ROWS), PartitionSpec()
    spread = jax.shard_map(local, mesh=mesh, in_specs=(lies, lies, lies, rows, whole), out_specs=lies, check_vma=False)
    return lambda q, k, v, window: (spread(q, k, v, prompt_ok, window), None)


def _attend_part(
    config: TransformerConfig, per_prompt: int, width: int, prompt_ok: Array, part: Array, parts: int
) -> Callable[[Array, Array, Array, int | Array | None], Array]:
    """The attention of the queries of one of the ``parts`` [G, (P + K T) / parts, H, d] to the keys of all."""
    prompts, prompt_width = prompt_ok.shape
    rows = prompts * per_prompt

    def places(first: int, size: int) -> Array:
        return first + part * (size // parts) + jnp.arange(size // parts)

    at = jnp.arange(prompt_width + width)  # prompts end where completions begin, so places differ as positions do
    of_prompt = places(0, prompt_width)[:, None] - at[:prompt_width]
    of_own = places(prompt_width, width)[:, None] - at
    ok = jnp.concatenate([jnp.repeat(prompt_ok, per_prompt, 0), jnp.ones((rows, width), bool)], 1)
    prompt_seen, own_seen = (of_prompt >= 0) & prompt_ok[:, None], (of_own >= 0) & ok[:, None]

    def attend(q: Array, k: Array, v: Array, window: int | Array | None) -> Array:
        qp, qc = parted(q, prompt_width // parts, per_prompt)
        (kp, kc), (vp, vc) = (parted(x, prompt_width, per_prompt, parts) for x in (k, v))
        from_prompt = attention(config, qp, kp, vp, narrowed(prompt_seen, of_prompt, window))
        if width == 0:
            return from_prompt
        keys, values = (jnp.concatenate([jnp.repeat(p, per_prompt, 0), own], 1) for p, own in ((kp, kc), (vp, vc)))
        return joined(from_prompt, attention(config, qc, keys, values, narrowed(own_seen, of_own, window)))

    return attend
