"""GRPO of Qwen3-8B with completions of 8192 tokens, on 64 v6e chips (v6e-64).

A chip has a third of a v5p's memory, so each prompt has half as many answers as there.

The shape of the model is in configs/models/Qwen3-8B. To train, put its safetensors and tokenizer files beside it; the
plan needs neither.

    python -m experiments.plan --config=configs/grpo_qwen3_8b_v6e64.py --topology=v6e:8x8
    python -m experiments.train_rl --config=configs/grpo_qwen3_8b_v6e64.py --workdir=runs/qwen3_8b

Expected: planned, not run. A chip holds 14.0 of 31.2 GiB. An iteration takes at least 45.5 s, 200 of them at least 162
chip-hours; at most 92,272 tokens are sampled a second (docs/plans.md).
"""

from ml_collections import ConfigDict

from configs import grpo_qwen3_8b_v5p64


def get_config() -> ConfigDict:
    config = grpo_qwen3_8b_v5p64.get_config()
    config.rollout.responses = 8
    config.training.microbatches = 8
    return config
