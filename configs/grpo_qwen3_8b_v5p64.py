"""GRPO of Qwen3-8B with completions of 8192 tokens, on 64 v5p chips (v5p-128: the name counts cores).

The shape of the model is in configs/models/Qwen3-8B. To train, put its safetensors and tokenizer files beside it; the
plan needs neither.

    python -m experiments.plan --config=configs/grpo_qwen3_8b_v5p64.py --topology=v5p:4x4x4
    python -m experiments.train_rl --config=configs/grpo_qwen3_8b_v5p64.py --workdir=runs/qwen3_8b

Expected: planned, not run. A chip holds 23.0 of 95.7 GiB. An iteration takes at least 71.7 s, 200 of them at least 255
chip-hours; at most 117,054 tokens are sampled a second (docs/plans.md).
"""

from ml_collections import ConfigDict

from configs import grpo_qwen3_0p6b_v5e8

MODEL = "configs/models/Qwen3-8B"


def get_config() -> ConfigDict:
    config = grpo_qwen3_0p6b_v5e8.get_config()
    config.tokenizer.path = config.policy.path = MODEL
    config.rollout.update(prompts=64, responses=16)
    config.training.microbatches = 16
    config.mesh.update(data=1, fsdp=64, tensor=1)
    config.rollout.mesh.update(data=8, tensor=8)
    return config
