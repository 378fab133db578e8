"""Draws docs/concepts.png, the way of a batch through one iteration.

python docs/draw_concepts.py
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, FAINT = "#22303c", "#6b7a88"
PROTOCOL, POLICY, OBJECTIVE, OPTIMIZER = "#1b9e77", "#3b73b9", "#d95f02", "#7a5195"
WIDTH, HEIGHT, GAP, TOP, BOTTOM = 2.1, 1.0, 0.55, 3.6, 0.9
# name, what happens, fields that it writes, color of who does it
GATHER = (
    ("prompts", "draw the next ones", "prompt", PROTOCOL),
    ("generate", "K answers to each", "tokens mask group logp_beh", POLICY),
    ("reward", "verifier or judge", "reward  correct", PROTOCOL),
    ("score", "policy and references", "logp_old  logp_ref", POLICY),
)
LEARN = (
    ("prepare", "once for all rows", "adv", OBJECTIVE),
    ("weigh", "fix every weight", "weights", OBJECTIVE),
    ("loss slices", "sum(weight * value)", "slices add up", OBJECTIVE),
    ("optimizer step", "optax, then update", "new parameters", OPTIMIZER),
    ("finish", "the protocol's last word", "references move", PROTOCOL),
)


def left_of(place: int) -> float:
    """The left edge of the box at a place of its row."""
    return 0.3 + place * (WIDTH + GAP)


def middle_of(place: int) -> float:
    """The middle of the box at a place of its row."""
    return left_of(place) + WIDTH / 2


def frame(axes: Axes, x: float, y: float, width: float, height: float, rounding: float, **style: Any) -> None:
    """A rectangle with round corners."""
    boxstyle = f"round,pad=0,rounding_size={rounding}"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=boxstyle, **style))


def note(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    """Text around a point."""
    axes.text(x, y, text, **(dict(ha="center", va="center", fontsize=10, color=FAINT) | style))


def arrow(axes: Axes, *points: tuple[float, float]) -> None:
    """A line through the points, with a head at the last one."""
    for a, b in zip(points[:-2], points[1:-1], strict=True):
        axes.plot(*zip(a, b, strict=True), color=INK, lw=1.4, solid_capstyle="round")
    style = dict(arrowstyle="-|>", mutation_scale=13, color=INK, lw=1.4, shrinkA=0, shrinkB=0)
    axes.add_patch(FancyArrowPatch(*points[-2:], **style))


def draw_row(axes: Axes, y: float, steps: tuple[tuple[str, ...], ...]) -> None:
    """The steps of a row, what each writes, and the arrows between them."""
    for place, (name, what, writes, color) in enumerate(steps):
        x = middle_of(place)
        frame(axes, left_of(place), y, WIDTH, HEIGHT, 0.12, facecolor=color + "1f", edgecolor=color, lw=1.8)
        note(axes, x, y + 0.64, name, fontsize=13, weight="bold", color=INK)
        note(axes, x, y + 0.27, what, color=INK)
        note(axes, x, y - 0.2, writes, fontsize=8.5, family="monospace")
        if place:
            arrow(axes, (left_of(place) - GAP + 0.06, y + HEIGHT / 2), (left_of(place) - 0.06, y + HEIGHT / 2))


def draw_ways(axes: Axes) -> None:
    """From the upper row to the lower one, and back for the next iteration."""
    first, turn, end, lower = middle_of(0), middle_of(3), middle_of(4), BOTTOM + HEIGHT + 0.06
    arrow(axes, (turn, TOP - 0.36), (turn, TOP - 0.75), (first, TOP - 0.75), (first, lower))
    note(axes, (first + turn) / 2, TOP - 0.56, "one Rollouts, all rows")
    arrow(axes, (end, lower), (end, TOP + 1.3), (first, TOP + 1.3), (first, TOP + HEIGHT + 0.06))
    note(axes, end - 0.12, TOP + 0.5, "next iteration,\nnew parameters", ha="right")


def draw_labels(axes: Axes) -> None:
    """Titles, the part that is repeated, and who owns which color."""
    title = dict(ha="left", fontsize=11, weight="bold")
    note(axes, left_of(0), TOP + 1.55, "GATHER", **title)
    note(axes, left_of(0) + 1.05, TOP + 1.55, "the protocol says how, a gatherer does it", ha="left")
    note(axes, left_of(0), BOTTOM + 1.3, "LEARN", **title)
    left, right = left_of(1) - 0.25, left_of(4) - 0.3
    dashed = dict(facecolor="none", edgecolor=FAINT, lw=1.2, ls=(0, (4, 3)))
    frame(axes, left, BOTTOM - 0.5, right - left, HEIGHT + 0.78, 0.2, **dashed)
    note(axes, (left + right) / 2, BOTTOM - 0.72, "for each optimizer batch")
    owners = {"task and protocol": PROTOCOL, "policy": POLICY, "objective": OBJECTIVE, "optimizer": OPTIMIZER}
    for place, (owner, color) in enumerate(owners.items()):
        x = left_of(0) + 2.2 * place
        frame(axes, x, -0.3, 0.24, 0.2, 0.05, facecolor=color + "1f", edgecolor=color, lw=1.5)
        note(axes, x + 0.36, -0.2, owner, ha="left", color=INK)


if __name__ == "__main__":
    figure, axes = plt.subplots(figsize=(13.2, 5.4), layout="constrained")
    axes.set(xlim=(0, left_of(5) - GAP + 0.3), ylim=(-0.35, 5.5))
    axes.axis("off")
    draw_row(axes, TOP, GATHER)
    draw_row(axes, BOTTOM, LEARN)
    draw_ways(axes)
    draw_labels(axes)
    figure.savefig(Path(__file__).with_name("concepts.png"), dpi=110)
