"""Supervised training on a task's own demonstrations (``config.warm_start``), evaluated and saved like any run.

    python -m experiments.train_sft --config=configs/quickstart.py --workdir=runs/sft
    python -m experiments.train_rl --config=configs/quickstart.py --workdir=runs/rl \
        --config.init_from=runs/sft --config.warm_start.steps=0
"""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    from jaxpo.config.command_line import parse
    from jaxpo.runs.train import train_rl

    try:
        config, flags = parse(sys.argv[1:] if argv is None else argv, workdir=("", "directory of the run (required)"))
        if not flags["workdir"]:
            raise ValueError("--workdir=DIRECTORY is required")
        if not config.warm_start.steps:
            raise ValueError("config.warm_start.steps is 0: there is nothing to train")
        config.steps = 0
        train_rl(config, flags["workdir"])
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
