"""Train a reward or preference model on pairs: Bradley-Terry, general preference model, or over traces of tool calls.

    python -m experiments.train_reward --config=configs/reward_reasoning_gym.py --workdir=runs/reward
    python -m experiments.train_reward --config=configs/reward_reasoning_gym.py --workdir=runs/gpm \\
        --config.objective.name=gpm_rm --config.heads.embed=8
    python -m experiments.train_rl --config=configs/quickstart.py --workdir=runs/rl \\
        --config.judge.name=model --config.judge.path=runs/reward

Evaluated by accuracy and calibration on held-out pairs: ``eval/accuracy``, ``eval/ece``, ``reliability.png``.
"""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    from jaxpo.parallel.distributed import FLAGS, join_by_flags

    argv = sys.argv[1:] if argv is None else argv
    try:
        join_by_flags(argv)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    from jaxpo.training.command_line import parse
    from jaxpo.training.config import objective_of
    from jaxpo.training.loop import Diverged, train_rl
    from jaxpo.training.needs import is_reward_model
    from jaxpo.training.protocols import NothingLeft

    try:
        config, flags = parse(
            argv,
            workdir=("", "directory of the run (required)"),
            resume=(False, "go on from the last checkpoint in workdir, if there is one"),
            profile_steps=(0, "iterations to trace with the profiler, into workdir/profile"),
            **FLAGS,
        )
        if not flags["workdir"]:
            raise ValueError("--workdir=DIRECTORY is required")
        if not is_reward_model(objective_of(config)):
            raise ValueError(
                f"objective {config.objective.name!r} trains a policy, not a reward model: train it with "
                "experiments.train_preference, or set config.objective.name to bradley_terry_rm, gpm_rm or themis"
            )
        if config.data.name is None:
            raise ValueError("config.data.name is None: set it to jsonl, datasets or task, where the pairs come from")
        train_rl(config, **{name: value for name, value in flags.items() if name not in FLAGS})
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError, Diverged, NothingLeft) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
