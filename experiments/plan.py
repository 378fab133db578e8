"""Whether a run fits on chips that are not there, what bounds it and what it costs: its real steps, compiled for them.

    python -m experiments.plan --config=configs/grpo_qwen3_0p6b_v5e8.py --topology=v5e:2x4 --price=1.2
    python -m experiments.plan --config=... --topology=v5p:4x4x4 --search=3 --json=plan.json

No accelerator is needed, but libtpu is: pip install -e '.[plan]'.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.program import program


@program
def main(argv: Sequence[str] | None = None) -> None:
    import jax

    from jaxpo.config.command_line import parse

    if jax.config.jax_platforms is None:  # with libtpu installed and no chip, jax would try the chip first
        jax.config.update("jax_platforms", "cpu")
    config, flags = parse(
        sys.argv[1:] if argv is None else argv,
        about=__doc__,
        topology=("", "slice to compile for, e.g. v5e:2x4 or v5p:4x4x4 (required)"),
        price=(0.0, "of a chip-hour, in any currency; 0 = no cost"),
        json=("", "also write the plan to this file"),
        search=(0, "rank meshes and microbatches, compile so many of the best, plan the fastest that fits"),
        propose=(True, "when it does not fit, compile changes until one does"),
    )
    plan(config, **flags)


def plan(config, *, topology: str, price: float, json: str, search: int, propose: bool):
    """Print the plan of a config for a slice; the numbers too, where ``json`` names a file. Returns what was
    printed last: the plan that fits, if one was found."""
    from jaxpo.arguments import Count, NonNegative, check
    from jaxpo.parallel.host import open_devices
    from jaxpo.plan import plan as plans
    from jaxpo.plan import search as searches
    from jaxpo.plan import topology as topologies

    open_devices()
    if not topology:
        raise ValueError("--topology=CHIP:SHAPE is required, e.g. v5e:2x4")
    check("--price", price, NonNegative)
    check("--search", search, Count)
    if json and not Path(json).absolute().parent.is_dir():
        raise ValueError(f"--json={json}: there is no such folder")
    where = topologies.parse(topology)
    if search:
        found = searches.fastest(config, where, compile_most=search, say=say)
    else:
        found = plans.make_plan(config, where, say=say)
    show(found, price)
    proposals = []
    if not found.fits and propose:
        proposals = searches.proposals(config, where, found, say=say)
        show_proposals(proposals)
    if json:
        write(Path(json), found, proposals, price)
    return found


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def write(path: Path, found, proposals: list, price: float) -> None:
    """The numbers of `Plan.to_dict`, and the proposals beside them."""
    numbers = found.to_dict(price or None)
    numbers["proposals"] = [dict(change=change, plan=p.to_dict(price or None)) for change, p in proposals]
    path.write_text(json.dumps(numbers, indent=1) + "\n")


# ---- tables

GB, MB = 2**30, 2**20


def size(n: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{n / GB:.2f} GiB" if n >= GB / 10 else f"{n / MB:.2f} MiB"


def time(s: float) -> str:
    """Seconds in the unit that suits."""
    return f"{s:.2f} s" if s >= 1 else f"{1e3 * s:.3g} ms"


def count(n: float) -> str:
    """Operations in tera-operations."""
    return f"{n / 1e12:,.3g} T"


def rows_of(found) -> list[tuple[str, ...]]:
    """The lines of the table: a name, a column for each step, and what an iteration adds up to."""
    from operator import attrgetter

    from jaxpo.plan import roofline

    steps, hbm = [s for s in found.steps if s.error is None], found.chip.hbm
    terms = {term: None for s in steps for term in s.seconds}

    def line(name, value, written, adds=False) -> tuple[str, ...]:
        total = written(sum(s.times * value(s) for s in steps)) if adds else ""
        return (name, *(written(value(s)) for s in steps), total)

    def sent(kind):
        return lambda s: sum(c.bytes for c in s.collectives if c.kind == kind)

    return [
        line("calls per iteration", attrgetter("times"), str),
        *(line(f"bytes: {name}", lambda s, name=name: s.memory[name], size) for name in steps[0].memory),
        line("bytes in all", attrgetter("peak"), size),
        *([line("bytes in the host's memory", attrgetter("host"), size)] if any(s.host for s in steps) else []),
        line(f"of {size(hbm)} HBM", lambda s: s.peak / hbm, "{:.0%}".format),
        *(line(f"sent: {k}", sent(k), size, True) for k in sorted({c.kind for s in steps for c in s.collectives})),
        line("HBM traffic", attrgetter("hbm"), size, True),
        line("operations, all chips", attrgetter("operations"), count, True),
        line("  without recomputation", attrgetter("useful"), count, True),
        *(line(f"time: {term}", lambda s, term=term: s.seconds.get(term, 0.0), time, True) for term in terms),
        line("roofline time", attrgetter("time"), time, True),
        line("bound by", lambda s: roofline.bound(s.seconds), str),
    ]


def show(found, price: float) -> None:
    """The table of a plan, what the compiler refused, and the run as a whole."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(100, Console().width), highlight=False)
    mesh = " ".join(f"{axis}={n}" for axis, n in found.mesh.items())
    title = (
        f"{found.topology.name}: {found.topology.size} chips ({found.topology.cloud}), mesh {mesh}, "
        f"{found.microbatches} microbatches, remat {found.remat}, completions of {found.max_new_tokens}"
    )
    console.print(title, soft_wrap=True)
    steps = [s for s in found.steps if s.error is None]
    if steps:
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("of one chip and one call")
        for name in (*(s.name for s in steps), "iteration"):
            table.add_column(name, justify="right")
        for row in rows_of(found):
            table.add_row(*row)
        console.print(table)
    for step in found.steps:
        if step.error is not None:
            console.print(f"{step.name} is refused by the compiler: {step.error}", soft_wrap=True, markup=False)
            for buffer in step.buffers[:5]:
                console.print(f"  {buffer}", soft_wrap=True)
        elif step.peak > found.chip.hbm:
            console.print(f"{step.name} does not fit beside what waits: {size(step.peak)} of {size(found.chip.hbm)}")
        if step.endless:
            console.print(f"{step.name}: {step.endless} loops of unknown length were counted once")
    if not found.fits:
        return
    console.print(
        f"an iteration takes at least {time(found.seconds)}: {found.tokens_per_second:,.0f} "
        f"{'sampled' if any(s.name == 'rollout' for s in found.steps) else 'trained'} tokens/s, "
        f"MFU {found.utilization:.1%}"
    )
    cost = f", {price * found.chip_hours:,.0f} at {price:g} a chip-hour" if price else ""
    console.print(f"{found.iterations} iterations: {found.chip_hours:,.1f} chip-hours at least{cost}")


def show_proposals(proposals: list) -> None:
    """What was compiled in the place of a plan that does not fit."""
    if not proposals:
        print("no change that was tried fits")
    for change, found in proposals:
        what = f"fits, {time(found.seconds)} an iteration at least" if found.fits else "does not fit either"
        print(f"{change}: {what}")


if __name__ == "__main__":
    main()
