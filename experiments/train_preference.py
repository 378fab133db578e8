"""Train a policy on preferences: pairs, labels or scored answers from data, or the policy's own answers and a judge.

    python -m experiments.train_preference --config=configs/dpo_reasoning_gym.py --workdir=runs/dpo
    python -m experiments.train_preference --config=configs/dpo_reasoning_gym.py --workdir=runs/ipo \
        --config.objective.name=ipo --config.data.flipped=0.2
    python -m experiments.train_preference --config=configs/nash_md_reasoning_gym.py --workdir=runs/nash_md
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from experiments.train_rl import launch


def main(argv: Sequence[str] | None = None) -> None:
    launch(argv, check)


def check(config: ConfigDict) -> None:
    """``ValueError`` for an objective of rewards."""
    from jaxpo.config.resolve import objective_of, protocol_name

    if protocol_name(config, objective_of(config)) == "on_policy":
        raise ValueError(
            f"objective {config.objective.name!r} learns from rewards of single answers: train it with "
            "experiments.train_rl, or set config.data.name"
        )


if __name__ == "__main__":
    main()
