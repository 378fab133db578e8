"""The model families of Hugging Face that the decoder covers: their config.json and their tensor names. Each is one
table that serves both import and export."""

import importlib
from collections.abc import Mapping, Sequence
from functools import partial
from math import log, prod
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from jaxpo.policy.config import TransformerConfig
from jaxpo.policy.transformer import init
from jaxpo.registry import unknown
from jaxpo.text.tokenizer_files import transformers_library


class Family(NamedTuple):
    """A ``model_type``.

    architecture: the class name in config.json.
    fields: our field -> the key of config.json.
    always: values of our fields that have no key.
    only: keys that must have this value.
    """

    architecture: str
    fields: Mapping[str, str]
    always: Mapping[str, Any] = MappingProxyType({})
    only: Mapping[str, Any] = MappingProxyType({})


COMMON = dict(
    vocab_size="vocab_size",
    width="hidden_size",
    layers="num_hidden_layers",
    heads="num_attention_heads",
    kv_heads="num_key_value_heads",
    head_dim="head_dim",
    mlp_width="intermediate_size",
    tied="tie_word_embeddings",
    norm_eps="rms_norm_eps",
    activation="hidden_act",
)
WINDOW = dict(window="sliding_window")
GEMMA = dict(norm_plus_one=True, post_norms=True, embedding_scaled=True)
GEMMA_FIELDS = {
    **COMMON,
    **WINDOW,
    "activation": "hidden_activation",
    "query_scalar": "query_pre_attn_scalar",
    "attention_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
}
EXPERTS = dict(
    mlp_width="moe_intermediate_size",
    experts="num_experts",
    experts_per_token="num_experts_per_tok",
    norm_topk="norm_topk_prob",
)
UNBIASED = dict(attention_bias=False)
FAMILIES = {  # SmolLM2 is a Llama
    "llama": Family("LlamaForCausalLM", COMMON, only=dict(UNBIASED, mlp_bias=False)),
    "mistral": Family("MistralForCausalLM", COMMON | WINDOW),
    "qwen2": Family("Qwen2ForCausalLM", COMMON | WINDOW, dict(qkv_bias=True)),
    "qwen3": Family("Qwen3ForCausalLM", COMMON | WINDOW, dict(qk_norm=True), UNBIASED),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        COMMON | WINDOW | EXPERTS,
        dict(qk_norm=True),
        dict(UNBIASED, decoder_sparse_step=1, mlp_only_layers=[]),
    ),
    "gemma2": Family("Gemma2ForCausalLM", GEMMA_FIELDS, GEMMA, UNBIASED),
    "gemma3_text": Family("Gemma3ForCausalLM", GEMMA_FIELDS, dict(GEMMA, qk_norm=True), UNBIASED),
}
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPE = {  # kind -> keys of its numbers, in the order of ``rope_scaling``
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("attention_factor", "truncate"),
    ),
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
LARGEST = {  # far above any model: a larger number is a mistake or a lie
    "num_hidden_layers": 2**12,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "num_experts"), 2**16),
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 2**22),
    **dict.fromkeys(("vocab_size", "sliding_window"), 2**30),
}


# ---- config.json


def config_from_hf(hf: Mapping[str, Any], **numerics: Any) -> TransformerConfig:
    """The configuration that a config.json describes, read through `transformers.AutoConfig`.

    Args:
      numerics: fields that a config.json does not fix: dtype, param_dtype, scan_layers, remat, attention.

    Raises:
      ValueError: an unknown architecture, rope type or activation (the known ones are listed), a setting of the family
        that this decoder does not have, or quantized weights.
    """
    family = _family(hf)
    check_sizes(hf)
    c = _transformers_config(**hf)
    for key, value in family.only.items():
        if getattr(c, key, value) != value:
            raise ValueError(f"config.json: {key}={getattr(c, key)!r} of {hf['model_type']} is not known; {value!r} is")
    if hf.get("quantization_config"):
        raise ValueError("config.json: quantized weights (quantization_config) are not read: take the original model")
    if getattr(c, "use_bidirectional_attention", None):
        raise ValueError("config.json: use_bidirectional_attention is not supported: the decoder is causal")
    fields = {ours: getattr(c, key, None) for ours, key in family.fields.items()}
    fields["activation"] = _choice("activation", fields["activation"], ACTIVATIONS)
    return TransformerConfig(**{**fields, **_layers(c, fields), **family.always, **numerics})


def check_sizes(hf: Mapping[str, Any]) -> None:
    """Check the sizes that a config.json claims, before anything is made of them.

    Raises:
      ValueError: one is no whole number above 0, or larger than that of any model."""
    for key, largest in LARGEST.items():
        size = hf.get(key)
        if size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"config.json: {key} is {size!r:.40}, not a whole number above 0")
        if size > largest:
            raise ValueError(f"config.json: {key} is {str(size):.20}, and no model has more than {largest:,}")
    for key in ("rms_norm_eps", "query_pre_attn_scalar", "rope_theta"):
        number = hf.get(key)
        if number is not None and (not isinstance(number, int | float) or not 0 <= number < float("inf")):
            raise ValueError(f"config.json: {key} is {number!r:.40}, not a finite number of at least 0")
    for key in ("rope_parameters", "rope_scaling"):
        if hf.get(key) is not None and not isinstance(hf[key], Mapping):
            raise ValueError(f"config.json: {key} is {hf[key]!r:.40}, and no object")
    types, layers = hf.get("layer_types"), hf.get("num_hidden_layers")
    if types is not None and (not isinstance(types, list) or layers is not None and len(types) != layers):
        raise ValueError(f"config.json: layer_types must name the type of each of {layers} layers")


def _transformers_config(model_type: str, **hf: Any) -> Any:
    """The configuration object of transformers, which fills in the keys that a config.json leaves out."""
    try:
        return type(transformers_library().AutoConfig.for_model(model_type)).from_dict(hf)
    except Exception as error:  # of many kinds, by the field and the version
        reason = " ".join(str(error).split())
        raise ValueError(f"config.json is not accepted by transformers as {model_type}: {reason}") from error


def _family(hf: Mapping[str, Any]) -> Family:
    """The family by ``model_type``. An unknown class in ``architectures`` is refused: with another class on top of the
    decoder it is another model."""
    known = {family.architecture: model_type for model_type, family in FAMILIES.items()}
    for name in hf.get("architectures") or ():
        if name not in known:
            raise ValueError(unknown("architecture of config.json", name, known))
    if hf.get("model_type") not in FAMILIES:
        raise ValueError(unknown("model_type of config.json", hf.get("model_type"), FAMILIES))
    return FAMILIES[hf["model_type"]]


def _choice(what: str, name: str, choices: Mapping[str, Any]) -> Any:
    if name not in choices:
        raise ValueError(unknown(f"{what} of config.json", name, choices))
    return choices[name]


def _layers(c: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that may differ between layers: windows and rotary positions."""
    n, types = fields["layers"], getattr(c, "layer_types", None)
    window = fields.get("window")
    types = types or [GLOBAL if window is None else LOCAL] * n
    for name in types:
        _choice("layer type", name, {LOCAL: 0, GLOBAL: 0})
    local = tuple(i for i, name in enumerate(types) if name == LOCAL)
    window = window if local else None
    rope = c.rope_parameters
    rope = rope if GLOBAL in rope else {GLOBAL: rope}
    theta = rope[GLOBAL]["rope_theta"]
    own = rope[LOCAL]["rope_theta"] if LOCAL in rope and local else None
    if own is not None and _scaling(rope[LOCAL], c.max_position_embeddings):
        raise ValueError(f"config.json: scaled rope of {LOCAL} layers is not supported: {rope[LOCAL]}")
    return dict(
        window=window,
        local_layers=None if window is None or len(local) == n and own is None else local,
        rope_theta=theta,
        rope_scaling=_scaling(rope[GLOBAL], c.max_position_embeddings),
        local_rope_theta=own,
    )


def _scaling(rope: Mapping[str, Any], positions: int) -> tuple[str | float, ...]:
    keys = _choice("rope type", rope.get("rope_type", "default"), ROPE)
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError("config.json: partial_rotary_factor is not supported: all of a head turns")
    rope = yarn_numbers(rope, positions) if rope.get("rope_type") == "yarn" else rope
    return (rope["rope_type"], *(rope[key] for key in keys)) if keys else ()


def yarn_numbers(rope: Mapping[str, Any], positions: int) -> dict[str, Any]:
    """YaRN's parameters with those that follow from the others: the factor from the lengths, and the attention factor
    ``m(mscale) / m(mscale_all_dim)``, or ``m(1)``, with ``m(s) = 0.1 s ln(factor) + 1``."""
    length = rope.get("original_max_position_embeddings") or positions
    factor = rope.get("factor") or positions / length

    def m(scale: float = 1.0) -> float:
        return 0.1 * scale * log(factor) + 1 if factor > 1 else 1.0

    scales = rope.get("mscale"), rope.get("mscale_all_dim")
    attention = rope.get("attention_factor")
    if attention is None:
        attention = m(scales[0]) / m(scales[1]) if all(scales) else m()
    return {
        **rope,
        "factor": factor,
        "original_max_position_embeddings": length,
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        "attention_factor": float(attention),
        "truncate": int(bool(rope.get("truncate", True))),
    }


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    """The config.json of a policy that was made here, as the first family that has all of its features.

    Raises:
      ValueError: no family has all of them.
    """
    model = vars(config)
    for model_type, family in FAMILIES.items():
        default = _transformers_config(model_type)
        by_layer = GLOBAL in default.rope_parameters or config.local_rope_theta is None
        if not by_layer or ("experts" in family.fields) != (config.experts is not None):
            continue
        hf = {key: model[ours] for ours, key in family.fields.items()}
        hf |= dict(model_type=model_type, architectures=[family.architecture], rope_parameters=_rope_to_hf(config))
        hf[family.fields["activation"]] = {v: k for k, v in ACTIVATIONS.items()}[config.activation]
        if hasattr(default, "layer_types"):
            local = range(config.layers) if config.local_layers is None else config.local_layers
            hf["layer_types"] = [LOCAL if config.window and i in local else GLOBAL for i in range(config.layers)]
        if hasattr(default, "use_sliding_window"):
            hf["use_sliding_window"] = config.window is not None
        if "query_scalar" in family.fields and config.query_scalar is None:
            hf["query_pre_attn_scalar"] = config.head_dim
        numerics = {name: model[name] for name in ("dtype", "param_dtype", "scan_layers", "remat", "attention")}
        if _same(config_from_hf(hf, **numerics), config):
            return hf
    raise ValueError(f"no family of {', '.join(FAMILIES)} has all features of this policy: it cannot be exported")


def _rope_to_hf(config: TransformerConfig) -> dict[str, Any]:
    kind, *numbers = config.rope_scaling or ("default",)
    rope = dict(rope_type=kind, rope_theta=config.rope_theta, **dict(zip(ROPE[kind], numbers, strict=True)))
    if kind == "yarn":
        rope["truncate"] = bool(rope["truncate"])
    if config.local_rope_theta is None:
        return rope
    return {GLOBAL: rope, LOCAL: dict(rope_type="default", rope_theta=config.local_rope_theta)}


def _same(a: TransformerConfig, b: TransformerConfig) -> bool:
    """Whether both compute the same; an explicit query_scalar equals an implicit one."""
    plain = [{**vars(c), "query_scalar": c.attention_scale} for c in (a, b)]
    return plain[0] == plain[1]


def classifier_to_hf(hf: Mapping[str, Any], pad_id: int | None, bias: float = 0.0) -> dict[str, Any]:
    """The config.json of the model with one number in the place of the vocabulary: a reward or value model.

    Args:
      hf: the config.json of the language model.
      pad_id: the token that transformers takes for padding when it looks for the last token of a row; None = none, so
        that it reads one row at a time.
      bias: of the head. The class has none: it is kept as ``score_bias``, for the reader to add.

    Raises:
      ValueError: transformers has no such class for this architecture."""
    library = importlib.import_module("transformers.models.auto.modeling_auto")
    names = library.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    name = _choice("model_type (with a head of one number)", hf["model_type"], names)
    one = dict(num_labels=1, id2label={"0": "score"}, label2id={"score": 0}, problem_type="regression")
    return {**hf, **one, "architectures": [name], "pad_token_id": pad_id, **({"score_bias": bias} if bias else {})}


# ---- tensors


class Slot(NamedTuple):
    """A tensor of a file, and its place in the parameters: ``tensor ==
    params[path][index].transpose(axes).reshape(shape)``.

    name: the name of the tensor in the file.
    path: the keys of the array in the parameters.
    index: the part of that array.
    groups: for each axis of the tensor, the axes of ``params[path][index]`` that it is made of.
    ours: the shape of ``params[path][index]``.
    """

    name: str
    path: tuple[str, ...]
    index: tuple[int | slice, ...]
    groups: tuple[tuple[int, ...], ...]
    ours: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return tuple(prod(self.ours[axis] for axis in group) for group in self.groups)

    @property
    def axes(self) -> tuple[int, ...]:
        """The order of our axes in the tensor."""
        return tuple(axis for group in self.groups for axis in group)


SAME, TURNED, VECTOR = ((0,), (1,)), ((1,), (0,)), ((0,),)
HEADS = ((1, 2), (0,))  # ours [D, heads, d], theirs [heads * d, D]
WHOLE = {
    "embedding": ("model.embed_tokens.weight", SAME),
    "head": ("lm_head.weight", SAME),
    "final_norm": ("model.norm.weight", VECTOR),
}
BLOCK = {
    "attn_norm": ("input_layernorm.weight", VECTOR),
    "wq": ("self_attn.q_proj.weight", HEADS),
    "wk": ("self_attn.k_proj.weight", HEADS),
    "wv": ("self_attn.v_proj.weight", HEADS),
    "wo": ("self_attn.o_proj.weight", ((2,), (0, 1))),
    "bq": ("self_attn.q_proj.bias", ((0, 1),)),
    "bk": ("self_attn.k_proj.bias", ((0, 1),)),
    "bv": ("self_attn.v_proj.bias", ((0, 1),)),
    "q_norm": ("self_attn.q_norm.weight", VECTOR),
    "k_norm": ("self_attn.k_norm.weight", VECTOR),
    "mlp_norm": ("post_attention_layernorm.weight", VECTOR),
    "router": ("mlp.gate.weight", TURNED),
}
# In families with post-norms, the norm after attention has the name that the norm before the MLP has elsewhere.
POST_NORMS = {
    "attn_post_norm": ("post_attention_layernorm.weight", VECTOR),
    "mlp_norm": ("pre_feedforward_layernorm.weight", VECTOR),
    "mlp_post_norm": ("post_feedforward_layernorm.weight", VECTOR),
}
GATE, UP = (slice(None), 0), (slice(None), 1)
MLP = {"w_in": (("gate_proj", GATE), ("up_proj", UP)), "w_down": (("down_proj", ()),)}


def tensors(config: TransformerConfig) -> list[Slot]:
    """Every tensor of a model's files, with the name and the shape that Hugging Face gives it."""
    shapes = jax.eval_shape(partial(init, config), jax.random.key(0))
    named = BLOCK | (POST_NORMS if config.post_norms else {})
    each = [("", ())] if config.experts is None else [(f"experts.{e}.", (e,)) for e in range(config.experts)]
    out = [_slot(name, (x,), (), groups, shapes) for x, (name, groups) in WHOLE.items() if x in shapes]
    for i in range(config.layers):
        layer = f"model.layers.{i}."
        for x in shapes["blocks"]:
            if x in MLP:
                places = [(f"mlp.{e}{n}.weight", (i, *at, *part)) for e, at in each for n, part in MLP[x]]
                out += [_slot(layer + name, ("blocks", x), index, TURNED, shapes) for name, index in places]
            else:
                name, groups = named[x]
                out.append(_slot(layer + name, ("blocks", x), (i,), groups, shapes))
    return out


def score_slot(head: str, width: int) -> Slot:
    """The weight of a head of one number, as `classifier_to_hf`'s class has it."""
    return Slot("score.weight", ("heads", head, "weight"), (slice(None),), ((), (0,)), (width,))


def _slot(
    name: str, path: tuple[str, ...], index: tuple[int | slice, ...], groups: Sequence[tuple[int, ...]], shapes: Any
) -> Slot:
    for key in path:
        shapes = shapes[key]
    full = (*index, *[slice(None)] * (len(shapes.shape) - len(index)))
    ours = tuple(n for n, at in zip(shapes.shape, full, strict=True) if isinstance(at, slice))
    return Slot(name, path, full, tuple(groups), ours)
