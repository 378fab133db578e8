"""Tasks from files: splits, errors that name file, line and field, and scores."""

import json
import re

import pytest

from jaxpo.tasks import Score, build
from jaxpo.tasks.jsonl import jsonl


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


@pytest.fixture
def sums(tmp_path):
    return write(tmp_path / "sums.jsonl", *({"question": f"{i}+1?", "answer": i + 1} for i in range(10)))


def test_a_held_out_part(sums):
    task = jsonl(sums, test_size=3)
    assert len(task.test) == 3 and len(task.train) == 7
    assert {e.question for e in task.train}.isdisjoint(e.question for e in task.test)
    assert all(task.train[e.index] == e for e in task.train) and all(task.test[e.index] == e for e in task.test)
    assert task.report["test/unseen_share"] == 1 and task.report["train/removed"] == 0
    assert jsonl(sums, test_size=3).test == task.test != jsonl(sums, test_size=3, seed=1).test


def test_duplicates_between_train_and_test_are_removed_and_reported(tmp_path, sums):
    test = write(tmp_path / "test.jsonl", {"question": "3+1?", "answer": 4}, {"question": "new", "answer": 0})
    task = jsonl(sums, test)
    assert "3+1?" not in {e.question for e in task.train}
    assert task.report["train/removed"] == 1 and task.report["train/size"] == 9
    twice = write(tmp_path / "twice.jsonl", *[{"question": f"q{i % 4}", "answer": "a"} for i in range(12)])
    task = jsonl(twice, test_size=2)
    assert len({e.question for e in task.test}) == 2 and len(task.train) == 6 and task.report["train/removed"] == 4


def test_scores(sums):
    task = jsonl(sums, test_size=2, reward="numeric")
    example = task.test[0]
    assert task.score([example] * 3, [f"I think {example.answer}", "0", ""]) == [
        Score(1.0, True),
        Score(0.0, False),
        Score(0.0, False),
    ]
    assert [s.correct for s in task.score(task.train, [task.demonstrate(e) for e in task.train])] == [True] * 8
    with pytest.raises(ValueError):
        task.score([example], [])


def test_answers_that_are_asked_for_in_a_box_are_demonstrated_in_one(sums):
    task = jsonl(sums, test_size=1, reward="exact", extract="boxed")
    assert task.demonstrate(task.test[0]) == rf"\boxed{{{task.test[0].answer}}}"
    assert task.score(task.test, [task.demonstrate(task.test[0])])[0].correct


def test_worked_solutions_are_demonstrations(tmp_path):
    path = write(tmp_path / "d.jsonl", *[{"q": f"{i}", "a": i, "solution": f"it is {i}"} for i in range(3)])
    task = jsonl(
        path, test_size=1, question_field="q", answer_field="a", demonstration_field="solution", reward="numeric"
    )
    assert task.demonstrate(task.train[0]) == f"it is {task.train[0].answer}"
    assert task.score(task.train, [task.demonstrate(e) for e in task.train]) == [Score(1.0, True)] * 2


def test_rewards_that_may_hang_are_timed_and_counted(tmp_path):
    path = write(tmp_path / "r.jsonl", {"question": "a", "answer": "(a+)+b"}, {"question": "b", "answer": "b"})
    task = jsonl(path, path_of(tmp_path), reward="regex", timeout=1.0, workers=1)
    assert task.demonstrate is None
    by_answer = {e.answer: e for e in task.train}
    scores = task.score([by_answer["(a+)+b"], by_answer["b"], by_answer["(a+)+b"]], ["a" * 60, "b", "aab"])
    assert scores == [Score(0.0, False, "timed out after 1 s"), Score(1.0, True), Score(1.0, True)]


def path_of(folder):
    return write(folder / "held_out.jsonl", {"question": "t", "answer": "t"})


def test_math_and_own_rewards(tmp_path):
    path = write(tmp_path / "m.jsonl", {"question": "half", "answer": "1/2"}, {"question": "two", "answer": "2"})
    task = jsonl(path, path_of(tmp_path), reward="math", extract="boxed", timeout=30.0, workers=1)
    scores = task.score([task.train[0]] * 2, [r"\boxed{0.5}", "0.5"])
    assert scores == [Score(1.0, True), Score(0.0, False)]
    own = build({"name": "jsonl", "path": path, "test_size": 1, "reward": "operator:truediv"})
    assert own.demonstrate is None
    assert own.score(own.test, ["1"])[0].error.startswith("TypeError")  # an exception is counted, not a zero


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"question": "a", "anser": "b"}', "field 'answer' is missing: .*did you mean 'anser'"),
        ('{"question": "a", "answer": ', "not JSON: "),
        ('["a", "b"]', "a JSON object is expected, found list"),
        ('{"question": 3, "answer": "b"}', "field 'question' must be a string, not empty, found 3"),
        ('{"question": "", "answer": "b"}', "field 'question' must be a string, not empty, found ''"),
        ('{"question": "a", "answer": null}', "field 'answer' must be a string or a number, not empty, found None"),
        ('{"question": "a", "answer": true}', "field 'answer' must be a string or a number"),
    ],
)
def test_bad_lines_name_file_line_and_field(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", {"question": "q", "answer": "a"}, "", line)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}, line 3: {message}"):
        jsonl(path, test_size=1)


def test_lines_are_utf8_and_only_newlines_end_them(tmp_path):
    path = tmp_path / "u.jsonl"
    path.write_bytes('{"question": "é\u2028\x85", "answer": "ü"}\r\n{"question": "b", "answer": "c"}\n'.encode())
    task = jsonl(path, test_size=1)
    assert {e.question for e in [*task.train, *task.test]} == {"é\u2028\x85", "b"}
    path.write_bytes(b'{"question": "\xff", "answer": "c"}\n')
    with pytest.raises(ValueError, match="line 1: not JSON: .*utf-8"):
        jsonl(path, test_size=1)


def test_answers_are_checked_when_read(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "q", "answer": "1"}, {"question": "r", "answer": "one ("})
    with pytest.raises(ValueError, match="line 2: field 'answer': the answer 'one \\(' contains no number"):
        jsonl(path, test_size=1, reward="numeric")
    with pytest.raises(ValueError, match="line 2: field 'answer': .*is not a regular expression"):
        jsonl(path, test_size=1, reward="regex")


def test_wrong_arguments(tmp_path, sums):
    with pytest.raises(ValueError, match="give exactly one of test_path, test_split and test_size"):
        jsonl(sums)
    with pytest.raises(ValueError, match="give exactly one of test_path, test_split and test_size"):
        jsonl(sums, sums, test_size=1)
    with pytest.raises(ValueError, match="seed=3 has no effect"):
        jsonl(sums, sums, seed=3)
    with pytest.raises(ValueError, match="test_size=10 leaves nothing to train on: .* has 10 different questions"):
        jsonl(sums, test_size=10)
    with pytest.raises(ValueError, match="'qestion_field': did you mean 'question_field'"):
        jsonl(sums, test_size=1, qestion_field="q")
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        jsonl(tmp_path / "nowhere.jsonl", test_size=1)
    with pytest.raises(ValueError, match="empty.jsonl: no items"):
        jsonl(write(tmp_path / "empty.jsonl"), test_size=1)
