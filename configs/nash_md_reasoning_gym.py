"""Spell words backward, learned by Nash-MD: the policy's answers against those of a geometric mixture of itself and
the reference, judged by the task's verifier; on a CPU, after the quickstart's warm start on imperfect demonstrations.

python -m experiments.train_preference --config=configs/nash_md_reasoning_gym.py --workdir=runs/nash_md
"""

from ml_collections import ConfigDict

from configs import online_dpo_reasoning_gym


def get_config() -> ConfigDict:
    config = online_dpo_reasoning_gym.get_config()
    config.objective = ConfigDict(dict(name="nash_md", tau=0.008, mixture=0.125))
    config.protocol = ConfigDict(dict(name="nash_md"))
    return config
