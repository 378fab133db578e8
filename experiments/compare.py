"""Draw runs together and print them side by side.

python -m experiments.compare runs/a runs/b [--out=compare.png]
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np

from experiments.program import program
from jaxpo.registry import unknown
from jaxpo.storage.plots import plot_curves
from jaxpo.storage.rundir import METRICS, closing_table, read_metrics

WINDOW = 10  # values that a last or best reward averages
COLUMNS = ("run", "reward last", "reward best", "accuracy before", "after", "steps", "wall time")
PAIRS = ("pairs before", "after")  # where a run has them: the share of held-out pairs that it orders right


@program
def main(arguments: Sequence[str] | None = None) -> None:
    """The command. Raises ``SystemExit`` with one line for a directory without a run, or a wrong ``--out``."""
    parser = argparse.ArgumentParser(prog="python -m experiments.compare", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directories of runs")
    parser.add_argument("--out", default="compare.png", help="the picture (default: %(default)s)")
    options = parser.parse_args(arguments)
    out = Path(options.out)
    if out.suffix != ".png" or not out.parent.is_dir():
        sys.exit(f"--out: {out} has to be a .png file in a directory that exists")
    try:
        runs = dict(zip(labels(options.runs), [read_metrics(find(run)) for run in options.runs], strict=True))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    pairs = any(len(_present(metrics, "eval/accuracy")) for metrics in runs.values())
    what = f"rewards are means of {WINDOW} values; accuracy is greedy, on held-out items"
    closing_table(
        what + ("; pairs: held-out ones in the right order" if pairs else ""),
        [row(label, metrics, pairs) for label, metrics in runs.items()],
        columns=(*COLUMNS[:5], *(PAIRS if pairs else ()), *COLUMNS[5:]),
    )
    plot_curves(runs, out)
    print(f"curves: {out}")


def find(directory: str) -> Path:
    """``directory`` if a run has written metrics there; ``FileNotFoundError`` naming the nearest run otherwise."""
    path = Path(directory)
    if (path / METRICS).is_file():
        return path
    known = path.parent  # look in the nearest directory that exists
    while not known.is_dir():
        known = known.parent
    found = (str(metrics.parent) for pattern in ("*", "*/*") for metrics in known.glob(f"{pattern}/{METRICS}"))
    raise FileNotFoundError(unknown("run directory", directory, found))


def labels(directories: Sequence[str]) -> list[str]:
    """Short names for the runs: the last part of the path, or as much of it as tells them apart."""
    parts = [Path(os.path.abspath(directory)).parts for directory in directories]
    if len(set(parts)) < len(parts):
        raise ValueError("runs: the same directory is given twice")
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return ["/".join(part[-length:]) for part in parts]


def row(label: str, metrics: dict[str, np.ndarray], pairs: bool = False) -> tuple[str, ...]:
    """A run's row of the table, with the columns of pairs if there are; "–" where it has no such metric."""
    rewards = _present(metrics, "reward/mean")
    accuracies = [_present(metrics, name) for name in ("eval/greedy", "eval/accuracy")[: 1 + pairs]]
    width = min(WINDOW, len(rewards))
    means = np.convolve(rewards, np.ones(width) / width, "valid") if width else np.array([math.nan])
    ends = [x for values in accuracies for x in (values[[0, -1]] if len(values) else (math.nan, math.nan))]
    seconds = _present(metrics, "time").max(initial=0)
    return (
        label,
        *(_text(value) for value in (means[-1], means.max(), *ends)),
        str(metrics["step"].max(initial=0)),
        str(timedelta(seconds=int(seconds))),
    )


def _present(metrics: dict[str, np.ndarray], name: str) -> np.ndarray:
    values = metrics.get(name, np.array([]))
    return values[np.isfinite(values)]


def _text(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


if __name__ == "__main__":
    main()
