"""The architectures of GGUF files: their tensors under the names of Hugging Face, and their metadata as a
config.json."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

# The file's tensor name -> Hugging Face's; {} is the block.
COMMON = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "blk.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blk.{}.attn_q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blk.{}.attn_output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.ffn_gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": "model.layers.{}.mlp.down_proj.weight",
}
BIASES = {f"blk.{{}}.attn_{x}.bias": f"model.layers.{{}}.self_attn.{x}_proj.bias" for x in "qkv"}
QK_NORMS = {f"blk.{{}}.attn_{x}_norm.weight": f"model.layers.{{}}.self_attn.{x}_norm.weight" for x in "qk"}
# A norm after attention has the name that the norm before the MLP has elsewhere.
POST_NORMS = {
    "blk.{}.post_attention_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.pre_feedforward_layernorm.weight",
    "blk.{}.post_ffw_norm.weight": "model.layers.{}.post_feedforward_layernorm.weight",
}
HEAD = {"output.weight": "lm_head.weight"}  # absent if the head is the embedding
FACTORS = "rope_freqs.weight"  # what each rotary frequency is divided by, in Llama 3.1 and later
LOCAL, GLOBAL = "sliding_attention", "full_attention"

Field = Callable[..., Any]  # (name, default) -> the value of the architecture's field


class Architecture(NamedTuple):
    """A ``general.architecture``.

    model_type, class_name: what config.json calls it.
    tensors: the file's names -> Hugging Face's.
    paired: the rows of q and k of a head are in pairs, as rotary positions were first written; Hugging Face has the
      first row of every pair, then the second of every pair.
    plus_one: the file's norms are 1 more than Hugging Face's.
    more: (field, number of blocks, head_dim) -> further keys of config.json.
    """

    model_type: str
    class_name: str
    tensors: Mapping[str, str]
    paired: bool = False
    plus_one: bool = False
    more: Callable[[Field, int, int], Mapping[str, Any]] = lambda field, blocks, head_dim: {}


def _windows(field: Field, blocks: int, every: int) -> dict[str, Any]:
    """All layers but every so many-th see a window."""
    kinds = [GLOBAL if i % every == every - 1 else LOCAL for i in range(blocks)]
    return {"sliding_window": field("attention.sliding_window"), "layer_types": kinds}


def _gemma2(field: Field, blocks: int, head_dim: int) -> dict[str, Any]:
    largest = blocks == 46  # the 27B scales by the width of a head's share of the model instead
    scalar = field("embedding_length") // field("attention.head_count") if largest else head_dim
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": field("attn_logit_softcapping"),
        "final_logit_softcapping": field("final_logit_softcapping"),
        **_windows(field, blocks, 2),
    }


def _gemma3(field: Field, blocks: int, head_dim: int) -> dict[str, Any]:
    largest = blocks == 62
    scalar = field("embedding_length") // field("attention.head_count") if largest else head_dim
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        **_windows(field, blocks, 6),
    }


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", COMMON, paired=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", COMMON | BIASES),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", COMMON | QK_NORMS),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", COMMON | POST_NORMS, plus_one=True, more=_gemma2),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", COMMON | POST_NORMS | QK_NORMS, plus_one=True, more=_gemma3
    ),
}
LOCAL_THETA = 10_000.0  # of Gemma 3's layers with a window, unless the file says otherwise


def config_of(
    family: str, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: np.ndarray | None
) -> dict[str, Any]:
    """The metadata with the keys of a config.json.

    Args:
      shapes: of the file's tensors, as Hugging Face has them.
      factors: `FACTORS`, if the file has them.

    Raises:
      ValueError: a field is missing, has another type, or a value that no model of the architecture has; a kind of
        rotary positions that is not known.
    """
    known = ARCHITECTURES[family]
    field = _reader(family, metadata)
    _check_fields(family, metadata)
    width, heads, blocks = field("embedding_length"), field("attention.head_count"), field("block_count")
    head_dim = field("attention.key_length", max(width // heads, 1))
    if head_dim % 2 or heads % field("attention.head_count_kv", heads):
        raise ValueError(
            f"{heads} heads of {head_dim} numbers beside {field('attention.head_count_kv', heads)} of keys: heads are "
            "even, and a multiple of those of keys"
        )
    if field("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"the field {family}.attention.value_length is not {head_dim}, as keys have it")
    _check_shapes(family, field, shapes, head_dim)
    if field("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"rotary positions on {field('rope.dimension_count')} of {head_dim} dimensions are not known")
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    ids = {f"{ours}_token_id": metadata.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()}
    rope = _rope(field, factors)
    if family == "gemma3":
        own = dict(rope_type="default", rope_theta=field("rope.freq_base_swa", LOCAL_THETA))
        rope = {GLOBAL: rope, LOCAL: own}
    return {
        "architectures": [known.class_name],
        "model_type": known.model_type,
        "hidden_act": "silu",
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": field("feed_forward_length"),
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in shapes,
        "vocab_size": shapes["token_embd.weight"][0],
        **known.more(field, blocks, head_dim),
        **{name: i for name, i in ids.items() if i is not None},
    }


WHOLE = (
    *("embedding_length", "block_count", "feed_forward_length", "context_length", "rope.dimension_count"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.sliding_window", "rope.scaling.original_context_length"),
)
POSITIVE = (
    *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.freq_base_swa", "rope.scaling.factor"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)


def _check_fields(family: str, metadata: Mapping[str, Any]) -> None:
    """Check the numbers among the fields that are there. ``ValueError`` names one that is none."""
    for name in (*WHOLE, *POSITIVE):
        value = metadata.get(f"{family}.{name}")
        if value is None:
            continue
        if name in WHOLE and (type(value) is not int or value < 1):
            raise ValueError(f"the field {family}.{name} is {str(value)[:40]!r}, not a whole number above 0")
        if name in POSITIVE and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise ValueError(f"the field {family}.{name} is {str(value)[:40]!r}, not a positive number")


def _check_shapes(family: str, field: Field, shapes: Mapping[str, tuple[int, ...]], head_dim: int) -> None:
    """Check the tensors of every block against the sizes that the fields claim."""
    width, mlp = field("embedding_length"), field("feed_forward_length")
    heads = field("attention.head_count")
    queries, keys = heads * head_dim, field("attention.head_count_kv", heads) * head_dim
    of = {
        "attn_q": ("attention.head_count", (queries, width)),
        "attn_k": ("attention.head_count_kv", (keys, width)),
        "attn_v": ("attention.head_count_kv", (keys, width)),
        "attn_output": ("attention.head_count", (width, queries)),
        "ffn_gate": ("feed_forward_length", (mlp, width)),
        "ffn_up": ("feed_forward_length", (mlp, width)),
        "ffn_down": ("feed_forward_length", (width, mlp)),
        "token_embd": ("embedding_length", (shapes["token_embd.weight"][0], width)),
        "output": ("embedding_length", (shapes["token_embd.weight"][0], width)),
        **dict.fromkeys(("attn_q_norm", "attn_k_norm"), ("attention.key_length", (head_dim,))),
    }
    for name, shape in shapes.items():
        *_, kind, end = ("", *name.split("."))
        if kind not in of and not kind.endswith("norm"):
            continue  # `names_of` tells the unknown ones
        claim, wanted = of.get(kind, ("embedding_length", (width,)))
        wanted = wanted[:1] if end == "bias" else wanted
        if shape != wanted:
            raise ValueError(
                f"tensor {name} is {list(shape)}, but the field {family}.{claim} would make it {list(wanted)}: the "
                "file is broken"
            )


def _reader(family: str, metadata: Mapping[str, Any]) -> Field:
    def field(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{family}.{name}", default)
        if value is None:
            raise ValueError(f"the field {family}.{name} is missing: the file is not whole")
        return value

    return field


def _rope(field: Field, factors: np.ndarray | None) -> dict[str, Any]:
    """The rotary positions, as ``rope_parameters`` of config.json."""
    rope = {"rope_type": "default", "rope_theta": field("rope.freq_base", 10_000.0)}
    kind = field("rope.scaling.type", "none")
    if factors is not None:
        if kind != "none":
            raise ValueError(
                f"it has both {FACTORS} and rope scaling {kind!r}: load the model from safetensors instead"
            )
        return _llama3(rope, factors)
    if kind == "none":
        return rope
    if kind == "linear":
        return {**rope, "rope_type": "linear", "factor": field("rope.scaling.factor")}
    if kind == "yarn":
        lengths = {
            "factor": field("rope.scaling.factor"),
            "original_max_position_embeddings": field("rope.scaling.original_context_length"),
        }
        ends = {name: field(f"rope.scaling.yarn_{name}", 0) or None for name in ("beta_fast", "beta_slow")}
        return {**rope, "rope_type": "yarn", **lengths, **{k: v for k, v in ends.items() if v is not None}}
    raise ValueError(f"rope scaling {kind!r} is not known: load the model from safetensors instead")


def _llama3(rope: Mapping[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """Llama 3's scaling, found from what it makes of the frequencies; ``ValueError`` for other factors."""
    n = len(factors)
    frequency = rope["rope_theta"] ** (-np.arange(n) / n)
    factor = float(factors.max())
    for low, high, length in ((1.0, 4.0, 8192),):
        turns = length * frequency / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        if factor > 1 and np.allclose(1 / (kept + (1 - kept) / factor), factors, rtol=1e-3):
            numbers = dict(low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=length)
            return {**rope, "rope_type": "llama3", "factor": round(factor, 3), **numbers}
    raise ValueError(f"{FACTORS} are not those of a Llama 3: load the model from safetensors instead")


def names_of(family: str, blocks: int, stored: Mapping[str, Any]) -> dict[str, str]:
    """Hugging Face's name -> the file's name, for all tensors.

    Raises:
      ValueError: one is missing, or unknown to the architecture."""
    names = {}
    for theirs, ours in ARCHITECTURES[family].tensors.items():
        for block in range(blocks) if "{}" in theirs else (0,):
            names[ours.format(block)] = theirs.format(block)
            if len(names) > len(stored) + 1:  # a lying number of blocks
                break
    for theirs, ours in HEAD.items():
        if theirs in stored:
            names[ours] = theirs
    missing = [theirs for theirs in names.values() if theirs not in stored]
    if missing:
        raise ValueError(
            f"it lacks tensors, the first is {missing[0]}, with {family}.block_count {blocks:,}: the file is not whole"
        )
    extra = sorted(stored.keys() - set(names.values()) - {FACTORS})
    if extra:
        raise ValueError(
            f"{len(extra)} tensors that its architecture does not have, the first is {extra[0]}: load the model from "
            "safetensors instead"
        )
    return names


def unpaired(rows: int, heads: int) -> np.ndarray:
    """[rows]: the file's row for each row of Hugging Face: ``(h, half, i) <- (h, i, half)``."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
