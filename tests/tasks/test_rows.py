"""Rows of every kind of source, and what is said of those that cannot be read."""

import json
import sys

import pytest

from jaxpo.tasks import build
from jaxpo.tasks.jsonl import jsonl
from jaxpo.tasks.preferences import sets
from jaxpo.tasks.rows import JsonLines, by_name, choose_files, read_rows

ROWS = [{"question": f"{i}+1?", "answer": str(i + 1), "level": "easy"} for i in range(4)]


def questions(path, **arguments):
    return sorted(e.question for e in jsonl(path, test_size=1, **arguments).train) and [
        record["question"] for *_, record in read_rows(path).places()
    ]


def test_files_by_their_ending(tmp_path):
    lines, whole, table = tmp_path / "a.jsonl", tmp_path / "a.json", tmp_path / "a.csv"
    lines.write_text("\n".join(map(json.dumps, ROWS)))
    whole.write_text(json.dumps(ROWS))
    (tmp_path / "b.json").write_text(lines.read_text())  # JSON lines under another name
    table.write_text("question,answer,level\n" + "".join(f"{r['question']},{r['answer']},easy\n" for r in ROWS))
    for path in (lines, whole, tmp_path / "b.json", table):
        assert questions(path) == [r["question"] for r in ROWS]
    task = jsonl(table, test_size=1)
    assert task.train[0].entry["level"] == "easy"  # other columns are there for rewards


def test_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert questions(tmp_path / "a.parquet") == [r["question"] for r in ROWS]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="bad.parquet is no Parquet, or truncated: "):
        read_rows(tmp_path / "bad.parquet")


def test_parquet_without_its_library(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ModuleNotFoundError, match=r"a.parquet is Parquet, .* pip install 'jaxpo\[data\]'"):
        read_rows(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[1, ", "a.json is no JSON .*: it may be truncated"),
        ("a.csv", b"question,question\n1,2\n", "a.csv: its first row names a column twice"),
        ("a.csv", b"question,answer\n1\n", "a.csv, row 1: found 1 values, and the first row names 2 columns"),
        ("a.csv", b"question\n\xff\n", "a.csv is no CSV in UTF-8"),
        ("a.jsonl", "[]".encode("utf-16"), "a.jsonl is in UTF-16: save it as UTF-8"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: not JSON: too many brackets inside each other"),
        ("a.jsonl", b'{"question": "\\ud800", "answer": "1"}', "line 1: field 'question': .*half of a surrogate pair"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        jsonl(tmp_path / name, test_size=1)
    assert "\n" not in str(error.value)


def test_bad_lines_of_preferences_can_be_dropped(tmp_path):
    row = {"prompt": "up", "chosen": "down", "rejected": "up"}
    path = tmp_path / "p.jsonl"
    path.write_bytes(json.dumps(row).encode() + b"\n" + b"[" * 100_000 + b"\n")
    assert sets.jsonl(path, bad="drop").report["data/dropped/not_json"] == 1
    with pytest.raises(ValueError, match="p.jsonl:2: not JSON"):
        sets.jsonl(path)
    with pytest.raises(ValueError, match="fields must be a dictionary"):
        sets.jsonl(path, fields="abc")


def test_a_folder_has_splits_and_subsets(tmp_path):
    for name in ("data/train-0.jsonl", "data/train-1.jsonl", "data/test-0.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"question": name, "answer": "1"}))
    task = build({"name": "datasets", "path": str(tmp_path)})
    assert [e.question for e in task.train] == ["data/train-0.jsonl", "data/train-1.jsonl"]
    assert [e.question for e in task.test] == ["data/test-0.jsonl"]
    with pytest.raises(ValueError, match="unknown split 'tets': did you mean 'test'"):
        jsonl(tmp_path, test_split="tets")


def test_names_of_files_tell_subset_and_split():
    found = by_name(["en/train.csv", "en/dev.csv", "fr/test/0.parquet", "data/train-0.jsonl", "x.jsonl"])
    assert found == {
        "en": {"train": ["en/train.csv"], "validation": ["en/dev.csv"]},
        "fr": {"test": ["fr/test/0.parquet"]},
        "default": {"train": ["data/train-0.jsonl", "x.jsonl"]},
    }
    with pytest.raises(ValueError, match="a/b has several subsets: set subset to one of en, fr"):
        choose_files("a/b", ["en/train.csv", "fr/train.csv"], None, None, None)


def test_misspelt_files_name_the_nearest(tmp_path):
    for name in ("train.jsonl", "other.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(FileNotFoundError, match="did you mean '.*train.jsonl'") as error:
        read_rows(tmp_path / "trian.jsonl")
    assert "other.txt" not in str(error.value)


def test_messages_and_a_system_prompt(tmp_path):
    path = tmp_path / "m.jsonl"
    parts = [{"type": "text", "text": "1"}, {"type": "text", "text": "+1?"}]
    rows = [
        {"talk": "0+1?", "gold": 1},
        {"talk": [{"role": "user", "content": parts}], "gold": 2},
        {"talk": [{"role": "system", "content": "Own."}, {"role": "user", "content": "2+1?"}], "gold": 3},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n" + json.dumps({"talk": "last", "gold": 0}))
    test = tmp_path / "t.jsonl"
    test.write_text(json.dumps(rows[0]))
    task = jsonl(path, test, question_field="talk", answer_field="gold", system="Be brief.", reward="numeric")
    said = [[(m["role"], m["content"]) for m in e.question] for e in task.train]
    assert said == [
        [("system", "Be brief."), ("user", "1+1?")],
        [("system", "Own."), ("user", "2+1?")],
        [("system", "Be brief."), ("user", "last")],
    ]
    assert task.report["train/removed"] == 1  # the question of the test set, as messages too
    assert [s.reward for s in task.score(task.train, ["2", "3", "1"])] == [1, 1, 0]


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        ([], "field 'talk': is a list without messages"),
        ([{"role": "user"}], "field 'talk': message 1 .user.: its content is missing"),
        ([{"role": "assistant", "content": "b"}], "its last message is the assistant's"),
        (["hi"], "message 1 must be an object with role and content, found 'hi'"),
    ],
)
def test_messages_that_ask_nothing(tmp_path, talk, message):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"talk": talk, "answer": "1"}))
    with pytest.raises(ValueError, match=f"m.jsonl, line 1: .*{message}"):
        jsonl(path, test_size=1, question_field="talk")


def test_questions_without_answers(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "a"}\n{"question": "b"}')
    task = jsonl(path, test_size=1, answer_field="")
    assert task.train[0].answer is None and task.demonstrate is None


def test_lines_are_parsed_when_they_are_asked_for():
    """What is kept of a file is its bytes and two numbers a line."""
    lines = JsonLines(b'{"a": 1}\n\n \n{"a": 2}')
    assert [lines[0], lines[1]] == [{"a": 1}, {"a": 2}] and list(lines.numbers) == [1, 4] and len(lines) == 2


def test_memory_of_many_lines(tmp_path):
    """A task of short lines takes at most three times the memory of its file."""
    import tracemalloc

    path = tmp_path / "many.jsonl"
    rows = ({"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(20_000))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tracemalloc.start()
    try:
        task = jsonl(path, test_size=10)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(task.train) == 19_990 and peak < 3 * path.stat().st_size
