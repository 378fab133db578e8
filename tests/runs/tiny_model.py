"""A model folder that takes seconds to train: random weights, a tokenizer of bytes, a chat template."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxpo.policy.families import FAMILIES, config_from_hf, tensors
from jaxpo.text.tokenizer_files import transformers_library

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(folder: Path, *, model_type: str = "qwen2", seed: int = 0) -> Path:
    """Write it; its first tokens are `SPECIAL`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    config = dict(
        model_type=model_type,
        architectures=[FAMILIES[model_type].architecture],
        vocab_size=len(tokens),
        **sizes,
        intermediate_size=24,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        dtype="float32",
    )
    rng = np.random.default_rng(seed)
    arrays = {s.name: rng.normal(size=s.shape).astype(np.float32) / 5 for s in tensors(config_from_hf(config))}
    folder.mkdir()
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    named = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE)
    made = transformers_library().PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=["<|im_start|>"], **named
    )
    made.save_pretrained(folder)
    return folder
