"""A tiny model of every family, as Hugging Face describes it, and its weights: small whole numbers over 64, which every
format holds exactly and a few KB do."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxpo.policy.families import config_from_hf, tensors

GOLDEN = Path(__file__).parent / "golden"
PROMPTS = ([3, 5, 7, 9, 11, 2, 4], [1], [20, 30, 40, 8], [6, 6, 13, 2, 1])
NEW = 9  # tokens that are generated; the windows are shorter than prompt and answer
ONE = dict(
    vocab_size=47,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    intermediate_size=16,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
LOCAL, GLOBAL = "sliding_attention", "full_attention"
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=100.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", rope_theta=50.0, factor=4.0, original_max_position_embeddings=16, beta_fast=2)
PLAIN = dict(rope_type="default", rope_theta=50.0)
WINDOWS = dict(sliding_window=4, layer_types=[LOCAL, GLOBAL, LOCAL], num_hidden_layers=3)
GEMMA = dict(query_pre_attn_scalar=9, tie_word_embeddings=True, **WINDOWS)
MIXTURE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
MODELS = {
    "llama3": ("llama", dict(rope_parameters=LLAMA3)),
    "llama_linear": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=50.0, factor=3.0))),
    "llama_yarn": ("llama", dict(rope_parameters=YARN)),
    "qwen3_yarn": ("qwen3", dict(rope_parameters=YARN | dict(attention_factor=1.3, beta_fast=4, truncate=False))),
    "smollm2": ("llama", dict(tie_word_embeddings=True, hidden_size=18, num_attention_heads=3, num_key_value_heads=1)),
    "mistral": ("mistral", dict(sliding_window=5, rope_parameters=PLAIN)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True, rope_parameters=PLAIN)),
    "qwen2_window": ("qwen2", dict(use_sliding_window=True, max_window_layers=1, **WINDOWS)),
    "qwen3": ("qwen3", dict(rope_parameters=PLAIN)),
    "qwen3_moe": ("qwen3_moe", dict(norm_topk_prob=True, **MIXTURE)),
    "qwen3_moe_raw": ("qwen3_moe", dict(norm_topk_prob=False, **MIXTURE)),
    "gemma2": ("gemma2", dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **GEMMA)),
    "gemma3": (
        "gemma3_text",
        {
            **GEMMA,
            "rope_parameters": {
                LOCAL: dict(rope_type="default", rope_theta=10.0),
                GLOBAL: dict(rope_type="linear", rope_theta=200.0, factor=2.0),
            },
        },
    ),
}
ARCHITECTURE = dict(
    llama="LlamaForCausalLM",
    mistral="MistralForCausalLM",
    qwen2="Qwen2ForCausalLM",
    qwen3="Qwen3ForCausalLM",
    qwen3_moe="Qwen3MoeForCausalLM",
    gemma2="Gemma2ForCausalLM",
    gemma3_text="Gemma3ForCausalLM",
)


@dataclass(frozen=True)
class Arrays:
    """A source of weights in memory."""

    config: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def names(self) -> list[str]:
        return list(self.arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        return self.arrays[name][index]


def hf_config(name: str) -> dict[str, Any]:
    """A config.json of the tiny model ``name``."""
    model_type, fields = MODELS[name]
    return {**ONE, **fields, "model_type": model_type, "architectures": [ARCHITECTURE[model_type]], "dtype": "float32"}


def random_source(name: str) -> Arrays:
    """The tiny model ``name`` with random weights; norms are about 1 (of Gemma: 0, to which it adds 1)."""
    config, rng = hf_config(name), np.random.default_rng(0)
    arrays = {}
    for slot in tensors(config_from_hf(config)):
        x = rng.integers(-15, 16, slot.shape) / 32
        unit = "norm" in slot.name and "gemma" not in name
        arrays[slot.name] = (1 + x / 2 if unit else x).astype(np.float32)
    return Arrays(config, arrays)


# ---- what transformers makes of it, kept


def save_golden(name: str, source: Arrays, logits: np.ndarray, greedy: np.ndarray) -> None:
    """Keep the model, the logits after each token of the longest prompt, and the greedy answers to all prompts."""
    shapes = {n: x.shape for n, x in source.arrays.items()}
    model = np.array(json.dumps(dict(config=source.config, shapes=shapes)))
    weights = np.concatenate([x.reshape(-1) * 64 for x in source.arrays.values()])
    assert np.array_equal(weights, weights.astype(np.int8))
    GOLDEN.mkdir(exist_ok=True)
    arrays = dict(model=model, weights=weights.astype(np.int8), logits=logits, greedy=greedy.astype(np.int32))
    np.savez_compressed(GOLDEN / f"{name}.npz", **arrays)


def read_golden(name: str) -> tuple[Arrays, np.ndarray, np.ndarray]:
    """(model, logits [P, V], greedy answers [prompts, NEW]) of transformers."""
    with np.load(GOLDEN / f"{name}.npz") as kept:
        model, weights = json.loads(str(kept["model"])), kept["weights"].astype(np.float32) / 64
        sizes = [np.prod(shape, dtype=int) for shape in model["shapes"].values()]
        parts = np.split(weights, np.cumsum(sizes)[:-1])
        arrays = {n: x.reshape(shape) for (n, shape), x in zip(model["shapes"].items(), parts, strict=True)}
        return Arrays(model["config"], arrays), kept["logits"], kept["greedy"]


def padded(prompts: tuple[list[int], ...] = PROMPTS) -> tuple[np.ndarray, np.ndarray]:
    """Prompts [G, P] left-padded with a token that occurs, and their lengths."""
    width = max(map(len, prompts))
    tokens = np.full((len(prompts), width), 3, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    return tokens, np.array([len(p) for p in prompts], np.int32)
