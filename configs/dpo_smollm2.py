"""DPO with its SFT term (`rpo`) teaches SmolLM2-135M-Instruct sums and differences.

It learns from pairs of a right and a wrong number. Plain DPO (the last command) learns to tell right from wrong, and
not to say what is right. On a CPU.

    make smollm2
    python -m experiments.train_preference --config=configs/dpo_smollm2.py --workdir=runs/dpo_smollm2
    python -m experiments.train_preference --config=configs/dpo_smollm2.py --workdir=runs/plain_dpo \
        --config.objective.name=dpo

Expected: greedy accuracy on held-out questions goes from 0.438 to 0.766 in 30 iterations, with plain DPO to 0.313; 14
CPU-minutes, of which evaluations are 6 (docs/smollm2.md).
"""

from ml_collections import ConfigDict

from configs import grpo_smollm2


def get_config() -> ConfigDict:
    config = grpo_smollm2.get_config()
    config.data = ConfigDict(dict(name="task", size=180, flipped=0.0, seed=0))
    config.objective = ConfigDict(dict(name="rpo", beta=0.1, eta=1.0))
    config.optimizer.learning_rate = 3e-4
    config.rollout.update(prompts=16, responses=1)  # pairs of an iteration; answers to each prompt in the evaluation
    config.evaluation.update(every=10, pass_at=())
    return config
