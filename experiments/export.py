"""A run's model as a folder of Hugging Face, which ``transformers`` loads: safetensors, config.json and tokenizer.

python -m experiments.export --workdir=runs/quickstart --out=models/quickstart
python -m experiments.export --workdir=runs/smollm2 --step=0 --dtype=bfloat16 --out=models/smollm2
python -m experiments.export --workdir=runs/smollm2 --adapter --out=adapters/smollm2     # of a LoRA run, for peft
python -m experiments.export --workdir=runs/ppo --head=value --out=models/value          # ...ForSequenceClassification
"""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxpo.runs.workspace import Workspace

from experiments.program import program


@program
def main(argv: Sequence[str] | None = None) -> None:
    from jaxpo.config.command_line import parse
    from jaxpo.runs.trust import FLAG, trust_runs

    _, flags = parse(
        sys.argv[1:] if argv is None else argv,
        about=__doc__,
        config_required=False,
        workdir=("", "run directory (required)"),
        step=(-1, "checkpoint; -1 = the last"),
        out=("", "folder to write, which must not be there yet (required)"),
        nonfinite=(False, "export even if parameters are NaN or infinite"),
        dtype=("", "of the weights; by default that of the model the run started from, or of its parameters"),
        head=("", "score or value: this head in the place of the vocabulary's; a reward model's is taken anyway"),
        adapter=(False, "of a LoRA run: the adapter alone, as peft reads it"),
        **FLAG,
    )
    trust_runs(flags.pop("trust"))
    if not flags["workdir"] or not flags["out"]:
        raise ValueError("--workdir=RUN and --out=DIRECTORY are required")
    step = None if flags["step"] < 0 else flags["step"]
    how = dict(dtype=flags["dtype"] or None, head=flags["head"] or None)
    export_run(flags["workdir"], flags["out"], step, adapter=flags["adapter"], nonfinite=flags["nonfinite"], **how)


def export_run(
    workdir: str,
    out: str,
    step: int | None = None,
    dtype: str | None = None,
    *,
    head: str | None = None,
    adapter: bool = False,
    nonfinite: bool = False,
) -> None:
    """Write checkpoint ``step`` (the last one) of a run to the folder ``out``; adapters are added to their weights.

    Args:
      dtype: of the weights; None = that of the model the run started from, or of its parameters.
      head: "score" or "value": that head in the place of the vocabulary's; None = the score of a reward model, and no
        head of a policy.
      adapter: write the adapter of a LoRA run alone, beside which its base is needed.

    Raises:
      ValueError: no such run, checkpoint or head, parameters that are not finite (unless ``nonfinite``), a policy that
        no known architecture has, or a preference model.
      FileExistsError: ``out`` is there.
    """
    from jaxpo.policy.adapters import write_adapter
    from jaxpo.policy.hf import check_out, export
    from jaxpo.runs.kept import generation_of, model_config_of, paths_of
    from jaxpo.runs.restore import open_finished
    from jaxpo.storage.paths import local
    from jaxpo.text.tokenizers import PretrainedTokenizer, as_pretrained

    out = str(local(out, "--out"))
    check_out(out)
    workspace, params, step = open_finished(workdir, step, examples=False, writes_only=True, nonfinite=nonfinite)
    config, tokenizer = workspace.config, workspace.tokenizer
    head = head_of(workspace, params, workdir, head)
    if adapter:
        if not config.lora.rank:
            raise ValueError(f"--adapter: {workdir} trained all parameters and has no adapter: leave the flag out")
        if dtype is not None:
            raise ValueError("--dtype has no effect with --adapter: an adapter is float32")
        lora = dict(alpha=config.lora.alpha, base=paths_of(workdir)["policy.path"])
        write_adapter(params, workspace.model.config, out, head=head, **lora)
    else:
        padding = None if tokenizer.pad_id in tokenizer.eos_ids else tokenizer.pad_id
        ends = dict(eos_token_id=list(tokenizer.eos_ids), pad_token_id=tokenizer.pad_id)
        export(
            workspace.whole(params),
            workspace.model.config,
            out,
            hf_config=model_config_of(workdir),
            tokenizer=tokenizer if isinstance(tokenizer, PretrainedTokenizer) else as_pretrained(tokenizer),
            dtype=dtype,
            generation={**generation_of(workdir), **ends} if head is None else None,
            head=head,
            pad_id=padding,
        )
    print(f"checkpoint {step} of {workdir} is in {out}")


def head_of(workspace: "Workspace", params: Mapping[str, Any], workdir: str, asked: str | None) -> str | None:
    """The head that goes out in the place of the vocabulary's: the one asked for, or a reward model's score.

    Raises:
      ValueError: there is none of that name, or it gives more than a number.
    """
    from jaxpo.learning.needs import is_reward_model
    from jaxpo.registry import unknown

    heads = params.get("heads", {})
    numbers = [name for name, head in heads.items() if not head["bias"].shape]
    if asked is not None and asked not in numbers:
        raise ValueError(f"--head: {workdir}: " + unknown("head of one number", asked, numbers))
    if asked is None and is_reward_model(workspace.objective):
        if "score" not in numbers:
            raise ValueError(
                f"--workdir={workdir} holds a preference model, and a folder of Hugging Face has no place for its "
                f"heads ({', '.join(sorted(heads))}): let it judge from its run directory (config.judge.path)"
            )
        asked = "score"
    if left := sorted({*heads} - {asked}):
        why = "as no part of what writes answers" if asked is None else "for one head has a place"
        print(f"left out, {why}: the heads {', '.join(left)} (--head=NAME writes one of a number)")
    bias = 0.0 if asked is None else float(heads[asked]["bias"])
    if bias:
        print(f"the class of transformers has no bias: add {bias:.6g} to what it gives (score_bias of config.json)")
    if asked is not None and workspace.tokenizer.pad_id in workspace.tokenizer.eos_ids:
        print("this tokenizer pads with an end token: no pad_token_id is written, and transformers reads row by row")
    return asked


if __name__ == "__main__":
    main()
