"""What a trained reward model says of both answers of given pairs, and the pairs that are hard for it: where the two
stages of Mixed Preference Optimization (arXiv:2403.19443) get their data.

python -m experiments.score_pairs --pairs=pairs.jsonl --judge=runs/reward --out=scored.jsonl --gap=1 --hard=hard.jsonl
python -m experiments.train_preference --config=dpo.py --workdir=runs/easy --config.objective.name=mpo_mixed \\
    --config.data.name=jsonl --config.data.path=scored.jsonl
python -m experiments.train_rl --config=rl.py --workdir=runs/hard --config.init_from=runs/easy \\
    --config.task.name=None --config.data.name=jsonl --config.data.path=hard.jsonl --config.protocol.name=on_policy \\
    --config.judge.name=model --config.judge.path=runs/reward
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.program import program

BATCH = 64  # pairs that are judged at once


@program
def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises ``SystemExit`` with one line for what cannot be scored."""
    from jaxpo.config.command_line import parse
    from jaxpo.runs.trust import FLAG, trust_runs

    _, flags = parse(
        sys.argv[1:] if argv is None else argv,
        about=__doc__,
        config_required=False,
        pairs=("", "JSON lines with prompt, chosen and rejected (required)"),
        judge=("", "run directory of a reward or preference model (required)"),
        out=("", "file to write: the same lines with rm_chosen and rm_rejected (required)"),
        gap=(1.0, "pairs whose scores are at most so far apart are hard"),
        hard=("", "file for these, which must not be there yet; by default they are only counted"),
        **FLAG,
    )
    trust_runs(flags.pop("trust"))
    if absent := [name for name in ("pairs", "judge", "out") if not flags[name]]:
        raise ValueError(f"--{absent[0]} is required")
    score_pairs(**flags)


def score_pairs(pairs: str, judge: str, out: str, gap: float = 1.0, hard: str = "") -> tuple[int, int]:
    """Write the pairs with the scores of both answers to ``out``, and those with ``|rm_chosen - rm_rejected| <= gap``
    to ``hard`` ("" = nowhere); returns how many there are of both.

    Raises:
      ValueError: a bad line (names file, line and field), a row that is no pair, or no run of such a model.
      FileExistsError: a file to write is there.
    """
    from jaxpo.fields import PAIR
    from jaxpo.runs.judges.judge import by_model
    from jaxpo.storage.rundir import Progress
    from jaxpo.tasks import Example
    from jaxpo.tasks.preferences.records import BadRow, row_of
    from jaxpo.tasks.preferences.sets import readable
    from jaxpo.tasks.rows import read_rows

    for path in filter(None, (out, hard)):
        if Path(path).exists():
            raise FileExistsError(f"{path} is there already")
    records, rows = [], []
    for name, _, number, record in read_rows(pairs).places():
        try:
            records.append(readable(record))
            rows.append(row_of(record, {}, "pair")._replace(where=f"{name}:{number}"))
        except BadRow as error:
            raise ValueError(f"{name}:{number}: {error}") from None
    if not rows:
        raise ValueError(f"{pairs}: no pairs")
    opinion, done = by_model(judge, None), []
    with Progress(len(rows), metrics={}, every=10 * BATCH) as bar:
        for start in range(0, len(rows), BATCH):
            part = [rows[min(i, len(rows) - 1)] for i in range(start, start + BATCH)]  # one shape: the last one repeats
            questions = [Example(i, row.prompt, None, {}, row.where) for i, row in enumerate(part)]
            scores = opinion(questions, [[row.answer(role).said for role in PAIR] for row in part]).scores
            fields = ({f"rm_{role}": float(x) for role, x in zip(PAIR, both, strict=True)} for both in scores)
            done += [{**record, **said} for record, said in zip(records[start:], fields, strict=False)]
            for _ in rows[start : start + BATCH]:
                bar.update({})
    left = [r for r in done if abs(r["rm_chosen"] - r["rm_rejected"]) <= gap]
    for path, chosen in ((out, done), (hard, left)):
        if path:
            Path(path).write_text("".join(json.dumps(record) + "\n" for record in chosen))
    right = sum(r["rm_chosen"] > r["rm_rejected"] for r in done)
    print(f"{len(done)} pairs, {right} of which the model orders as they are labelled; {len(left)} are hard: {out}")
    return len(done), len(left)


if __name__ == "__main__":
    main()
