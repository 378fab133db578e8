"""Completions of prompts typed on the command line.

python -m experiments.sample --run=runs/quickstart --prompt=model
python -m experiments.sample --run=runs/quickstart --prompt="..." --n=4 --temperature=0.8
"""

import sys
from collections.abc import Sequence

from experiments.program import program


@program
def main(argv: Sequence[str] | None = None) -> None:
    from jaxpo.config.command_line import parse
    from jaxpo.runs.trust import FLAG, trust_runs

    argv = list(sys.argv[1:] if argv is None else argv)
    prompts = [a.removeprefix("--prompt=") for a in argv if a.startswith("--prompt=")]
    rest = [a for a in argv if not a.startswith("--prompt=")]
    _, flags = parse(
        rest,
        about=__doc__,
        config_required=False,
        run=("", "run directory (required)"),
        step=(-1, "checkpoint; -1 = the last"),
        n=(1, "completions of each prompt"),
        greedy=(False, "the most probable token instead of a draw"),
        temperature=(1.0, "of the draw"),
        seed=(0, "of the draw"),
        nonfinite=(False, "sample even if parameters are NaN or infinite"),
        **FLAG,
    )
    trust_runs(flags.pop("trust"))
    if not flags["run"] or not prompts:
        raise ValueError('--run=DIRECTORY and at least one --prompt="..." are required')
    if flags["n"] < 1:
        raise ValueError(f"--n={flags['n']} must be at least 1")
    sample(prompts, **flags)


def sample(
    prompts: Sequence[str],
    *,
    run: str,
    step: int,
    n: int,
    greedy: bool,
    temperature: float,
    seed: int,
    nonfinite: bool = False,
) -> list[list[str]]:
    import jax

    from jaxpo.learning.needs import is_reward_model
    from jaxpo.rollout.sampling import validate
    from jaxpo.runs.memory import bytes_of, check_rollout
    from jaxpo.runs.questions import pad_prompts, tokenize
    from jaxpo.runs.restore import open_finished
    from jaxpo.tasks import Example
    from jaxpo.text.terminal import printable

    step = None if step < 0 else step
    workspace, params, _ = open_finished(run, step, examples=False, writes_only=True, nonfinite=nonfinite)
    if is_reward_model(workspace.objective):
        raise ValueError(f"--run={run} holds a reward model, which judges answers and writes none")
    examples, ids = tokenize([Example(i, p, None, {}) for i, p in enumerate(prompts)], workspace.tokenizer, None)
    batch = pad_prompts(examples, ids, max(map(len, ids)), workspace.tokenizer.pad_id)
    if greedy and n > 1:
        raise ValueError("--n has no effect with --greedy: every completion would be the same")
    check_rollout(
        workspace.model.config,
        *(len(prompts), batch.tokens.shape[1], n, workspace.config.sampling.max_new_tokens),
        beside=bytes_of(params),
        fields="--n, or the number of --prompt",
    )
    plain = dict(top_k=None, top_p=None, min_p=None) if greedy else {}
    options = validate(workspace.sampling.replace(greedy=greedy, temperature=temperature, **plain))
    params = workspace.programs.sampler_params(params)
    rollouts = workspace.programs.generate(
        params, batch.tokens, batch.length, jax.random.key(seed), options, responses=n
    )
    texts = workspace.questions.texts(rollouts)
    for i, prompt in enumerate(prompts):
        print(f"\n{printable(prompt)}")
        for j in range(i * n, (i + 1) * n):
            print(f"  {printable(texts[j])}" + (" [cut at the length limit]" if rollouts.truncated[j] else ""))
    return [texts[i * n : (i + 1) * n] for i in range(len(prompts))]


if __name__ == "__main__":
    main()
