"""Train a policy by reinforcement learning on verifiable tasks.

    python -m experiments.train_rl --config=configs/quickstart.py --workdir=runs/quickstart
    python -m experiments.train_rl --config=configs/quickstart.py --workdir=runs/dapo \
        --config.objective.name=dapo --config.objective.eps_high=0.3
"""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxpo.config.resolved import Resolved


def main(argv: Sequence[str] | None = None) -> None:
    launch(argv)


def launch(argv: Sequence[str] | None, check: "Callable[[Resolved], None] | None" = None) -> None:
    """Join the other processes, read the command line, train; every error is one line. ``check`` raises ``ValueError``
    for a run that another program is for."""
    from jaxpo.parallel.distributed import FLAGS, join_by_flags

    argv = sys.argv[1:] if argv is None else argv
    try:
        join_by_flags(argv)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    from jaxpo.config.command_line import parse
    from jaxpo.protocols.protocol import NothingLeft
    from jaxpo.runs.loop import Diverged
    from jaxpo.runs.train import train_rl
    from jaxpo.runs.trust import FLAG, trust_runs

    try:
        config, flags = parse(
            argv,
            workdir=("", "directory of the run (required)"),
            resume=(False, "go on from the last checkpoint in workdir, if there is one"),
            profile_steps=(0, "iterations to trace with the profiler, into workdir/profile"),
            **FLAG,
            **FLAGS,
        )
        trust_runs(flags.pop("trust"))
        if not flags["workdir"]:
            raise ValueError("--workdir=DIRECTORY is required")
        own = {name: value for name, value in flags.items() if name not in FLAGS}
        train_rl(config, **own, check=check)
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError, Diverged, NothingLeft) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
