"""Greedy accuracy and pass@k with 95% intervals, from any checkpoint of a run.

python -m experiments.evaluate --run=runs/quickstart
python -m experiments.evaluate --run=runs/quickstart --step=0 --k=1,8,16 --samples=32 --prompts=100
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    from jaxpo.training.command_line import parse

    try:
        _, flags = parse(
            sys.argv[1:] if argv is None else argv,
            config_required=False,
            run=("", "run directory (required)"),
            step=(-1, "checkpoint; -1 = the last"),
            k=("1,4,8", "k of pass@k, comma separated; empty = none"),
            samples=(16, "completions per prompt"),
            prompts=(0, "test prompts; 0 = as the run"),
            seed=(0, "of the samples"),
            json=("", "also write the numbers to this file"),
        )
        if not flags["run"]:
            raise ValueError("--run=DIRECTORY is required")
        if not all(k.isdigit() for k in flags["k"].split(",") if k):
            raise ValueError(f"--k={flags['k']} is no list of whole numbers, comma separated")
        ks = tuple(int(k) for k in flags["k"].split(",") if k)
        if flags["json"] and not Path(flags["json"]).absolute().parent.is_dir():
            raise ValueError(f"--json={flags['json']}: there is no such folder")
        evaluate(
            flags["run"],
            None if flags["step"] < 0 else flags["step"],
            ks,
            flags["samples"],
            flags["prompts"],
            flags["seed"],
            flags["json"],
        )
    except ValueError as error:
        sys.exit(f"error: {error}")


def evaluate(
    run: str, step: int | None, ks: tuple[int, ...], samples: int, prompts: int, seed: int, out: str
) -> dict[str, float]:
    import jax

    from jaxpo.training import evaluation
    from jaxpo.training.restore import open_finished
    from jaxpo.training.rundir import closing_table

    changes = {"evaluation.pass_at": ks, "evaluation.samples": samples} | (
        {"evaluation.prompts": prompts} if prompts else {}
    )
    workspace, params, step = open_finished(run, step, **changes)
    metrics, _ = evaluation.greedy(workspace, params, workspace.test)
    if ks:
        metrics |= evaluation.sampled(workspace, params, workspace.test, jax.random.key(seed), samples=samples, ks=ks)
    rows = [
        (n.removeprefix("eval/"), f"{metrics[n]:.4f}", f"[{metrics[n + '_lo']:.4f}, {metrics[n + '_hi']:.4f}]")
        for n in ("eval/greedy", *[f"eval/pass@{k}" for k in ks])
    ]
    closing_table(
        f"{run}, checkpoint {step}, {len(workspace.test)} test prompts, {workspace.task.name}",
        rows,
        columns=("", "value", "95% interval"),
    )
    if metrics["eval/errors"]:
        print(
            f"{metrics['eval/errors']:.0f} completions could not be verified (errors of the verifier, counted as wrong)"
        )
    if out:
        Path(out).write_text(json.dumps({"run": run, "step": step, **metrics}, indent=1) + "\n")
    return metrics


if __name__ == "__main__":
    main()
