"""Plot the curves of one run or several, as small multiples in a PNG.

Only matplotlib's Figure objects and the Agg canvas are used, not pyplot. So there is no global state and no display,
and notebooks and other threads are not affected.
"""

import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from jaxpo.storage.rundir import write_atomically


class Panel(NamedTuple):
    """One small plot.

    title: title of the plot.
    keys: names of metrics; the first one that has data in some run is drawn.
    scale: "linear"; "log", which is logarithmic if the values span more than a decade; "typical", which cuts off rare
      large values, such as the time of steps that compile.
    """

    title: str
    keys: tuple[str, ...]
    scale: Literal["linear", "log", "typical"] = "linear"


DEFAULT = (
    Panel("reward", ("reward/mean",)),
    Panel("held-out accuracy, greedy", ("eval/greedy",)),
    Panel("preference accuracy", ("preference/accuracy",)),
    Panel("log-prob of chosen answers", ("logp/chosen",)),
    Panel("log-prob of rejected answers", ("logp/rejected",)),
    Panel("win rate against the opponent", ("judge/win",)),
    Panel("held-out pairs, accuracy", ("eval/accuracy",)),
    Panel("held-out pairs, calibration error", ("eval/ece",)),
    Panel("entropy (nats a token)", ("entropy",)),
    Panel("KL to the reference (k3)", ("kl/ref_k3",)),
    Panel("KL to the old policy (k3)", ("kl/old_k3",)),
    Panel("completion length (tokens)", ("length/mean",)),
    Panel("gradient norm", ("grad_norm",), "log"),
    Panel("sampler against trainer: max |Δ log p|", ("mismatch/logp_abs_max",), "log"),
    Panel("seconds an iteration", ("time/iteration", "time/step"), "typical"),
)
COLORS = ("#2a6fbb", "#d1603d", "#3d9a6b", "#8a5fb0", "#c79a1e", "#4aa3b5", "#b0477e", "#6b6b6b")
INK, PALE = "#2b2b2b", "#8c8c8c"
MARKED, DRAWN = 40, 1500  # curves with fewer points get markers, curves with more points are binned


def plot_curves(
    runs: Mapping[str, Mapping[str, np.ndarray]], path: str | os.PathLike, keys: Sequence[Panel | str] = DEFAULT
) -> None:
    """Draw the metrics of one run or several into a PNG. An existing PNG is replaced at once.

    A metric with many points is drawn faint with a smoothed line over it; one with few points (an evaluation) is drawn
    with markers. If the metrics ``<key>_lo`` and ``<key>_hi`` exist, a band shows them. Panels without data are left
    out.

    Args:
      runs: label → columns as ``read_metrics`` returns them, [n] each, with "step".
      path: the path of the PNG.
      keys: panels, or names of metrics.

    Raises:
      ValueError: there is no run, or a run has no "step".
    """
    if not runs:
        raise ValueError("runs: there is nothing to draw")
    for label, run in runs.items():
        if "step" not in run:
            raise ValueError(f"runs: {label!r} has no column 'step'")
    panels = [(Panel(key, (key,)) if isinstance(key, str) else key) for key in keys]
    chosen = [(panel, key) for panel in panels if (key := _first_with_data(panel, runs))]
    figure, grid = _figure(len(chosen), labels=list(runs) if len(runs) > 1 else [])
    for (panel, key), axes in zip(chosen, grid, strict=True):
        curves = {label: _points(run, key) for label, run in runs.items()}
        values = np.concatenate([value for _, value in curves.values()])
        log = panel.scale == "log" and values.min() > 0 and values.max() > 10 * values.min()
        most = 2 * np.percentile(values, 95) if panel.scale == "typical" else np.inf
        for color, (label, (steps, value)) in zip(cycle(COLORS), curves.items(), strict=False):
            _draw(axes, steps, np.minimum(value, most), color, log)
            _draw_band(axes, _points(runs[label], key + "_lo"), _points(runs[label], key + "_hi"), color)
        _dress(axes, panel.title, log)
    if not chosen:
        figure.text(0.5, 0.5, "no metrics yet", ha="center", va="center", color=PALE)
    write_atomically(Path(path), lambda file: figure.savefig(file, format="png"))


def plot_reliability(bins: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Draw a reliability diagram: a bar for each bin of confidence, whose height is the accuracy in that bin. A thinner
    bar shows the share of pairs in the bin. A calibrated model lies on the diagonal.

    Args:
      bins: confidence, accuracy and share by bin, and the number of pairs.
      path: the path of the PNG, which is replaced at once."""
    figure = Figure(figsize=(3.6, 3.4), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes, width = figure.subplots(), 0.5 / len(bins["share"])
    left = [0.5 + width * i for i in range(len(bins["share"]))]
    axes.bar(left, bins["accuracy"], width, align="edge", color=COLORS[0], alpha=0.75, edgecolor="white")
    axes.bar(left, bins["share"], 0.3 * width, align="edge", color=PALE, label="share of pairs")
    filled = [i for i, share in enumerate(bins["share"]) if share > 0]
    axes.plot([bins["confidence"][i] for i in filled], [bins["accuracy"][i] for i in filled], "o", color=INK, ms=3)
    axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.8, linestyle=":")
    axes.set(xlim=(0.5, 1), ylim=(0, 1), xlabel="stated probability", ylabel="share that is right")
    axes.set_title(f"{bins['pairs']} held-out pairs", loc="left", fontsize=9.5, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    write_atomically(Path(path), lambda file: figure.savefig(file, format="png"))


def smooth(values: np.ndarray, width: float) -> np.ndarray:
    """Gaussian average over neighbors [n] → [n]; ``width`` is the standard deviation in points. Fewer at the ends."""
    reach = min(int(3 * width), len(values) - 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    weight = np.convolve(np.ones(len(values)), kernel)[reach : reach + len(values)]
    return np.convolve(values, kernel)[reach : reach + len(values)] / weight


def _points(run: Mapping[str, np.ndarray], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values where the run has the metric."""
    values = np.asarray(run.get(key, np.full(len(run["step"]), np.nan)), np.float64)
    have = np.isfinite(values)
    return np.asarray(run["step"])[have], values[have]


def _first_with_data(panel: Panel, runs: Mapping[str, Mapping[str, np.ndarray]]) -> str | None:
    return next((key for key in panel.keys if any(len(_points(run, key)[0]) for run in runs.values())), None)


def _figure(panels: int, labels: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """An empty grid, row by row, under a legend of the labels. The margins are fixed, as computing them would draw the
    figure twice."""
    columns = min(3, max(1, panels))
    rows = -(-panels // columns) or 1
    top = 0.38 + 0.24 * -(-len(labels) // columns)  # inches
    width, height = 4.1 * columns, 2.35 * rows + top
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    figure.subplots_adjust(
        left=0.55 / width, right=1 - 0.15 / width, bottom=0.48 / height, top=1 - top / height, wspace=0.17, hspace=0.33
    )
    grid = [figure.add_subplot(rows, columns, index + 1) for index in range(panels)]
    for axes in grid[max(0, panels - columns) :]:
        axes.set_xlabel("step", fontsize=8.5, color=PALE)
    if labels:
        lines = [Line2D([], [], color=color, linewidth=2.5) for color, _ in zip(cycle(COLORS), labels, strict=False)]
        figure.legend(
            lines,
            labels,
            loc="upper left",
            bbox_to_anchor=(0.4 / width, 1.0),
            ncols=columns,
            frameon=False,
            fontsize=9.5,
            labelcolor=INK,
        )
    return figure, grid


def _draw(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, log: bool) -> None:
    if len(steps) < MARKED:
        axes.plot(steps, values, color=color, linewidth=1.6, marker="o", markersize=3.5, markeredgewidth=0)
        return
    bins = np.arange(0, len(steps), -(-len(steps) // DRAWN))  # draw thousands of points as means over bins
    count = np.diff(bins, append=len(steps))
    means = np.add.reduceat(np.log(values) if log else values, bins) / count
    line = smooth(means, max(2.0, len(means) / 50))
    axes.plot(steps[bins], values[bins], color=color, linewidth=0.7, alpha=0.28)
    axes.plot(steps[bins], np.exp(line) if log else line, color=color, linewidth=1.7)


def _draw_band(axes: Axes, low: tuple[np.ndarray, np.ndarray], high: tuple[np.ndarray, np.ndarray], color: str) -> None:
    if len(low[0]) and np.array_equal(low[0], high[0]):
        axes.fill_between(low[0], low[1], high[1], color=color, alpha=0.15, linewidth=0)


def _dress(axes: Axes, title: str, log: bool) -> None:
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.margins(x=0.015)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 3.0)))
    else:
        low, high = axes.get_ylim()
        if 0 < low < 0.5 * high:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 2.5, 5, 10)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e"))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=(1, 2, 5, 10)))
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#bdbdbd")
    axes.tick_params(which="both", colors=PALE, labelcolor="#5c5c5c", labelsize=8, length=0)
