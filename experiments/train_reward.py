"""Train a reward or preference model on pairs: Bradley-Terry, general preference model, or over traces of tool calls.

    python -m experiments.train_reward --config=configs/reward_reasoning_gym.py --workdir=runs/reward
    python -m experiments.train_reward --config=configs/reward_reasoning_gym.py --workdir=runs/gpm \\
        --config.objective.name=gpm_rm --config.heads.embed=8
    python -m experiments.train_rl --config=configs/quickstart.py --workdir=runs/rl \\
        --config.judge.name=model --config.judge.path=runs/reward

Evaluated by accuracy and calibration on held-out pairs: ``eval/accuracy``, ``eval/ece``, ``reliability.png``.
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
    """``ValueError`` for an objective that trains a policy, or without pairs to learn from."""
    from jaxpo.learning.needs import is_reward_model

    config = resolved.config
    if not is_reward_model(resolved.objective):
        raise ValueError(
            f"objective {config.objective.name!r} trains a policy, not a reward model: train it with "
            "experiments.train_preference, or set config.objective.name to bradley_terry_rm, gpm_rm or themis"
        )
    if config.data.name is None:
        raise ValueError("config.data.name is None: set it to jsonl, datasets or task, where the pairs come from")


if __name__ == "__main__":
    main()
