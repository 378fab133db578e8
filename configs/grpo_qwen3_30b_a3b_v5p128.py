"""GRPO of Qwen3-30B-A3B, a mixture of 128 experts, with completions of 8192 tokens, on 128 v5p chips (v5p-256: v5p is
counted in cores).

The shape of the model is in configs/models/Qwen3-30B-A3B; to train, put its safetensors and tokenizer files beside it.
The plan needs neither:

    python -m experiments.plan --config=configs/grpo_qwen3_30b_a3b_v5p128.py --topology=v5p:4x4x8
"""

from ml_collections import ConfigDict

from configs import grpo_qwen3_0p6b_v5e8

MODEL = "configs/models/Qwen3-30B-A3B"


def get_config() -> ConfigDict:
    config = grpo_qwen3_0p6b_v5e8.get_config()
    config.tokenizer.path = config.policy.path = MODEL
    config.rollout.update(prompts=128, responses=16)
    config.training.microbatches = 16
    config.mesh.update(data=1, fsdp=16, expert=8, tensor=1)
    config.rollout.mesh.update(data=4, expert=8, tensor=4)
    return config
