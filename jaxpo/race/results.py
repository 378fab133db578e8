"""Results of a race: table, figure and file."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.special import stdtrit

from jaxpo.files import read_json
from jaxpo.race.rules import Rules
from jaxpo.storage.plots import COLORS, INK, PALE
from jaxpo.storage.rundir import closing_table, write_atomically

RESULTS, CURVES = "results.json", "curves.png"


def interval(values: list[float]) -> tuple[float, float, float]:
    """The mean over seeds and its 95% interval by Student's t, inside [0, 1]; NaN bounds for one seed."""
    x, n = np.asarray(values, np.float64), len(values)
    half = stdtrit(n - 1, 0.975) * x.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    low, high = (float(np.clip(x.mean() + sign * half, 0, 1)) for sign in (-1, 1))
    return float(x.mean()), low, high


@dataclass(frozen=True)
class Results:
    """Results of a race, as ``results.json`` holds them.

    rules: the fields of its `Rules`.
    points: iterations at which accuracy was measured.
    warm_start_seconds: time of the warm start, which all contenders share.
    objectives: label -> the entry that `jaxpo.race.race.run` returns:
      final: greedy accuracy at the end, one number for each seed.
      area: mean of greedy accuracy over the race (area under the learning curve), one number for each seed.
      curve: greedy accuracy, [points][seeds].
      seconds: time of the contender.
      compiling: seconds of its first iteration, part of ``seconds``.
      sampled: completions of one seed in one iteration.
      skipped: optimizer steps that were not finite.
      idle: iterations, summed over seeds, in which the protocol found nothing to train on.
    left_out: label -> why it did not race.
    """

    rules: dict[str, Any]
    points: list[int]
    warm_start_seconds: float = 0.0
    objectives: dict[str, dict[str, Any]] = None
    left_out: dict[str, str] = None

    def ranking(self) -> list[str]:
        """The labels, best mean final accuracy first; in a tie, larger area first."""
        means = {k: (np.mean(r["final"]), np.mean(r["area"])) for k, r in self.objectives.items()}
        return sorted(means, key=lambda label: means[label], reverse=True)

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table."""
        out = []
        for label in self.ranking():
            result = self.objectives[label]
            cells = []
            for mean, low, high in (interval(result["final"]), interval(result["area"])):
                cells += [f"{mean:.3f}", "–" if math.isnan(low) else f"{low:.2f}–{high:.2f}"]
            more = f"{result['sampled']:.0f}", f"{result['seconds']:.0f}"
            out.append((label, *cells, *more))
        return out

    def show(self) -> None:
        """Print the table, skipped steps and idle iterations, and who did not race.

        The column ``samples`` holds the completions of one seed in one iteration.
        """
        rules, start = self.rules, interval(next(iter(self.objectives.values()))["curve"][0])[0]
        closing_table(
            f"{rules['task']}: greedy accuracy after {rules['steps']} iterations, {rules['seeds']} seeds, "
            f"from {start:.3f} (95% intervals over seeds)",
            self.rows(),
            columns=("objective", "final", "95%", "area", "95%", "samples", "s"),
        )
        for label, result in self.objectives.items():
            if result["skipped"]:
                print(f"{label}: {result['skipped']} optimizer steps were not finite and were skipped")
            if result["idle"]:
                print(f"{label}: its protocol found nothing to train on in {result['idle']} iterations (of all seeds)")
        for label, why in self.left_out.items():
            print(f"{label} did not race: {why}")

    def figure(self) -> Figure:
        """Draw one panel for each objective, in order of rank: mean and range over seeds, all others in grey."""
        labels = self.ranking()
        columns = min(6, math.ceil(math.sqrt(len(labels))))
        rows = -(-len(labels) // columns)
        figure = Figure(
            figsize=(2.3 * columns + 0.6, 1.9 * rows + 0.5), dpi=110, facecolor="white", layout="constrained"
        )
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        means = {label: np.mean(self.objectives[label]["curve"], axis=1) for label in labels}
        for axes, label in zip(grid, labels, strict=False):
            self._panel(axes, label, means)
        for axes in grid[len(labels) :]:
            axes.set_visible(False)
        for axes in grid[max(len(labels) - columns, 0) : len(labels)]:  # the lowest of each column
            axes.tick_params(labelbottom=True)
        figure.supxlabel("iteration", fontsize=8.5, color=PALE)
        figure.supylabel("greedy accuracy", fontsize=8.5, color=PALE)
        return figure

    def _panel(self, axes: Axes, label: str, means: Mapping[str, np.ndarray]) -> None:
        for mean in means.values():
            axes.plot(self.points, mean, color="#d9d9d9", linewidth=0.7)
        curve, color = np.asarray(self.objectives[label]["curve"]), COLORS[0]
        axes.fill_between(self.points, curve.min(1), curve.max(1), color=color, alpha=0.18, linewidth=0)
        axes.plot(self.points, means[label], color=color, linewidth=1.8)
        title = label if len(label) <= 30 else label[:29] + "…"
        axes.set_title(f"{title}  {means[label][-1]:.2f}", loc="left", fontsize=8, color=INK)
        axes.set_ylim(0, 1)
        axes.margins(x=0.02)
        axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#bdbdbd")
        axes.tick_params(which="both", colors=PALE, labelcolor="#5c5c5c", labelsize=7, length=0)

    def save(self, folder: str | os.PathLike) -> None:
        """Write ``results.json`` and ``curves.png``, each atomically: a reader sees the old file or the new one."""
        text = json.dumps(asdict(self), indent=1)
        write_atomically(Path(folder) / RESULTS, lambda file: file.write(text.encode()))
        write_atomically(Path(folder) / CURVES, lambda file: self.figure().savefig(file, format="png"))


def earlier(folder: Path, rules: Rules) -> Results | None:
    """Read the results in ``folder``; None if there are none.

    Raises:
      ValueError: they come from a race with other rules; the error names the first difference.
    """
    if not (folder / RESULTS).is_file():
        return None
    found = Results(**read_json(folder / RESULTS))
    for name, value in asdict(rules).items():
        if found.rules.get(name) != value:
            raise ValueError(
                f"{folder / RESULTS} is of a race with {name}={found.rules.get(name)}, and this one has "
                f"{name}={value}: use the same value, or another folder"
            )
    return found
