"""Train a policy on preferences: pairs, labels or scored answers from data, or the policy's own answers and a judge.

    python -m experiments.train_preference --config=configs/dpo_reasoning_gym.py --workdir=runs/dpo
    python -m experiments.train_preference --config=configs/dpo_reasoning_gym.py --workdir=runs/ipo \
        --config.objective.name=ipo --config.data.flipped=0.2
    python -m experiments.train_preference --config=configs/nash_md_reasoning_gym.py --workdir=runs/nash_md
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
    from jaxpo.training.config import objective_of, protocol_name
    from jaxpo.training.loop import Diverged, train_rl
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
        if protocol_name(config, objective_of(config)) == "on_policy":
            raise ValueError(
                f"objective {config.objective.name!r} learns from rewards of single answers: train it with "
                "experiments.train_rl, or set config.data.name"
            )
        train_rl(config, **{name: value for name, value in flags.items() if name not in FLAGS})
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError, Diverged, NothingLeft) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
