"""A tiny random Llama as a GGUF file, written by the gguf package, and the weights that must be read from it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

WIDTH, HEADS, KV_HEADS, MLP, LAYERS = 32, 2, 1, 64, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "Ġ Ġ", "Ġ 1"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vocabulary() -> list[str]:
    """Special tokens, the byte alphabet, what the merges make, and one token of a user."""
    from tokenizers import pre_tokenizers

    return [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES), "<tool>"]


def shapes() -> dict[str, tuple[int, ...]]:
    """Of the tensors under Hugging Face's names; the head is the embedding."""
    d = WIDTH // HEADS
    layer = {
        "input_layernorm": (WIDTH,),
        "self_attn.q_proj": (HEADS * d, WIDTH),
        "self_attn.k_proj": (KV_HEADS * d, WIDTH),
        "self_attn.v_proj": (KV_HEADS * d, WIDTH),
        "self_attn.o_proj": (WIDTH, HEADS * d),
        "post_attention_layernorm": (WIDTH,),
        "mlp.gate_proj": (MLP, WIDTH),
        "mlp.up_proj": (MLP, WIDTH),
        "mlp.down_proj": (WIDTH, MLP),
    }
    blocks = {f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in layer.items()}
    return {"model.embed_tokens.weight": (len(vocabulary()), WIDTH), "model.norm.weight": (WIDTH,), **blocks}


FILE_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
KINDS = {"mlp.gate_proj": Kind.Q4_1, "mlp.up_proj": Kind.F16, "mlp.down_proj": Kind.Q4_1, "self_attn.q_proj": Kind.Q4_1}


def file_name(name: str) -> str:
    """The name that llama.cpp gives a tensor."""
    if "layers" not in name:
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
    _, _, block, *rest, _ = name.split(".")
    return f"blk.{block}.{FILE_NAMES['.'.join(rest)]}.weight"


def permuted(x: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's conversion script, literally."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def kind_of(value: Any) -> gguf.GGUFValueType:
    """The type of a field."""
    types = gguf.GGUFValueType
    return types.UINT32 if type(value) is int else types.get_type(value)


def write(
    path: Path,
    *,
    seed: int = 0,
    architecture: str = "llama",
    leave_out: str = "",
    add: dict[str, np.ndarray] | None = None,
    kinds: dict[str, Kind] = KINDS,
    scale: float = 0.3,
    add_bos: bool = False,
    values: dict[str, Any] | None = None,
    drop: Sequence[str] = (),
    **fields: str,
) -> dict[str, np.ndarray]:
    """Write the file; returns the weights that its quantized numbers stand for, under Hugging Face's names.

    Args:
      leave_out: name of a tensor of the file that is not written. add: further tensors. fields: metadata strings, by
        key with ``__`` for the dot. values: further metadata of any kind, by key. drop: keys that are left out.
    """
    rng, writer, expected = np.random.default_rng(seed), gguf.GGUFWriter(path, architecture), {}
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = vocabulary()
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in SPECIAL else 4 if t == "<tool>" else 1 for t in tokens])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(TEMPLATE)
    for key, value in fields.items():
        name = key.replace("__", ".")
        writer.kv_data[0].pop(name, None)
        writer.add_string(name, value)
    for name, value in (values or {}).items():
        writer.kv_data[0].pop(name, None)
        writer.add_key_value(name, value, kind_of(value))
    for name in drop:
        del writer.kv_data[0][name]
    for name, shape in shapes().items():
        x = rng.normal(size=shape).astype(np.float32) * scale
        x = 1 + 0.1 * x if x.ndim == 1 else x
        part = name.removesuffix(".weight").split(".", 3)[-1]
        kind = Kind.F32 if x.ndim == 1 else kinds.get(part, Kind.Q8_0)
        expected[name] = gguf.dequantize(gguf.quantize(x, kind), kind)
        heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(part)
        stored = gguf.quantize(x if heads is None else permuted(x, heads), kind)
        if file_name(name) != leave_out:
            writer.add_tensor(file_name(name), stored, raw_dtype=kind)
    for name, x in (add or {}).items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected
