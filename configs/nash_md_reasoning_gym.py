"""Nash-MD teaches the quickstart's transformer to spell words backward.

The policy's answers play against those of a geometric mixture of the policy and the reference; the task's verifier
judges. The run begins with the quickstart's warm start; on a CPU.

    python -m experiments.train_preference --config=configs/nash_md_reasoning_gym.py --workdir=runs/nash_md

Expected, seed 0: greedy accuracy on 300 unseen words 0.107 after the warm start, 0.827 [0.780, 0.865] after 120
iterations (docs/preferences.md). The time was not recorded.
"""

from ml_collections import ConfigDict

from configs import online_dpo_reasoning_gym


def get_config() -> ConfigDict:
    config = online_dpo_reasoning_gym.get_config()
    config.objective = ConfigDict(dict(name="nash_md", tau=0.008, mixture=0.125))
    config.protocol = ConfigDict(dict(name="nash_md"))
    return config
