"""GRPO of Qwen3-0.6B with completions of 8192 tokens, on 8 v5e chips.

The shape of the model is in configs/models/Qwen3-0.6B. To train, put its safetensors and tokenizer files beside it;
the plan needs neither.

    python -m experiments.plan --config=configs/grpo_qwen3_0p6b_v5e8.py --topology=v5e:2x4
    python -m experiments.train_rl --config=configs/grpo_qwen3_0p6b_v5e8.py --workdir=runs/qwen3_0p6b

Expected: planned, not run. A chip holds 9.9 of 15.8 GiB. An iteration takes at least 59.4 s, 200 of them at least 26
chip-hours; at most 8,833 tokens are sampled a second (docs/plans.md).
"""

from ml_collections import ConfigDict

from jaxpo.config.fields import default

MODEL = "configs/models/Qwen3-0.6B"


def get_config() -> ConfigDict:
    config = default()
    config.task = ConfigDict(
        dict(name="reasoning_gym", dataset="gsm_symbolic", train_size=20000, test_size=256, seed=0)
    )
    config.tokenizer = ConfigDict(dict(name="pretrained", path=MODEL))
    config.policy = ConfigDict(dict(name="pretrained", path=MODEL, dtype="bfloat16", remat="full"))
    config.sampling.max_new_tokens = 8192
    config.objective = ConfigDict(dict(name="grpo", beta=0.001, agg="token_mean"))
    config.optimizer.update(name="adamw", learning_rate=1e-6, b2=0.95, weight_decay=0.0, clip_norm=1.0)
    config.optimizer.schedule.warmup_steps = 10
    config.rollout.update(prompts=8, responses=8, prompt_width=512)
    config.training.microbatches = 8
    config.mesh.update(data=1, fsdp=8, tensor=1)
    config.rollout.mesh.data = 8  # every chip samples with the whole policy: nothing is sent
    config.rollout.scan_layers = True
    config.steps = 200
    config.evaluation.update(every=50, prompts=64, pass_at=())
    config.checkpoint.update(every=25, keep=3)
    return config
