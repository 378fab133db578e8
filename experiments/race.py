"""Race objectives under one budget, from one warm start, over several seeds at once.

python -m experiments.race --objectives=grpo,dr_grpo,gspo,gtpo,bapo --seeds=5
python -m experiments.race --objectives="grpo,grpo(eps_high=0.3)" --steps=100 --out=races/clip
python -m experiments.race --objectives=all --seeds=1 --out=races/all
python -m experiments.race --task="reasoning_gym(dataset='spell_backward', max_word_len=4, prompt_field='word')"

Prints a table and writes ``results.json`` and ``curves.png`` to --out after each objective (a folder of races/ that is
named after the rules, if none is given). Called again with the same rules, it runs only what is missing.
"""

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from experiments.program import program

if TYPE_CHECKING:
    from jaxpo.race.results import Results
    from jaxpo.race.rules import Rules

HELP = dict(
    task="the toy task, or a registered one with its arguments: toy(digits=4)",
    seeds="of parameters, prompts and sampling; all train at once",
    steps="iterations",
    prompts="an iteration",
    responses="a prompt",
    epochs="over an iteration's completions",
    minibatches="optimizer steps an epoch",
    learning_rate="of adam",
    evaluations="points of the learning curve after the start",
    warm_start="supervised steps before all",
    warm_batch="demonstrations each",
    drop_last="share of the demonstrations that lack their last character",
    warm_learning_rate="of adam",
    max_new_tokens="generation budget; 0 = the longest right answer and two more",
    width="of the policy",
    layers="of the policy",
    flipped="share of preference pairs with the wrong label, for objectives of pairs",
)


@program
def main(argv: Sequence[str] | None = None) -> "Results":
    """The command. Raises ``SystemExit`` with one line for what cannot be raced."""
    from jaxpo.config.command_line import parse
    from jaxpo.config.imports import load_imports, modules_in
    from jaxpo.race.race import race
    from jaxpo.race.results import CURVES, RESULTS
    from jaxpo.race.rules import Rules

    flags = {name: (default, HELP[name]) for name, default in asdict(Rules()).items()}
    flags["objectives"] = ("grpo,dr_grpo,gspo,gtpo,bapo", 'names, with changes: "grpo,grpo(eps_high=0.3)"; or all')
    flags["imports"] = ("", "modules of your own, which register objectives or the task: my_tasks,my_objectives")
    flags["out"] = ("", "folder of the results; by default one of races/, named after the rules")
    argv = list(sys.argv[1:] if argv is None else argv)
    _, given = parse(argv, about=__doc__, config_required=False, **flags)
    load_imports(modules_in(given.pop("imports")), "--imports")
    contenders, out = given.pop("objectives"), given.pop("out")
    rules = Rules(**given)
    out = out or folder(rules)
    results = race(contenders, rules, out=out)
    results.show()
    print(f"results: {out}/{RESULTS}, curves: {out}/{CURVES}")
    return results


def folder(rules: "Rules") -> str:
    """Where races by these rules are kept: their task, seeds and steps, and a digest of them all."""
    digest = hashlib.sha256(json.dumps(asdict(rules), sort_keys=True).encode()).hexdigest()[:6]
    task = re.sub(r"\W+", "-", rules.task).strip("-")
    return f"races/{task}_{rules.seeds}x{rules.steps}_{digest}"


if __name__ == "__main__":
    main()
