"""GRPO of Qwen3-8B with completions of 8192 tokens, on 64 v6e chips (v6e-64): half as many prompts as on v5p, since a
chip has a third of its memory.

The shape of the model is in configs/models/Qwen3-8B; to train, put its safetensors and tokenizer files beside it. The
plan needs neither:

    python -m experiments.plan --config=configs/grpo_qwen3_8b_v6e64.py --topology=v6e:8x8
"""

from ml_collections import ConfigDict

from configs import grpo_qwen3_8b_v5p64


def get_config() -> ConfigDict:
    config = grpo_qwen3_8b_v5p64.get_config()
    config.rollout.responses = 8
    config.training.microbatches = 8
    return config
