"""DPO teaches the quickstart's transformer to spell words backward, from pairs of a right and a wrong answer.

A fifth of the pairs have the wrong label. The run begins with the quickstart's warm start; on a CPU.

    python -m experiments.train_preference --config=configs/dpo_reasoning_gym.py --workdir=runs/dpo

Expected, seed 0: greedy accuracy on 300 unseen words 0.107 after the warm start, 0.767 [0.716, 0.811] after 300
iterations (docs/preferences.md). The time was not recorded.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.data = ConfigDict(dict(name="task", flipped=0.2, seed=0))
    config.objective = ConfigDict(dict(name="dpo", beta=0.1, eps=0.0))
    config.optimizer.update(name="adamw", learning_rate=1e-4, b2=0.95, weight_decay=0.0, clip_norm=1.0)
    config.rollout.update(prompts=64, responses=1)  # pairs of an iteration; answers to each prompt in the evaluation
    config.training.microbatches = 1
    config.steps = 300
    config.evaluation.update(every=50, prompts=300, pass_at=())
    return config
