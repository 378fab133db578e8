"""Train a policy by reinforcement learning on verifiable tasks.

    python -m experiments.train_rl --config=configs/quickstart.py --workdir=runs/quickstart
    python -m experiments.train_rl --config=configs/quickstart.py --workdir=runs/dapo \\
        --config.objective.name=dapo --config.objective.eps_high=0.3
"""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from experiments.program import program

if TYPE_CHECKING:
    from jaxpo.config.resolved import Resolved


@program
def main(argv: Sequence[str] | None = None) -> None:
    launch(argv, __doc__)


def launch(argv: Sequence[str] | None, about: str, check: "Callable[[Resolved], None] | None" = None) -> None:
    """Join the other processes, read the command line, train.

    Args:
      about: the program's docstring, for --help.
      check: raises ``ValueError`` for a run that another program is for.

    Raises:
      SystemExit: 128 + the number of the signal that stopped the run before its end.
    """
    from jaxpo.config.command_line import asks_help
    from jaxpo.parallel.distributed import FLAGS, join_by_flags
    from jaxpo.parallel.host import open_devices

    argv = sys.argv[1:] if argv is None else argv
    if not asks_help(argv):
        join_by_flags(argv)
        open_devices()  # a config file may ask for them too
    from jaxpo.config.command_line import parse
    from jaxpo.runs.train import train_rl
    from jaxpo.runs.trust import FLAG, trust_runs

    config, flags = parse(
        argv,
        about=about,
        workdir=("", "directory of the run (required)"),
        resume=(False, "go on from the last checkpoint in workdir, if there is one"),
        other_data=(False, "with --resume: go on even if the data are not those that the run was trained on"),
        profile_steps=(0, "iterations to trace with the profiler, into workdir/profile"),
        **FLAG,
        **FLAGS,
    )
    trust_runs(flags.pop("trust"))
    if not flags["workdir"]:
        raise ValueError("--workdir=DIRECTORY is required")
    own = {name: value for name, value in flags.items() if name not in FLAGS}
    stopped = train_rl(config, **own, check=check).stopped
    if stopped:
        sys.exit(128 + stopped)


if __name__ == "__main__":
    main()
