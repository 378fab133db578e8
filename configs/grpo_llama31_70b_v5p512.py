"""GRPO of Llama-3.1-70B with completions of 8192 tokens, on 512 v5p chips (v5p-1024: v5p is counted in cores).

The shape of the model is in configs/models/Llama-3.1-70B; to train, put its safetensors and tokenizer files beside it.
The plan needs neither:

    python -m experiments.plan --config=configs/grpo_llama31_70b_v5p512.py --topology=v5p:8x8x8
"""

from ml_collections import ConfigDict

from configs import grpo_qwen3_0p6b_v5e8

MODEL = "configs/models/Llama-3.1-70B"


def get_config() -> ConfigDict:
    config = grpo_qwen3_0p6b_v5e8.get_config()
    config.tokenizer.path = config.policy.path = MODEL
    config.rollout.update(prompts=512, responses=8)
    config.training.microbatches = 8
    config.mesh.update(data=1, fsdp=512, tensor=1)
    config.rollout.mesh.update(data=64, tensor=8)
    return config
