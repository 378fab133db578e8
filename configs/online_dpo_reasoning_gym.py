"""Spell words backward, learned by online DPO: eight answers of the policy to each word, the best against the worst as
the task's verifier says; on a CPU, after the quickstart's warm start on imperfect demonstrations.

python -m experiments.train_preference --config=configs/online_dpo_reasoning_gym.py --workdir=runs/online_dpo
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
