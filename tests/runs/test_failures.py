"""Rewards that fail in a run: told once and kept; nothing is learned from zeros; what abstains is left out."""

import json
import types

import numpy as np
import pytest

from jaxpo.batch import Rollouts
from jaxpo.protocols.gatherer import Prompts, Watch
from jaxpo.runs.gatherer import verified
from jaxpo.runs.questions import Questions
from jaxpo.tasks import Example, Task
from jaxpo.tasks.base import Score
from jaxpo.tasks.failures import FILE, Failures, NoVerdict
from jaxpo.tasks.workers import failure
from tests.runs import tiny

FAILED = failure("KeyError: 'x'", "Traceback (most recent call last):\n  in mine\nKeyError: 'x'")
OTHER = failure("timed out after 5 s")


def test_the_first_error_of_each_kind_is_told_once_and_kept(tmp_path):
    told = []
    failures = Failures(say=told.append, folder=tmp_path)
    failures.tell("reward 'a'", [None, FAILED, OTHER, FAILED])
    failures.tell("reward 'a'", [FAILED])
    failures.tell("reward 'b'", [FAILED])
    assert [text.split(" failed")[0] for text in told] == [
        "WARNING: reward 'a'",
        "WARNING: reward 'a'",
        "WARNING: reward 'b'",
    ]
    assert (tmp_path / FILE).read_text().count("in mine") == 2
    failures.check_any("reward 'a'", 3, 4)
    failures.check_any("reward 'a'", 0, 0)
    with pytest.raises(NoVerdict, match="reward 'a': none of 4 calls succeeded(.|\n)*in mine\nKeyError"):
        failures.check_any("reward 'a'", 4, 4)


class Digits(types.SimpleNamespace):
    """A tokenizer whose tokens are digits."""

    def decode(self, ids):
        return "".join(map(str, ids))


WEIGHTS = {"a": 1.0, "b": -0.5}


def workspace_of(parts, needs=frozenset(), say=print):
    """A workspace whose task says ``parts`` of its rows."""

    def score(examples, texts):
        assert [text.ids for text in texts] == [[i] for i in range(len(parts))]
        out = []
        for said in parts:
            errors = [p for p in said.values() if isinstance(p, str)]
            reward = sum(WEIGHTS[n] * p for n, p in said.items() if isinstance(p, float))
            out.append(Score(reward, said["a"] == 1, errors[0] if errors else None, said))
        return out

    examples = [Example(0, "q", "a", {})]
    task = Task("made up", examples, examples, score, None, {}, WEIGHTS)
    prompts = Prompts(examples, np.zeros((1, 1), np.int32), np.ones(1, np.int32))
    questions = Questions(task, Digits(), prompts, prompts, 1, rewards=WEIGHTS, failures=Failures(say=say))
    objective = types.SimpleNamespace(asks=types.SimpleNamespace(needs=needs))
    config = types.SimpleNamespace(judge=types.SimpleNamespace(name="verifier"))
    return types.SimpleNamespace(questions=questions, objective=objective, config=config)


def rollouts(n):
    return Rollouts(
        tokens=np.stack([np.zeros(n, np.int32), np.arange(n)], 1),
        mask=np.ones((n, 1)),
        prompt=np.zeros(n, np.int32),
        count=np.ones(n),
    )


ROWS = [{"a": 1.0, "b": 0.5}, {"a": 0.0, "b": None}, {"a": None, "b": None}, {"a": FAILED, "b": 1.0}]


def test_rewards_become_fields_of_the_batch_and_curves():
    watch, told = Watch(), []
    batch = verified(workspace_of(ROWS, frozenset({"rewards_multi"}), told.append), watch, None, rollouts(4))
    assert batch.reward.tolist() == [0.75, 0, 0, -0.5] and batch.correct.tolist() == [1, 0, 0, 0]
    assert batch.count.tolist() == [1, 1, 0, 1]  # nothing is learned from a row of which all abstain
    assert batch.get("rewards_multi").tolist() == [[1, 0.5], [0, 0], [0, 0], [0, 1]]
    assert batch.get("reward_weights").tolist() == [[1, -0.5], [1, 0], [0, 0], [0, -0.5]]
    assert watch.notes == {
        "reward/errors": 1,
        "reward/abstained": 1,
        "reward/a/count": 2,
        "reward/a/mean": 0.5,
        "reward/b/count": 2,
        "reward/b/mean": 0.75,
    }
    assert len(told) == 1 and "reward 'a' failed" in told[0] and "in mine" in told[0]


def test_curves_are_means_over_all_rows_of_an_iteration():
    watch, first, second = Watch(), [{"a": 1.0, "b": None}], [{"a": 0.0, "b": None}, {"a": 0.0, "b": 2.0}]
    for rows in (first, second):
        verified(workspace_of(rows), watch, None, rollouts(len(rows)))
    assert watch.notes["reward/a/mean"] == pytest.approx(1 / 3) and watch.notes["reward/a/count"] == 3
    assert watch.notes["reward/b/mean"] == 2 and watch.notes["reward/b/count"] == 1


def test_a_reward_that_always_fails_stops_the_run_though_others_work():
    with pytest.raises(NoVerdict, match="reward 'b': none of 2 calls succeeded(.|\n)*in mine"):
        verified(workspace_of([{"a": 1.0, "b": FAILED}] * 2), Watch(), None, rollouts(2))


def test_a_run_without_a_verdict_stops_before_it_trains(tmp_path, monkeypatch):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"{i}", "answer": i}) + "\n" for i in range(9)))
    (tmp_path / "always_fails.py").write_text(
        "def judged(completion, answer):\n    return float(compleshun == answer)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    task = {"name": "jsonl", "path": str(data), "test_size": 2, "reward": "always_fails:judged", "workers": 1}
    changes = {"task": task, "tokenizer": {"name": "characters"}, "evaluation.pass_at": (), "warm_start.steps": 0}
    with tiny.quick(), pytest.raises(NoVerdict, match="(?s)reward 'judged': none of 2 .*line 2, in judged.*compleshun"):
        tiny.run(tiny.config(changes), tmp_path / "run")
    assert "name 'compleshun' is not defined" in (tmp_path / "run" / FILE).read_text()
    assert not tiny.lines(tmp_path / "run" / "metrics.jsonl")
