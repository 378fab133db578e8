"""A run's policy as a folder of Hugging Face, which ``transformers`` loads: safetensors, config.json and tokenizer.

python -m experiments.export --workdir=runs/quickstart --out=models/quickstart
python -m experiments.export --workdir=runs/smollm2 --step=0 --dtype=bfloat16 --out=models/smollm2
"""

import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    from jaxpo.config.command_line import parse
    from jaxpo.runs.trust import FLAG, trust_runs

    try:
        _, flags = parse(
            sys.argv[1:] if argv is None else argv,
            config_required=False,
            workdir=("", "run directory (required)"),
            step=(-1, "checkpoint; -1 = the last"),
            out=("", "folder to write, which must not be there yet (required)"),
            dtype=("", "of the weights; by default that of the model the run started from, or of its parameters"),
            **FLAG,
        )
        trust_runs(flags.pop("trust"))
        if not flags["workdir"] or not flags["out"]:
            raise ValueError("--workdir=RUN and --out=DIRECTORY are required")
        export_run(flags["workdir"], flags["out"], None if flags["step"] < 0 else flags["step"], flags["dtype"] or None)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def export_run(workdir: str, out: str, step: int | None = None, dtype: str | None = None) -> None:
    """Write checkpoint ``step`` (the last one) of a run to the folder ``out``; adapters are added to their weights.

    Raises:
      ValueError: no such run or checkpoint, a policy that no known architecture has, or a reward model.
      FileExistsError: ``out`` is there.
    """
    from jaxpo.learning.needs import is_reward_model
    from jaxpo.policy.hf import check_out, export, read_config
    from jaxpo.runs.restore import MODEL, open_finished
    from jaxpo.text.tokenizers import for_transformers

    check_out(out)
    workspace, params, step = open_finished(workdir, step, examples=False, writes_only=True)
    if is_reward_model(workspace.objective):
        raise ValueError(
            f"--workdir={workdir} holds a reward model, and a folder of Hugging Face has no place for its heads "
            f"({', '.join(sorted(params['heads']))}): let it judge from its run directory (config.judge.path)"
        )
    if "heads" in params:
        print(f"left out, as no part of what writes answers: the heads {', '.join(sorted(params['heads']))}")
    tokenizer = workspace.tokenizer
    ends = dict(eos_token_id=list(tokenizer.eos_ids), pad_token_id=tokenizer.pad_id)
    pretrained = workspace.config.policy.name == "pretrained"
    export(
        workspace.whole(params),
        workspace.model.config,
        out,
        hf_config=read_config(Path(workdir) / MODEL) if pretrained else None,
        tokenizer=for_transformers(tokenizer),
        dtype=dtype,
        generation=ends,
    )
    print(f"checkpoint {step} of {workdir} is in {out}")


if __name__ == "__main__":
    main()
