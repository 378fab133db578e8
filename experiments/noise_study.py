"""How much wrong labels cost: preference objectives on pairs of which a share is labelled the wrong way.

    python -m experiments.noise_study --out=races/noise
    python -m experiments.noise_study --shares=0,0.1,0.3 --seeds=5 --steps=100 --out=races/noise-5

One race (`experiments.race`) for each share, of the same rules otherwise: `dpo`; cDPO, which is `dpo` with label
smoothing; `rdpo`; `ipo`. cDPO and rdpo are told the share (0.1 where it is 0). Writes ``table.md`` and ``noise.png`` to
--out, and the race of each share to a folder of its own; called again, it runs only what is missing.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.program import program

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from jaxpo.race.results import Results

TOLD_AT_LEAST = 0.1


def methods(share: float) -> dict[str, str]:
    """The study's objectives as a race reads them, by the name they have in the table."""
    told = max(share, TOLD_AT_LEAST)
    return {"dpo": "dpo", "cDPO": f"dpo(eps={told:g})", "rdpo": f"rdpo(eps={told:g})", "ipo": "ipo"}


def study(shares: Sequence[float], rules: object, out: Path) -> dict[float, dict[str, list[float]]]:
    """share -> method -> final greedy accuracy of every seed."""
    from jaxpo.race.race import race

    found = {}
    for share in shares:
        calls = methods(share)
        results: Results = race(",".join(calls.values()), replace(rules, flipped=share), out=out / f"flipped_{share:g}")
        found[share] = {name: results.objectives[label]["final"] for name, label in calls.items()}
        found[share]["start"] = results.objectives["dpo"]["curve"][0]
    return found


def table(found: Mapping[float, Mapping[str, list[float]]]) -> str:
    """Markdown: a row for each method, mean and 95% interval over seeds for each share of flipped labels."""
    from jaxpo.race.results import interval

    def cell(values: list[float]) -> str:
        mean, low, high = interval(values)
        return f"{mean:.3f} ({low:.2f}–{high:.2f})" if len(values) > 1 else f"{mean:.3f}"

    names = ["start", *methods(0.0)]
    head = "| flipped labels | " + " | ".join(f"{share:.0%}" for share in found) + " |"
    rows = [f"| {name} | " + " | ".join(cell(seen[name]) for seen in found.values()) + " |" for name in names]
    return "\n".join([head, "|---|" + "---|" * len(found), *rows])


def figure(found: Mapping[float, Mapping[str, list[float]]]) -> "Figure":
    """Final accuracy by the share of flipped labels: mean and range over seeds, a line for each method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from jaxpo.storage.plots import COLORS

    picture = Figure(figsize=(5.2, 3.2), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots()
    for i, name in enumerate(methods(0.0)):
        x = [100 * share + 0.4 * (i - 1.5) for share in found]
        seeds = [seen[name] for seen in found.values()]
        mean = [sum(s) / len(s) for s in seeds]
        axes.plot(x, mean, color=COLORS[i], marker="o", markersize=4, label=name)
        axes.vlines(x, [min(s) for s in seeds], [max(s) for s in seeds], color=COLORS[i], alpha=0.4)
    start = [sum(seen["start"]) / len(seen["start"]) for seen in found.values()]
    axes.plot([100 * share for share in found], start, color="#bdbdbd", linestyle=":", label="before")
    axes.set(xlabel="% of labels flipped", ylabel="greedy accuracy", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", frameon=False, fontsize=8)
    return picture


@program
def main(argv: Sequence[str] | None = None) -> dict[float, dict[str, list[float]]]:
    """The command. Raises ``SystemExit`` with one line for what cannot be."""
    from experiments.race import HELP
    from jaxpo.config.command_line import parse
    from jaxpo.race.rules import Rules

    rules = Rules(seeds=3)
    flags = {name: (value, HELP[name]) for name, value in asdict(rules).items() if name != "flipped"}
    flags["shares"] = ("0,0.2,0.4", "of flipped labels")
    flags["out"] = ("races/noise", "folder of tables, pictures and races")
    _, given = parse(list(sys.argv[1:] if argv is None else argv), about=__doc__, config_required=False, **flags)
    shares, out = [float(x) for x in given.pop("shares").split(",")], Path(given.pop("out"))
    if wrong := [x for x in shares if not 0 <= x < 0.5]:
        raise ValueError(f"--shares: rdpo needs less than half of the labels flipped, not {wrong[0]:g}")
    found = study(shares, Rules(**given), out)
    (out / "table.md").write_text(table(found) + "\n")
    figure(found).savefig(out / "noise.png")
    print(table(found))
    print(f"results: {out}/table.md, {out}/noise.png")
    return found


if __name__ == "__main__":
    main()
