"""Online DPO teaches the quickstart's transformer to spell words backward, from its own answers.

The policy writes eight answers to each word; the task's verifier picks the best and the worst. The run begins with the
quickstart's warm start; on a CPU.

    python -m experiments.train_preference --config=configs/online_dpo_reasoning_gym.py --workdir=runs/online_dpo

Expected, seed 0: greedy accuracy on 300 unseen words 0.107 after the warm start, 0.820 [0.773, 0.859] after 120
iterations (docs/preferences.md). The time was not recorded.
"""

from ml_collections import ConfigDict

from configs import dpo_reasoning_gym


def get_config() -> ConfigDict:
    config = dpo_reasoning_gym.get_config()
    config.data = ConfigDict(dict(name=None))
    config.judge = ConfigDict(dict(name="verifier"))
    config.protocol = ConfigDict(dict(name="judged", pairs="best_worst"))
    config.optimizer.learning_rate = 3e-4
    config.rollout.update(prompts=64, responses=8)
    config.steps = 120
    config.evaluation.every = 20
    return config
