"""The user's own function as a judge: a failure does not end a run, failures are counted and told, no success stops."""

import types

import numpy as np
import pytest

from jaxpo.batch import Rollouts
from jaxpo.protocols.gatherer import Watch
from jaxpo.registry import make
from jaxpo.runs.gatherer import compared
from jaxpo.runs.questions import Questions
from jaxpo.tasks import Example
from jaxpo.tasks.failures import Failures, NoVerdict

EXAMPLES = [Example(i, q, q, {}) for i, q in enumerate(("one", "bad", "three"))]
ANSWERS = [["a", "bb"], ["c", "d"], ["eee", "f"]]


class Plain(Questions):
    """Answers are given, not decoded."""

    def answers(self, column, prompts):
        return np.array(ANSWERS, object)[prompts]


def scores(questions, answers):
    if "bad" in questions:
        raise KeyError("no idea")
    return np.array([[len(a) for a in row] for row in answers], np.float32)


def wins(questions, answers):
    if "bad" in questions:
        return [[[float("nan")] * 2] * 2] * len(questions)
    return [[[0.5, 1.0], [0.0, 0.5]]] * len(questions)


def hopeless(questions, answers):
    raise RuntimeError("the service is down")


def shapeless(questions, answers):
    return [1.0, 2.0]


def alone(answers):
    return answers


@pytest.fixture
def asked(monkeypatch):
    """Ask a judge of this module about all prompts; also what was told, and the metrics."""

    def ask(name, tmp_path=None):
        told, watch = [], Watch()
        questions = Plain(None, None, None, None, 1, failures=Failures(say=told.append, folder=tmp_path))
        opinion = make("function", "judge", path=f"{__name__}:{name}")(types.SimpleNamespace(questions=questions))
        column = Rollouts(
            tokens=np.zeros((6, 2)), mask=np.ones((6, 1)), prompt=np.repeat(np.arange(3), 2), shared_prompt=2
        )
        return compared(lambda *x: questions.compare(opinion, *x), watch, EXAMPLES, column), told, watch.notes

    return ask


def test_one_prompt_on_which_it_fails_is_a_tie(asked, tmp_path):
    verdict, told, notes = asked("scores", tmp_path)
    assert verdict.scores.tolist() == [[1, 2], [1.75, 1.75], [3, 1]]  # the mean of what it knows
    assert verdict.wins[1].tolist() == [[0.5, 0.5], [0.5, 0.5]] and verdict.wins[0, 1, 0] == 1
    assert notes == {"judge/errors": 1}
    [text] = told
    assert "the judge failed" in text and "Traceback" in text and "KeyError: 'no idea'" in text
    assert "KeyError: 'no idea'" in (tmp_path / "failures.txt").read_text()


def test_win_probabilities_outside_their_range_are_a_failure(asked):
    verdict, told, notes = asked("wins")
    assert verdict.wins[:, 0, 1].tolist() == [1, 0.5, 1] and notes == {"judge/errors": 1}
    assert "win probabilities must lie in [0, 1]" in told[0]


def test_no_success_stops_with_the_traceback(asked):
    with pytest.raises(NoVerdict, match="the judge: none of 3 calls succeeded(.|\n)*RuntimeError: the service is down"):
        asked("hopeless")
    with pytest.raises(ValueError, match="it gave an array"):
        asked("shapeless")


def test_what_cannot_be_called_is_one_line(asked):
    with pytest.raises(ValueError, match="config.judge.path: .* has no function 'score': did you mean 'scores'"):
        asked("score")
    with pytest.raises(ValueError, match=r"config.judge.path .* is called with \(questions, answers\), but alone"):
        asked("alone")
