"""Spell words backward, learned by DPO from pairs of a right and a wrong answer, of which 20 % are labelled the wrong
way round; a 150k-parameter policy from scratch on a CPU, after the quickstart's warm start on imperfect demonstrations.

python -m experiments.train_preference --config=configs/dpo_reasoning_gym.py --workdir=runs/dpo
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
