"""GRPO of Qwen3-30B-A3B with completions of 8192 tokens, on 128 v5p chips (v5p-256: the name counts cores).

The model is a mixture of 128 experts.

The shape of the model is in configs/models/Qwen3-30B-A3B. To train, put its safetensors and tokenizer files beside it;
the plan needs neither.

    python -m experiments.plan --config=configs/grpo_qwen3_30b_a3b_v5p128.py --topology=v5p:4x4x8
    python -m experiments.train_rl --config=configs/grpo_qwen3_30b_a3b_v5p128.py --workdir=runs/qwen3_30b_a3b

Expected: planned, not run. A chip holds 19.6 of 95.7 GiB. An iteration takes at least 109.0 s, 200 of them at least
775 chip-hours; at most 153,911 tokens are sampled a second (docs/plans.md).
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
