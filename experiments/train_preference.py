"""Train a policy on preferences: pairs, labels or scored answers from data, or the policy's own answers and a judge.

    python -m experiments.train_preference --config=configs/dpo_reasoning_gym.py --workdir=runs/dpo
    python -m experiments.train_preference --config=configs/dpo_reasoning_gym.py --workdir=runs/ipo \\
        --config.objective.name=ipo --config.data.flipped=0.2
    python -m experiments.train_preference --config=configs/nash_md_reasoning_gym.py --workdir=runs/nash_md
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.program import program
from experiments.train_rl import launch

if TYPE_CHECKING:
    from jaxpo.config.resolved import Resolved


@program
def main(argv: Sequence[str] | None = None) -> None:
    launch(argv, __doc__, check)


def check(resolved: "Resolved") -> None:
    """``ValueError`` for an objective of rewards."""
    if resolved.protocol_name == "on_policy":
        raise ValueError(
            f"objective {resolved.config.objective.name!r} learns from rewards of single answers: train it with "
            "experiments.train_rl, or set config.data.name"
        )


if __name__ == "__main__":
    main()
