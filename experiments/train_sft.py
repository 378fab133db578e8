"""Supervised training on a task's own demonstrations (``config.warm_start``), evaluated and saved like any run.

    python -m experiments.train_sft --config=configs/quickstart.py --workdir=runs/sft
    python -m experiments.train_rl --config=configs/quickstart.py --workdir=runs/rl \\
        --config.init_from=runs/sft --config.warm_start.steps=0
"""

import sys
from collections.abc import Sequence

from experiments.program import program


@program
def main(argv: Sequence[str] | None = None) -> None:
    from jaxpo.config.command_line import asks_help, parse
    from jaxpo.parallel.host import open_devices
    from jaxpo.runs.train import train_rl

    argv = sys.argv[1:] if argv is None else argv
    if not asks_help(argv):
        open_devices()  # a config file may ask for them too
    config, flags = parse(
        argv,
        about=__doc__,
        workdir=("", "directory of the run (required)"),
        resume=(False, "evaluate what was trained and saved before the run was stopped"),
    )
    if not flags["workdir"]:
        raise ValueError("--workdir=DIRECTORY is required")
    if not config.warm_start.steps:
        raise ValueError("config.warm_start.steps is 0: there is nothing to train")
    config.steps = 0
    stopped = train_rl(config, flags["workdir"], resume=flags["resume"]).stopped
    if stopped:
        sys.exit(128 + stopped)


if __name__ == "__main__":
    main()
