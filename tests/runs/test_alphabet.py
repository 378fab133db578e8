"""The characters that a run can read and write."""

import json

import pytest

from jaxpo.config.resolve import resolve
from jaxpo.race.setup import make_task
from jaxpo.runs.workspace import make_tokenizer
from jaxpo.tasks import Example, Task, build
from jaxpo.text.tokenizers import CharTokenizer, IntegerTokenizer
from tests.runs import tiny


def test_characters_are_those_of_the_run_that_is_started_from(tmp_path):
    """Other data have other characters, and parameters know theirs by number."""
    run = resolve(tiny.config({"init_from": str(tmp_path), "tokenizer": {"name": "characters"}}), 1)
    other = Task("other", [Example(0, "xyz", "y", {})], [], None, None, {})
    for held in (CharTokenizer.from_texts(["abc"]), IntegerTokenizer(4)):
        (tmp_path / "tokenizer.json").write_text(json.dumps(held.to_json()))
        if isinstance(held, CharTokenizer):
            assert make_tokenizer(run, other).to_json() == held.to_json()
        else:
            with pytest.raises(ValueError, match="has another tokenizer: name that"):
                make_tokenizer(run, other)
    run.config.init_from = None
    assert set("xyz") <= set(make_tokenizer(run, other).to_json()["alphabet"])


def test_characters_of_demonstrations_that_wrap_the_answer(tmp_path):
    lines = [json.dumps({"question": f"{i}+1?", "answer": str(i + 1)}) for i in range(12)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    given = dict(path=str(tmp_path / "sums.jsonl"), test_size=4, extract="boxed")
    task = build({"name": "jsonl", **given})
    run = resolve(tiny.config({"task": {"name": "jsonl", **given}, "tokenizer": {"name": "characters"}}), 1)
    of_race = make_task(f"jsonl({', '.join(f'{k}={x!r}' for k, x in given.items())})")[1]
    for tokenizer in (make_tokenizer(run, task), of_race):
        assert tokenizer.decode(tokenizer.encode(task.demonstrate(task.train[0]))).startswith("\\boxed{")
