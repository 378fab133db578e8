"""The characters that a run can read and write."""

import json

import pytest

from jaxpo.config.resolve import resolve
from jaxpo.runs.workspace import make_tokenizer
from jaxpo.tasks import Example, Task
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
