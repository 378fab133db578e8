"""docs/metrics.md names every metric of a run."""

import json
import re
from pathlib import Path

from tests.runs import tiny

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_page_names_every_metric_of_a_run(tmp_path_factory):
    run = tiny.finished(tmp_path_factory.getbasetemp())
    found = {name for line in (run.path / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    named = set(re.findall(r"`([^`]+)`", PAGE.read_text()))
    patterns = {re.escape(n).replace("<phase>", r"\w+").replace("<term>", r"\w+").replace("@k", r"@\d+") for n in named}
    bare = {re.sub(r"_(lo|hi)$", "", name) for name in found} - {"step"}
    missing = sorted(n for n in bare if not any(re.fullmatch(p, n) for p in patterns))
    assert not missing, missing
