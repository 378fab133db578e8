"""The records, the choice of a task by name, and the imperfect demonstrator."""

import subprocess
import sys

import pytest

from jaxpo.registry import register
from jaxpo.tasks import Example, Score, build, imperfect
from jaxpo.tasks.base import split, verdict


def examples(*questions):
    return [Example(i, q, q[::-1], {}) for i, q in enumerate(questions)]


def test_build_makes_the_named_task():
    task = build({"name": "toy", "train_size": 20, "test_size": 5, "seed": 0, "digits": 2})
    assert task.name == "toy" and len(task.test) == 5 and len(task.test[0].question) == 2


@pytest.mark.parametrize(
    "config, message",
    [
        ({"train_size": 3}, "field 'name' is missing"),
        ({"name": "reasoning_gim"}, "unknown task 'reasoning_gim': did you mean 'reasoning_gym'"),
        ({"name": "toy", "trian_size": 3, "test_size": 1, "seed": 0}, "'trian_size': did you mean 'train_size'"),
        ({"name": "toy", "train_size": 3, "test_size": 1}, "task 'toy' needs seed"),
        ({"name": "jsonl", "path": "no.jsonl", "test_sise": 3}, "'test_sise': did you mean 'test_size'"),
        (
            {"name": "reasoning_gym", "dataset": "gcd", "seed": 0, "test_size": 1},
            "task 'reasoning_gym' needs train_size",
        ),
        (
            {"name": "toy", "train_size": 0, "test_size": 1, "seed": 0},
            "train_size must be a whole number of at least 1, not 0",
        ),
        (
            {"name": "toy", "train_size": 5, "test_size": True, "seed": 0},
            "test_size must be a whole number of at least 1, not True",
        ),
    ],
)
def test_a_wrong_config_is_an_error_that_names_the_field(config, message):
    with pytest.raises(ValueError, match=message):
        build(config)


def test_build_finds_registered_tasks():
    @register("task")
    def made_up_task(size: int):
        return size

    assert build({"name": "made_up_task", "size": 3}) == 3
    with pytest.raises(ValueError, match="'sise': did you mean 'size'"):
        build({"name": "made_up_task", "sise": 3})


def test_split_removes_by_question_text_and_renumbers():
    train, test, report = split(examples("ab", "cd", "ef", "cd"), examples("cd", "xy", "cd"))
    assert [e.question for e in train] == ["ab", "ef"]
    assert [e.index for e in train] == [0, 1] and [e.index for e in test] == [0, 1, 2]
    assert report == {
        "train/size": 2,
        "test/size": 3,
        "train/removed": 2,
        "test/unseen_share": 1.0,
        "test/distinct_share": pytest.approx(2 / 3),
    }


def test_split_that_leaves_nothing_is_an_error():
    with pytest.raises(ValueError, match="nothing to train on: 2 training items, 1 test items, 2 .* removed"):
        split(examples("a", "a"), examples("a"))
    with pytest.raises(ValueError, match="nothing to test on"):
        split(examples("a"), [])


def test_verdicts():
    assert verdict(1.0, None, False) == Score(1.0, True) == verdict(True, None, True)
    assert verdict(0.5, None, False) == Score(0.0, False)
    assert verdict(0.5, None, True) == Score(0.5, False)
    assert verdict(None, "boom", True) == Score(0.0, False, "boom")
    for nonsense in (None, "1", float("nan"), float("inf"), -0.1, 1.5):
        score = verdict(nonsense, None, True)
        assert (score.reward, score.correct) == (0.0, False) and repr(nonsense) in score.error


def test_imperfect_drops_the_last_letter_of_its_share_and_repeats_itself():
    tests = [Example(i, "", "answer", {}) for i in range(2000)]
    spoiled = imperfect(lambda e: e.answer, drop_last=0.6, seed=1)
    texts = [spoiled(e) for e in tests]
    assert set(texts) == {"answer", "answe"}
    assert abs(texts.count("answe") / len(texts) - 0.6) < 0.04
    assert texts == [spoiled(e) for e in tests]
    # Pinned: the same in every process.
    assert [len(t) for t in texts[:12]] == [6, 6, 5, 5, 6, 6, 6, 6, 5, 5, 6, 5]
    assert texts != [imperfect(lambda e: e.answer, 0.6, seed=2)(e) for e in tests]
    assert all(imperfect(lambda e: e.answer, 0.0)(e) == "answer" for e in tests[:50])
    with pytest.raises(ValueError, match="drop_last must be a number in"):
        imperfect(lambda e: e.answer, drop_last=60)


def test_host_side_modules_do_not_import_jax_themselves():
    program = """
import sys, types
package = types.ModuleType("jaxpo"); package.__path__ = [sys.argv[1]]; sys.modules["jaxpo"] = package
import jaxpo.tasks, jaxpo.tasks.rewards, jaxpo.tasks.reasoning_gym, jaxpo.tasks.jsonl, jaxpo.text.tokenizers
heavy = {"jax", "transformers", "reasoning_gym", "math_verify"} & set(sys.modules)
assert not heavy, heavy
"""
    import jaxpo.tasks

    folder = jaxpo.tasks.__path__[0].removesuffix("/tasks")
    subprocess.run([sys.executable, "-c", program, folder], check=True)
