"""Shape and numerics of a policy: one dataclass for every known family, and the settings that differ between layers."""

import dataclasses
import math
from functools import cache, partial

import jax
import numpy as np

from jaxpo.arguments import NonNegative, Positive, Whole, check_record
from jaxpo.registry import unknown

# What is stored of a block for the backward pass: everything, the products with parameters, or only the block's input.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
ATTENTION = ("auto", "xla", "splash")
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": partial(jax.nn.gelu, approximate=True)}
# kind -> how many numbers follow it in ``rope_scaling``
ROPE_SCALINGS = {"linear": 1, "llama3": 4, "yarn": 6}
EVERYWHERE = 2**30  # the window of a layer without one, among layers that have one


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and numerics of the policy. The defaults are a small Llama.

    Attributes:
      kv_heads: None = heads.
      head_dim: None = width // heads.
      mlp_width: width of the MLP, or of each expert.
      tied: the embedding is also the head.
      rope_scaling: () or ("linear", factor) or ("llama3", factor, low, high, original length) or ("yarn", factor,
        original length, fast, slow, attention factor, whole): see `rope_frequencies`.
      qkv_bias: queries, keys and values have biases (Qwen2).
      qk_norm: queries and keys are normalized by an RMSNorm (Qwen3, Gemma 3).
      norm_plus_one: norms multiply by 1 + scale (Gemma).
      post_norms: the outputs of attention and MLP are normalized too (Gemma).
      embedding_scaled: embeddings are multiplied by sqrt(width), rounded to ``dtype`` (Gemma).
      activation: activation of the gated MLP, "silu" or "gelu_tanh".
      query_scalar: attention is ``softmax(q k / sqrt(query_scalar))``; None = head_dim.
      attention_softcap, final_softcap: ``cap tanh(x / cap)`` on attention scores and on logits (Gemma 2); None = off.
      window: a token sees itself and the ``window - 1`` tokens before it; None = all.
      local_layers: the layers that have the window; None = every layer.
      local_rope_theta: rope_theta of the local layers, without scaling (Gemma 3); None = as in the other layers.
      experts: MLPs of a layer (Qwen3 MoE); None = one MLP.
      experts_per_token: how many experts a token takes. The softmax of a router chooses and weighs them.
      norm_topk: the weights of a token's experts are scaled to add up to 1.
      dtype: dtype of the computation; log-probs are float32 in any case.
      param_dtype: dtype of the stored parameters. A bfloat16 ``dtype`` over float32 parameters is training with master
        weights: the optimizer reads and writes float32.
      scan_layers: compile one block and scan it (short compile time), instead of one block per layer.
      remat: the parts of a block that the backward pass recomputes: "none", "dots" (all but the products with
        parameters), or "full".
      attention: "xla" writes the scores to memory, for a part of the queries at a time; "splash" is the library's fused
        kernel (TPU only); "auto" takes splash on TPUs for long sequences. Decoding has its own form.

    Raises:
      ValueError: a size out of range, or fields that contradict each other; the field is named.
    """

    vocab_size: Whole
    width: Whole = 64
    layers: Whole = 3
    heads: Whole = 4
    kv_heads: Whole | None = None
    head_dim: Whole | None = None
    mlp_width: Whole | None = None
    tied: bool = True
    rope_theta: Positive = 10_000.0
    rope_scaling: tuple[str | float, ...] = ()
    norm_eps: NonNegative = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_plus_one: bool = False
    post_norms: bool = False
    embedding_scaled: bool = False
    activation: str = "silu"
    query_scalar: Positive | None = None
    attention_softcap: Positive | None = None
    final_softcap: Positive | None = None
    window: Whole | None = None
    local_layers: tuple[int, ...] | None = None
    local_rope_theta: Positive | None = None
    experts: Whole | None = None
    experts_per_token: Whole | None = None
    norm_topk: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    attention: str = "auto"

    def __post_init__(self):
        set_ = partial(object.__setattr__, self)
        set_("kv_heads", self.heads if self.kv_heads is None else self.kv_heads)
        set_("head_dim", self.width // max(self.heads, 1) if self.head_dim is None else self.head_dim)
        set_("mlp_width", round(8 / 3 * self.width / 8) * 8 if self.mlp_width is None else self.mlp_width)
        set_("rope_scaling", tuple(self.rope_scaling))
        set_("local_layers", None if self.local_layers is None else tuple(self.local_layers))
        _check_sizes(self)
        _check_choices(self)
        _check_layers(self)

    @property
    def attention_scale(self) -> float:
        """The factor of the scores ``q k``. YaRN's attention factor multiplies queries and keys: its square is here."""
        yarn = float(self.rope_scaling[5]) ** 2 if self.rope_scaling[:1] == ("yarn",) else 1.0
        return yarn * (self.head_dim if self.query_scalar is None else self.query_scalar) ** -0.5


def _check_sizes(c: TransformerConfig) -> None:
    check_record(c, "policy.")
    if c.heads % c.kv_heads:
        raise ValueError(f"policy.kv_heads {c.kv_heads} does not divide policy.heads {c.heads}")
    if c.head_dim % 2:
        raise ValueError(f"policy.head_dim {c.head_dim} must be even for rotary positions")


def _check_choices(c: TransformerConfig) -> None:
    for field, choices in dict(remat=REMAT, activation=ACTIVATIONS, attention=ATTENTION).items():
        if getattr(c, field) not in choices:
            raise ValueError(unknown(f"policy.{field}", getattr(c, field), choices))
    for field in ("dtype", "param_dtype"):
        if getattr(c, field) not in ("float32", "bfloat16", "float64"):
            raise ValueError(f"policy.{field} must be float32 or bfloat16, not {getattr(c, field)!r}")
    if c.rope_scaling:
        kind, *numbers = c.rope_scaling
        if kind not in ROPE_SCALINGS:
            raise ValueError(unknown("policy.rope_scaling", kind, ROPE_SCALINGS))
        if len(numbers) != ROPE_SCALINGS[kind]:
            raise ValueError(
                f"policy.rope_scaling {kind!r} takes {ROPE_SCALINGS[kind]} numbers, not {len(numbers)}: {numbers}"
            )


def _check_layers(c: TransformerConfig) -> None:
    if c.local_layers is not None:
        if c.window is None:
            raise ValueError("policy.local_layers has no effect without policy.window")
        if not set(c.local_layers) <= set(range(c.layers)):
            raise ValueError(f"policy.local_layers {c.local_layers} must be layers of 0 .. {c.layers - 1}")
    if c.local_rope_theta is not None and c.rope_scaling[:1] == ("yarn",):
        raise ValueError("policy.rope_scaling 'yarn' scales the scores of all layers: it goes without local_rope_theta")
    if c.local_rope_theta is not None and c.local_layers is None:
        raise ValueError("policy.local_rope_theta has no effect without policy.local_layers")
    if (c.experts is None) != (c.experts_per_token is None):
        raise ValueError("policy.experts and policy.experts_per_token must be given together")
    if c.experts is None and c.norm_topk:
        raise ValueError("policy.norm_topk has no effect without policy.experts")
    if c.experts is not None and c.experts_per_token > c.experts:
        raise ValueError(f"policy.experts_per_token {c.experts_per_token} is more than policy.experts {c.experts}")


def rope_frequencies(head_dim: int, theta: float, scaling: tuple[str | float, ...] = ()) -> np.ndarray:
    """[head_dim / 2] rotation angle per position: ``theta^(-2i / head_dim)``, scaled for longer texts.

    ``("linear", factor)`` divides all of them by ``factor``. ``("llama3", factor, low, high, length)`` (Llama 3.1)
    divides those with a wavelength above ``length / low`` by ``factor``, keeps those with a wavelength below
    ``length / high``, and in between mixes both linearly in ``length / wavelength``.

    ``("yarn", factor, length, fast, slow, attention factor, whole)`` (YaRN, arXiv:2309.00071) keeps the frequencies
    that turn more than ``fast`` times within the original length, divides those that turn less than ``slow`` times, and
    mixes both linearly in the index between; with ``whole`` the ends of that range are rounded outwards. The attention
    factor is in `TransformerConfig.attention_scale`.
    """
    frequency = theta ** (-np.arange(head_dim // 2) * 2.0 / head_dim)
    match scaling:
        case ("linear", factor):
            frequency = frequency / factor
        case ("llama3", factor, low, high, length):
            turns = length * frequency / (2 * math.pi)  # full turns within the original length
            kept = np.clip((turns - low) / (high - low), 0, 1)
            frequency = kept * frequency + (1 - kept) * frequency / factor
        case ("yarn", factor, length, fast, slow, _, whole):
            low, high = (head_dim * math.log(length / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in (fast, slow))
            if whole:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, head_dim - 1)
            ramp = np.clip((np.arange(head_dim // 2) - low) / ((high - low) or 0.001), 0, 1)
            frequency = (1 - ramp) * frequency + ramp * frequency / factor
    return frequency.astype(np.float32)


@cache
def of_layers(c: TransformerConfig) -> tuple[dict, dict[str, np.ndarray]]:
    """The arguments of a block besides its parameters: ``window`` (int, or None) and ``frequency`` [head_dim / 2].

    Returns:
      Two dicts: the arguments that all layers share, and those that differ, with a leading axis of layers. So they are
      plain constants in a model whose layers are alike.
    """
    local = np.isin(np.arange(c.layers), range(c.layers) if c.local_layers is None else c.local_layers)
    frequency = rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
    if c.window is None or local.all() and c.local_rope_theta is None:
        return dict(window=c.window, frequency=frequency), {}
    window = np.where(local, c.window, EVERYWHERE).astype(np.int32)
    if c.local_rope_theta is None:
        return dict(frequency=frequency), dict(window=window)
    of_local = rope_frequencies(c.head_dim, c.local_rope_theta)
    return {}, dict(window=window, frequency=np.where(local[:, None], of_local, frequency))
