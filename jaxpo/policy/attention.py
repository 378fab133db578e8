"""Where queries meet keys: plain attention, and the form that runs each prompt once for all of its completions."""

import importlib
import logging

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from jaxpo.kernels.chips import target_platform
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


def shared_prompt_attend(
    config: TransformerConfig, per_prompt: int, width: int, prompt_ok: Array, mesh: Mesh | None = None
) -> Attend:
    """Attention over [G, P + K T] tokens: each prompt, and after it its K = ``per_prompt`` completions of T = ``width``
    tokens, one behind the other.

    A prompt attends to itself; a completion attends to the keys of its prompt, which were computed once for all K,
    and to itself. ``prompt_ok`` [G, P] marks real prompt tokens.
    """
    prompts, prompt_width = prompt_ok.shape
    rows = prompts * per_prompt
    of_prompts = prompt_attend(config, prompt_ok, mesh)
    own = jnp.ones((rows, width), bool)
    ok = jnp.concatenate([jnp.repeat(prompt_ok, per_prompt, 0), own], 1)

    def attend(q: Array, k: Array, v: Array, window: int | Array | None) -> tuple[Array, None]:
        def parts(x: Array) -> tuple[Array, Array]:
            return x[:, :prompt_width], x[:, prompt_width:].reshape(rows, width, *x.shape[2:])

        (qp, qc), (kp, kc), (vp, vc) = parts(q), parts(k), parts(v)
        of_prompt = of_prompts(qp, kp, vp, window)[0]
        if width == 0:
            return of_prompt, None
        keys = jnp.concatenate([jnp.repeat(kp, per_prompt, 0), kc], 1)
        values = jnp.concatenate([jnp.repeat(vp, per_prompt, 0), vc], 1)
        of_completion = causal_attention(config, qc, keys, values, own, ok, window, mesh)
        return jnp.concatenate([of_prompt, of_completion.reshape(prompts, -1, *q.shape[2:])], 1), None

    return attend
