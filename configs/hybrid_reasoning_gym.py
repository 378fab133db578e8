"""A hybrid of imitation and reinforcement on the quickstart's task: demonstrations, of which 60 % lack their last
letter.

    python -m experiments.train_rl --config=configs/hybrid_reasoning_gym.py --workdir=runs/luffy

Any objective with demonstrations by its name: --config.objective.name=srft, chord, hpt, ahpo or dypo.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.objective = ConfigDict(dict(name="luffy"))
    config.protocol = ConfigDict(dict(name="demonstrations", experts=2, drop_last=0.6))
    return config
