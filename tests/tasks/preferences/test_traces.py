"""Tool calls after answers: made, read from files, as tokens, and in the batches of a tool-augmented reward model."""

import json

import numpy as np
import pytest

from jaxpo import fields
from jaxpo.runs.preference_data import traced
from jaxpo.tasks.preferences import sets, traces
from jaxpo.tasks.preferences.encode import encode, units
from jaxpo.text.tokenizers import CharTokenizer


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("State the final answer to 4 + 3 * (2 - 5) = ", [("tool", "4 + 3 * (2 - 5)"), ("observation", "-5")]),
        ("What is 7/2?", [("tool", "7/2"), ("observation", "3.5")]),
        ("What is 1/0?", []),
        ("Spell it", []),
        ("Is (3) ( 4) one?", []),
    ],
)
def test_calculator(question, found):
    assert traces.calculator(question, "any") == found


def test_reverser():
    assert traces.reverser("abc", "cb") == [("tool", "cb"), ("observation", "bc")]


PAIR = {
    "prompt": "1+1=",
    "chosen": "2",
    "rejected": "33",
    "chosen_trace": [["tool", "1+1"], ["observation", "2"], ["rationale", "ok"]],
}


def test_a_trace_in_a_file_becomes_segments(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR))
    row = sets.jsonl(path).train[0]
    assert row.answer("chosen").trace[0] == ("tool", "1+1") and row.answer("rejected").trace == ()
    tokenizer = CharTokenizer.from_texts(["1+1=233ok"])
    encoded, report = encode([row], tokenizer, roles=fields.PAIR)
    assert report["data/dropped"] == 0
    batch = units(encoded, fields.PAIR, segments=True, width=12)
    segment = batch.per_token["segment"]
    # "2", its end, "1+1", "2", "ok", the end of all
    assert segment[0].tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 3, 0, 0, 0] and batch.mask[0].sum() == 9
    assert segment[1].tolist() == [0] * 12 and batch.mask[1].sum() == 3
    ends = batch.completions[0] == tokenizer.eos_ids[0]
    assert np.flatnonzero(ends[:9]).tolist() == [1, 8]
    assert "segment" not in units(encoded, fields.PAIR).per_token


@pytest.mark.parametrize("trace", ("1+1", [["tool"]], [["tol", "1+1"]], [["tool", 2]]))
def test_a_bad_trace_is_named(tmp_path, trace):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR | {"chosen_trace": trace}))
    with pytest.raises(ValueError, match="field 'chosen_trace': a trace is a list of \\[kind, text\\], kinds tool"):
        sets.jsonl(path)


def fails_on_two(question, answer):
    if answer == "2":
        raise KeyError("two")
    return [("tool", answer)]


def of_one(question):
    return []


def test_functions_that_make_traces():
    with pytest.raises(
        ValueError, match="config.trace: .* has no function 'fails_on_tow': did you mean 'fails_on_two'"
    ):
        traces.tracer_of(f"{__name__}:fails_on_tow")
    with pytest.raises(ValueError, match=r"config.trace .* is called with \(question, answer\), but of_one"):
        traces.tracer_of(f"{__name__}:of_one")


def test_a_row_on_which_the_function_fails_is_a_bad_row(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}, {"prompt": "1+3=", "chosen": "4", "rejected": "5"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tracer = traces.tracer_of(f"{__name__}:fails_on_two")
    with pytest.raises(ValueError, match="config.trace fails on the question '1\\+1=': KeyError: 'two' .bad='drop'"):
        traced(sets.jsonl(path), tracer)
    kept = traced(sets.jsonl(path, bad="drop"), tracer)
    assert [row.prompt for row in kept.train] == ["1+3="] and kept.report["data/dropped/trace"] == 1
