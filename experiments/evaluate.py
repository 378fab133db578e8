"""Greedy accuracy and pass@k with 95% intervals, from any checkpoint of a run; of a reward model, accuracy and
calibration on held-out pairs.

python -m experiments.evaluate --run=runs/quickstart
python -m experiments.evaluate --run=runs/quickstart --step=0 --k=1,8,16 --samples=32 --prompts=100
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.program import program

if TYPE_CHECKING:
    from jaxpo.policy.transformer import Params
    from jaxpo.runs.workspace import Workspace

SAMPLING = ("k", "samples", "prompts", "seed")  # flags of what a policy writes


@program
def main(argv: Sequence[str] | None = None) -> None:
    from jaxpo.config.command_line import parse
    from jaxpo.runs.trust import FLAG, trust_runs

    argv = sys.argv[1:] if argv is None else argv
    asked = [name for name in SAMPLING if any(arg.startswith(f"--{name}=") for arg in argv)]
    _, flags = parse(
        argv,
        about=__doc__,
        config_required=False,
        run=("", "run directory (required)"),
        step=(-1, "checkpoint; -1 = the last"),
        k=("1,4,8", "k of pass@k, comma separated; empty = none"),
        samples=(16, "completions per prompt"),
        prompts=(0, "test prompts; 0 = as the run"),
        seed=(0, "of the samples"),
        json=("", "also write the numbers to this file"),
        nonfinite=(False, "evaluate even if parameters are NaN or infinite"),
        **FLAG,
    )
    trust_runs(flags.pop("trust"))
    if not flags["run"]:
        raise ValueError("--run=DIRECTORY is required")
    if not all(k.isdigit() for k in flags["k"].split(",") if k):
        raise ValueError(f"--k={flags['k']} is no list of whole numbers, comma separated")
    ks = tuple(int(k) for k in flags["k"].split(",") if k)
    if flags["json"] and not Path(flags["json"]).absolute().parent.is_dir():
        raise ValueError(f"--json={flags['json']}: there is no such folder")
    step = None if flags["step"] < 0 else flags["step"]
    evaluate(
        flags["run"],
        step,
        ks,
        flags["samples"],
        flags["prompts"],
        flags["seed"],
        flags["json"],
        asked,
        nonfinite=flags["nonfinite"],
    )


def evaluate(
    run: str,
    step: int | None,
    ks: tuple[int, ...],
    samples: int,
    prompts: int,
    seed: int,
    out: str,
    asked: Sequence[str] = (),
    *,
    nonfinite: bool = False,
) -> dict[str, float]:
    """Print and return the metrics of a policy's answers, or of a reward model's order of held-out pairs."""
    from jaxpo.learning.needs import is_reward_model
    from jaxpo.runs.restore import open_finished
    from jaxpo.storage.rundir import closing_table

    changes = {"evaluation.pass_at": ks, "evaluation.samples": samples} | (
        {"evaluation.prompts": prompts} if prompts else {}
    )
    workspace, params, step = open_finished(run, step, nonfinite=nonfinite, **changes)
    if is_reward_model(workspace.objective):
        if asked:
            raise ValueError(f"--{asked[0]} has no effect: {run} holds a reward model, which writes no answers")
        metrics, names, held = of_pairs(workspace, params)
    else:
        metrics, names, held = of_answers(workspace, params, run, ks, samples, seed)

    def interval(name: str) -> str:
        return f"[{metrics[name + '_lo']:.4f}, {metrics[name + '_hi']:.4f}]" if name + "_lo" in metrics else ""

    closing_table(
        f"{run}, checkpoint {step}, {held}, {workspace.task.name}",
        [(name.removeprefix("eval/"), f"{metrics[name]:.4f}", interval(name)) for name in names],
        columns=("", "value", "95% interval"),
    )
    if metrics.get("eval/errors"):
        print(
            f"{metrics['eval/errors']:.0f} completions could not be verified (errors of the verifier, counted as wrong)"
        )
    if out:
        Path(out).write_text(json.dumps({"run": run, "step": step, **metrics}, indent=1) + "\n")
    return metrics


def of_answers(
    workspace: "Workspace", params: "Params", run: str, ks: tuple[int, ...], samples: int, seed: int
) -> tuple[dict[str, float], list[str], str]:
    """Metrics of a policy's greedy answers and of samples, the names of those to show, and of how many prompts."""
    import jax

    from jaxpo.runs.evaluation import answers

    if workspace.task.score is None:
        raise ValueError(
            f"--run={run}: nothing verifies answers to {workspace.task.name}; what held-out pairs say was measured in "
            f"training: eval/... in {run}/metrics.jsonl"
        )
    test = workspace.questions.test
    metrics, _ = answers.greedy(workspace, params, test)
    if ks:
        metrics |= answers.sampled(workspace, params, test, jax.random.key(seed), samples=samples, ks=ks)
    return metrics, ["eval/greedy", *[f"eval/pass@{k}" for k in ks]], f"{len(test)} test prompts"


def of_pairs(workspace: "Workspace", params: "Params") -> tuple[dict[str, float], list[str], str]:
    """As `of_answers`, of the order in which a reward model puts held-out pairs."""
    from jaxpo.runs.evaluation.pairs import how_many, measurable
    from jaxpo.runs.evaluation.rewards import calibration, stated

    if not measurable(workspace):
        raise ValueError(f"{workspace.task.name} has no held-out pairs: train with config.data.test_size")
    metrics, _ = calibration(*stated(workspace, params))
    names = ["eval/accuracy", "eval/confidence", "eval/ece", "eval/brier"]
    return metrics, names, how_many(workspace)


if __name__ == "__main__":
    main()
