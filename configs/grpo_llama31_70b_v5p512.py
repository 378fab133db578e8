"""GRPO of Llama-3.1-70B with completions of 8192 tokens, on 512 v5p chips (v5p-1024: the name counts cores).

The shape of the model is in configs/models/Llama-3.1-70B. To train, put its safetensors and tokenizer files beside it;
the plan needs neither.

    python -m experiments.plan --config=configs/grpo_llama31_70b_v5p512.py --topology=v5p:8x8x8
    python -m experiments.train_rl --config=configs/grpo_llama31_70b_v5p512.py --workdir=runs/llama31_70b

Expected: planned, not run. A chip holds 48.9 of 95.7 GiB. An iteration takes at least 212.1 s, 200 of them at least
6,032 chip-hours; at most 158,227 tokens are sampled a second (docs/plans.md).
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
