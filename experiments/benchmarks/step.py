"""One GRPO step beside other systems: `python -m experiments.benchmarks.step --vs=trl,tunix --json=step.json`.

Every system does the same job (`record.Job`) in a process of its own, one after the other, round after round, so that a
machine that slows down slows all of them. For each phase it prints CPU-seconds, wall seconds and peak memory, the
median over the rounds, jaxpo's share of the best peer's, and the floor: the operations that the phase needs at the
machine's own matmul rate. `--vs=` measures jaxpo alone. On a busy machine only the CPU-seconds mean something, and
those too grow when neighbours fill the caches: the load is printed beside them.

About 10 minutes for three rounds on 2 cores. The peers come with the extra [bench].
"""

import argparse
import dataclasses
import difflib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments.benchmarks.record import PHASES, Job, add_flags

ROOT = Path(__file__).parents[2]
PEERS = ("trl", "tunix")
# What jaxpo's share of the best peer's should be, for the default job: (measure, vocabulary) -> bar. More is better
# for tokens, less for the others.
BARS = {
    ("tokens_per_cpu_s", 512): 1.5,
    ("cpu_s/step", 512): 0.5,
    ("cpu_s/step", 32768): 0.35,
    ("peak_mib/step", 512): 0.5,
    ("peak_mib/step", 32768): 0.5,
}
TITLES = {
    "cpu_s": "CPU-seconds",
    "wall_s": "wall seconds",
    "peak_mib": "peak MiB beyond imports",
    "tokens_per_cpu_s": "generated tokens per CPU-second",
}


# ---- arithmetic -------------------------------------------------------------------------------------------------


def operations(job: Job) -> dict[str, float]:
    """Floating-point operations of each phase: matrix products only, a multiplication and an addition as two.

    The prompt is read once per prompt when sampling and once per row when scoring; logits are made only where a
    response token is predicted; attention is causal; the backward pass costs two forward passes.
    """
    block = job.layers * 2 * (4 * job.hidden**2 + 3 * job.hidden * job.mlp)  # a token through all blocks
    head = 2 * job.hidden * job.vocab
    prompt, total = job.prompt_len, job.prompt_len + job.new_tokens - 1  # the last token is never read

    def attention(first: int, last: int) -> float:  # the positions first..last-1, each over itself and all before
        return job.layers * 4 * job.hidden * (last * (last + 1) - first * (first + 1)) / 2

    prefill = job.prompts * (prompt * block + attention(0, prompt) + head)
    decode = job.rows * ((total - prompt) * (block + head) + attention(prompt, total))
    score = job.rows * (total * block + attention(0, total) + job.new_tokens * head)
    phases = {"generate": prefill + decode, "reference": score, "update": 3 * score, "rest": 0.0}
    return {**phases, "step": sum(phases.values())}


def measures(record: Mapping[str, Any]) -> dict[str, float]:
    """A system's record as flat numbers: 'cpu_s/generate', ..., 'peak_mib/step', 'tokens_per_cpu_s'."""
    flat = {f"{key}/{name}": record["phases"][name][key] for key in ("cpu_s", "wall_s", "peak_mib") for name in PHASES}
    return {**flat, "tokens_per_cpu_s": record["gen_tokens"] / record["phases"]["generate"]["cpu_s"]}


def floors(job: Job, rate: Mapping[str, float]) -> dict[str, float]:
    """The least (for tokens: the most) that each measure could be at the machine's matmul rate."""
    needed = {name: count / 1e9 for name, count in operations(job).items() if count}
    result = {f"cpu_s/{name}": giga / rate["gflop_per_cpu_s"] for name, giga in needed.items()}
    result |= {f"wall_s/{name}": giga / rate["gflop_per_s"] for name, giga in needed.items()}
    return {**result, "tokens_per_cpu_s": job.rows * job.new_tokens / result["cpu_s/generate"]}


def summarize(records: Iterable[Mapping[str, Any]], job: Job, rate: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """For each measure: the median of each system over its records, the ratio to the best peer, bar and floor.

    `records` are those of one vocabulary, `rate` a result of `matmul_rate`. 'ratio' and 'best_peer' are None without
    a peer or where the best peer's number is 0, 'bar' and 'reached' where none is set for this measure and job.
    """
    by_system: dict[str, list[dict[str, float]]] = {}
    for record in records:
        by_system.setdefault(record["system"], []).append(measures(record))
    standard = Job(vocab=job.vocab, steps=job.steps, warmup=job.warmup) == job
    least = floors(job, rate)
    summary = {}
    for name in next(iter(by_system.values()))[0]:
        median = {system: statistics.median(m[name] for m in rounds) for system, rounds in by_system.items()}
        more_is_better = name == "tokens_per_cpu_s"
        peers = [system for system in median if system != "jaxpo"]
        best = (max if more_is_better else min)(peers, key=median.get, default=None)
        ratio = median["jaxpo"] / median[best] if best and "jaxpo" in median and median[best] else None
        bar = BARS.get((name, job.vocab)) if standard else None
        reached = None if bar is None or ratio is None else (ratio >= bar if more_is_better else ratio <= bar)
        summary[name] = {
            "median": median, "best_peer": best, "ratio": ratio, "bar": bar, "reached": reached,
            "floor": least.get(name),
        }  # fmt: skip
    return summary


def matmul_rate(size: int = 1536, tries: int = 7) -> dict[str, float]:
    """The machine's float32 matmul rate now, all cores together, the best of `tries`.

    Returns 'gflop_per_s' (wall time), 'gflop_per_cpu_s' (CPU time of all threads) and 'loadavg' (the last minute).
    """
    a = np.ones((size, size), np.float32)
    a @ a
    wall, cpu = [], []
    for _ in range(tries):
        start = time.process_time(), time.perf_counter()
        a @ a
        cpu.append(time.process_time() - start[0])
        wall.append(time.perf_counter() - start[1])
    giga = 2 * size**3 / 1e9
    return {"gflop_per_s": giga / min(wall), "gflop_per_cpu_s": giga / min(cpu), "loadavg": os.getloadavg()[0]}


# ---- running the systems ----------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Variables of every system's process: the CPU, no network, this checkout importable.

    OpenMP's idle threads sleep instead of spinning. Torch's would burn CPU-seconds as soon as anything else runs on the
    machine: beside busy neighbours a step of TRL at vocabulary 512 took 5 to 6 with sleeping threads and 17 to 25 with
    spinning ones, on an idle machine 5 to 6 with either. Sleeping threads cost TRL some wall time when it runs alone.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "WANDB_MODE": "disabled",
    }  # fmt: skip


def check_installed(peer: str, python: str) -> None:
    """Raises `ValueError` when the interpreter `python` cannot find the library of `peer`."""
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    try:
        # Outside the checkout, in which a folder could be taken for the library.
        code = subprocess.run([python, "-P", "-c", find, peer], capture_output=True).returncode
    except OSError as error:
        raise ValueError(f"--python_{peer}: cannot run {python}: {error.strerror}") from None
    if code:
        raise ValueError(
            f"--vs: {peer} is not installed for {python}; install the extra: pip install -e '.[bench]', "
            f"or name an interpreter that has it: --python_{peer}=PATH"
        )


def run_system(system: str, python: str, job: Job) -> dict[str, Any]:
    """Runs `system` in a process of its own and returns its record; raises `RuntimeError` when it fails."""
    flags = [f"--{name}={value}" for name, value in dataclasses.asdict(job).items()]
    command = [python, "-m", f"experiments.benchmarks.peers.{system}_step", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-15:])
        raise RuntimeError(f"{system} ended with status {done.returncode}: {' '.join(command)}\n{last}")
    record = json.loads(done.stdout.splitlines()[-1])
    if record["gen_tokens"] != job.rows * job.new_tokens:
        raise RuntimeError(f"{system} generated {record['gen_tokens']} tokens a step, not {job.rows * job.new_tokens}")
    return record


def run_all(systems: Mapping[str, str], jobs: Sequence[Job], rounds: int, console: Console) -> list[dict[str, Any]]:
    """The records of all `systems` (name -> interpreter), interleaved; each has its 'round', counted from 1."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    records = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=rounds * len(jobs) * len(systems))
        for turn in range(1, rounds + 1):
            for job in jobs:
                for system, python in systems.items():
                    what = f"round {turn}/{rounds}, vocabulary {job.vocab}: {system}"
                    progress.update(task, description=what)
                    record = {"round": turn, **run_system(system, python, job)}
                    records.append(record)
                    step = record["phases"]["step"]
                    progress.console.print(
                        f"{what}: {step['cpu_s']:.2f} CPU-s, {step['wall_s']:.2f} s a step, "
                        f"{step['peak_mib']:.0f} MiB beyond imports, load {record['loadavg'][-1]:.1f}"
                    )
                    progress.advance(task)
    return records


# ---- output -----------------------------------------------------------------------------------------------------


def show(value: float | None, digits: int = 3) -> str:
    """A number in a cell: three significant digits, at least all its whole ones."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def table(summary: Mapping[str, Mapping[str, Any]], job: Job, systems: Sequence[str]) -> Table:
    """The summary of one vocabulary as a table."""
    result = Table(title=f"One GRPO step, vocabulary {job.vocab}: {job.rows} rows of {job.prompt_len}+{job.new_tokens}")
    result.add_column("")
    for name in (*systems, "jaxpo / best peer", "bar", "floor", "jaxpo / floor"):
        result.add_column(name, justify="right")
    for key, title in TITLES.items():
        result.add_section()
        for name in (f"{key}/{phase}" for phase in PHASES) if f"{key}/step" in summary else (key,):
            row = summary[name]
            mine, floor, bar = row["median"].get("jaxpo"), row["floor"], row["bar"]
            verdict = {True: "[green]reached", False: "[red]missed", None: ""}[row["reached"]]
            result.add_row(
                f"{title}: {name.split('/')[1]}" if "/" in name else title,
                *(show(row["median"][system]) for system in systems),
                f"{show(row['ratio'])} ({row['best_peer']})" if row["ratio"] is not None else "",
                f"{'≥' if key == 'tokens_per_cpu_s' else '≤'} {bar} {verdict}" if bar is not None else "",
                show(floor),
                show(mine / floor if mine and floor else None),
            )
    return result


def report(records: Sequence[Mapping[str, Any]], jobs: Sequence[Job], rates: Sequence[Mapping[str, float]],
           console: Console) -> dict[str, Any]:  # fmt: skip
    """Prints the tables; returns all that was measured, ready for JSON. The faster of `rates` gives the floor."""
    systems = list(dict.fromkeys(record["system"] for record in records))
    rate = max(rates, key=lambda r: r["gflop_per_cpu_s"])
    summaries = {}
    for job in jobs:
        mine = [record for record in records if record["job"]["vocab"] == job.vocab]
        summaries[job.vocab] = summarize(mine, job, rate)
        console.print(table(summaries[job.vocab], job, systems))
    for when, r in zip(("before", "after"), rates, strict=True):
        console.print(
            f"{when}: float32 matmul {r['gflop_per_s']:.0f} GFLOP/s, {r['gflop_per_cpu_s']:.0f} per CPU-second; "
            f"load {r['loadavg']:.1f} on {os.cpu_count()} CPUs"
        )
    for system in systems:
        versions = next(record["versions"] for record in records if record["system"] == system)
        console.print(f"{system}: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    return {
        "jobs": [dataclasses.asdict(job) for job in jobs], "cpu_count": os.cpu_count(),
        "matmul": {"before": rates[0], "after": rates[1]}, "summary": summaries, "records": list(records),
    }  # fmt: skip


# ---- command line -----------------------------------------------------------------------------------------------


def names(text: str) -> list[str]:
    """The peers of a comma-separated list, which may be empty."""
    chosen = [name for name in text.split(",") if name]
    for name in chosen:
        if name not in PEERS:
            near = difflib.get_close_matches(name, PEERS, n=1, cutoff=0.0)[0]
            known = ", ".join(PEERS)
            raise argparse.ArgumentTypeError(f"unknown system {name!r}; did you mean {near!r}? (known: {known})")
    if len(set(chosen)) < len(chosen):
        raise argparse.ArgumentTypeError(f"a system is named twice in {text!r}")
    return chosen


def sizes(text: str) -> list[int]:
    """The integers of a comma-separated list."""
    try:
        return list(dict.fromkeys(int(size) for size in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a list of integers like 512,32768: {text!r}") from None


def parse(arguments: Sequence[str] | None) -> tuple[dict[str, str], list[Job], argparse.Namespace]:
    """The systems with their interpreters, the jobs, and the other flags; exits with one line on bad input."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--vs", type=names, default=list(PEERS), metavar="NAMES", help="peers; empty: jaxpo alone")
    parser.add_argument("--vocab", type=sizes, default=[512, 32768], metavar="SIZES", help="vocabularies")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each system")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write all that was measured")
    for system in ("jaxpo", *PEERS):
        parser.add_argument(f"--python_{system}", metavar="PATH", help="the interpreter that has it, if not this one")
    add_flags(parser, leave_out=("vocab",))
    flags = vars(parser.parse_args(arguments))
    try:
        systems = {name: flags[f"python_{name}"] or sys.executable for name in ("jaxpo", *flags["vs"])}
        for name in PEERS:
            if flags[f"python_{name}"] and name not in systems:
                raise ValueError(f"--python_{name} has no effect: --vs does not name {name}")
        if flags["rounds"] < 1:
            raise ValueError(f"--rounds must be at least 1, got {flags['rounds']}")
        if flags["json"] and not flags["json"].absolute().parent.is_dir():
            raise ValueError(f"--json: no folder {flags['json'].absolute().parent}")
        shape = {field.name: flags[field.name] for field in dataclasses.fields(Job) if field.name != "vocab"}
        jobs = [Job(vocab=vocab, **shape) for vocab in flags["vocab"]]
        for name in flags["vs"]:
            check_installed(name, systems[name])
    except ValueError as error:
        parser.error(str(error))
    return systems, jobs, argparse.Namespace(**flags)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison and prints it."""
    systems, jobs, flags = parse(arguments)
    console = Console()
    before = matmul_rate()
    try:
        records = run_all(systems, jobs, flags.rounds, console)
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    result = report(records, jobs, (before, matmul_rate()), console)
    if flags.json:
        flags.json.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"wrote {flags.json}")


if __name__ == "__main__":
    main()
