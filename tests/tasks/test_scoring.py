"""Rewards of a task: what functions may ask for, what they may return, and how several add up."""

import json
import operator

import numpy as np
import pytest

from jaxpo.tasks import Example
from jaxpo.tasks.base import Completion
from jaxpo.tasks.jsonl import jsonl
from jaxpo.tasks.scoring import arguments, ask, asked_by, choices, make_judge, make_score, parts_of
from jaxpo.tasks.workers import Outcome, attempt, failure

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
PLAIN = Example(0, "1+1?", "2", {"question": "1+1?", "answer": 2, "level": 3, "hint": "add"})
TOLD = Example(1, TALK, "2", {"prompt": TALK, "answer": 2, "level": 4})


def completion(text, ids=(5, 1)):
    out = Completion(text)
    out.ids = list(ids)
    return out


def said(function, example=PLAIN, text="it is 2", columns=("level", "hint")):
    """What a function is called with: it returns its arguments."""
    asked = asked_by(function, columns, "config.task.reward")
    given = arguments(asked, example, completion(text))
    return function(*given.values()) if asked.by_place else function(**given)


def test_a_function_gets_what_it_asks_for_by_name():
    assert said(lambda completion, answer: (completion, answer)) == ("it is 2", "2")
    assert said(lambda answer, completion: (completion, answer)) == ("it is 2", "2")
    assert said(lambda level, completion: (level, completion)) == (3, "it is 2")
    assert said(lambda completion_ids: completion_ids) == [5, 1]
    assert said(lambda question, prompt: (question, prompt)) == ("1+1?", "1+1?")
    assert said(lambda messages: messages) == [{"role": "user", "content": "1+1?"}]
    assert said(lambda messages, prompt, question: (messages, prompt, question), TOLD) == (TALK, TALK, "1+1?")
    assert type(said(lambda completion, answer: completion)) is str


def test_the_old_form_takes_completion_and_answer_by_place():
    assert said(lambda text, gold: (text, gold)) == ("it is 2", "2")
    assert said(lambda text, gold, strict=True: (text, gold, strict)) == ("it is 2", "2", True)
    assert said(operator.eq) is False
    assert said(lambda *both: both) == ("it is 2", "2")


def test_defaults_hold_where_a_row_has_no_such_column():
    assert said(lambda completion, hint="none": hint) == "add"
    assert said(lambda completion, hint="none": hint, TOLD) == "none"
    assert said(lambda completion, other="none": other) == "none"


def test_keywords_get_everything():
    everything = said(lambda completion, **rest: rest)
    assert everything.keys() == {"completion_ids", "answer", "question", "prompt", "messages", "level", "hint"}
    assert everything["answer"] == "2"  # the right answer as text, not the column


def f_misspelt(completion, anwser):
    return 0


def f_column(completion, levle):
    return 0


@pytest.mark.parametrize(
    "function, message",
    [
        (f_misspelt, r"f_misspelt\(completion, anwser\) asks for 'anwser'.*did you mean 'answer'"),
        (f_column, "asks for 'levle'.*did you mean 'level'"),
        (lambda text: 0, "asks for 'text': it must take"),
        (lambda a, b, c: 0, "asks for 'a'"),
        (lambda: 0, "asks for nothing that a reward can have: answer, completion"),
        (lambda a, /: 0, "asks for 'a'"),
    ],
)
def test_what_a_reward_cannot_have(function, message):
    with pytest.raises(ValueError, match=f"config.task.reward: .*{message}"):
        asked_by(function, ("level", "hint"), "config.task.reward")


def test_token_ids_of_a_text_alone_are_an_error_of_the_row():
    asked = asked_by(lambda completion_ids: 0, (), "x")
    with pytest.raises(ValueError, match="completions of the policy"):
        arguments(asked, PLAIN, "a text of data")
    assert "completion_ids" not in arguments(asked_by(lambda **rest: 0, (), "x"), PLAIN, "a text of data")


def test_a_column_that_some_rows_lack_is_named_before_anything_is_asked():
    [choice] = choices(lambda completion, hint: 0)
    with pytest.raises(ValueError, match="asks for the column 'hint', which 1 of 2 rows lack"):
        make_judge(choice, [[PLAIN], [TOLD]])


def test_a_batch_form_is_called_once_with_lists():
    calls = []

    def batched(completions, prompts, level, **rest):
        calls.append((completions, prompts, level, sorted(rest)))
        return [len(text) for text in completions]

    asked = asked_by(batched, ("level", "hint"), "x")
    rows = [arguments(asked, e, completion(t)) for e, t in ((PLAIN, "a"), (TOLD, "bcd"))]
    assert ask(asked, lambda c: [attempt(lambda given: batched(**given), one) for one in c], rows) == [
        (1, None),
        (3, None),
    ]
    assert calls == [
        (["a", "bcd"], ["1+1?", TALK], [3, 4], ["answer", "completion_ids", "hint", "messages", "question"])
    ]


@pytest.mark.parametrize("returned", [[1.0], 1.0, None, "ab", {"a": 1, "b": 2}])
def test_a_batch_form_must_return_a_value_a_row(returned):
    asked = asked_by(lambda completions: 0, (), "x")
    outcomes = ask(asked, lambda calls: [Outcome(returned, None)], [{"completions": "a"}, {"completions": "b"}])
    assert all("not a list with a value for each of 2 rows" in error for _, error in outcomes)


def test_what_a_reward_may_return():
    [choice] = choices(f_misspelt)
    of = lambda value: parts_of(choice, Outcome(value, None))  # noqa: E731
    assert of(np.float32(0.5)) == {"f_misspelt": 0.5}
    assert of(-7) == {"f_misspelt": -7.0} and of(True) == {"f_misspelt": 1.0}
    assert of(None) == {"f_misspelt": None}
    assert of({"a": 1, "b": np.array(0.5), "c": None}) == {
        "f_misspelt": 1.5,
        "f_misspelt/a": 1.0,
        "f_misspelt/b": 0.5,
        "f_misspelt/c": None,
    }
    assert of({}) == of(None)
    assert "nan, and not a finite number" in of(float("nan"))["f_misspelt"]
    assert "'b': it returned 'x'" in of({"a": 1, "b": "x"})["f_misspelt"]
    assert parts_of(choice, Outcome(None, failure("boom"))) == {"f_misspelt": "boom"}


def test_parts_of_a_dictionary_may_have_weights():
    [choice] = choices(f_misspelt, {"f_misspelt": {"weight": {"a": 2.0, "b": -1.0}}})
    assert parts_of(choice, Outcome({"a": 1}, None)) == {"f_misspelt/a": 1.0, "f_misspelt/b": None}
    score = make_score([choice], [lambda rows, texts: [parts_of(choice, Outcome({"a": 1, "b": 3}, None))]])
    assert score([PLAIN], ["x"])[0].reward == -1.0
    assert (
        "its part has no weight: unknown part 'f_misspelt/c'"
        in parts_of(choice, Outcome({"c": 1}, None))["f_misspelt/a"]
    )
    assert "not a dictionary of f_misspelt/a, f_misspelt/b" in parts_of(choice, Outcome(1.0, None))["f_misspelt/a"]


def scored(*values, weights=(1.0, 0.5, -2.0)):
    """The score of a row of which three rewards say these values."""
    chosen = [
        choice
        for name, weight in zip("abc", weights, strict=True)
        for choice in choices("exact", {name: {"weight": weight, "reward": "exact"}})[1:]
    ]
    judges = [
        lambda rows, texts, c=c, v=v: [parts_of(c, v if isinstance(v, Outcome) else Outcome(v, None))]
        for c, v in zip(chosen, values, strict=True)
    ]
    [score] = make_score(chosen, judges)([PLAIN], ["x"])
    return score


def test_several_rewards_add_up_by_their_weights():
    score = scored(1.0, 0.5, 0.25)
    assert score.reward == 1.0 + 0.25 - 0.5 and score.correct and score.parts == {"a": 1.0, "b": 0.5, "c": 0.25}
    assert not scored(0.5, 1.0, 1.0).correct  # the first one decides
    assert scored(100.0, -3.0, None).reward == 98.5
    assert scored(None, 1.0, None).reward == 0.5


def test_a_row_of_which_all_abstain_is_no_zero():
    assert scored(None, None, None).abstained and not scored(None, 0.0, None).abstained
    broken = scored(None, None, Outcome(None, failure("boom", "Traceback")))
    assert not broken.abstained and broken.error == "c: boom" and broken.error.traceback == "Traceback"
    assert scored(1.0, Outcome(None, failure("boom")), 0.0).reward == 1.0


@pytest.mark.parametrize(
    "reward, rewards, options, message",
    [
        ("numerc", None, {}, "unknown reward .config.task.reward. 'numerc': did you mean 'numeric'"),
        ("numeric", {"formt": {}}, {}, "config.task.rewards.formt.*did you mean 'format'"),
        ("numeric", {"format": {"tag": "a"}}, {}, "config.task.rewards.format.*'tag': did you mean 'tags'"),
        ("numeric", {"format": 0.2}, {}, "config.task.rewards.format must hold weight and options"),
        ("numeric", {"format": {"weight": "x"}}, {}, "the weight of format must be a finite number, not 'x'"),
        ("numeric", {"format": {"weight": float("nan")}}, {}, "the weight of format must be a finite number"),
        ("numeric", {"numeric": {"extract": "text"}}, {"extract": "boxed"}, "config.task.extract and .* differ"),
        ("numeric", {"long": {"reward": "length"}}, {}, "needs either target"),
        ("numeric", {"m": {"reward": "operator:eqq"}}, {}, "config.task.rewards.m: operator has no function 'eqq'"),
    ],
)
def test_wrong_rewards(reward, rewards, options, message):
    with pytest.raises(ValueError, match=message):
        choices(reward, rewards, options)


def test_the_deciding_reward():
    assert [c.name for c in choices("exact")] == ["exact"]
    assert [c.name for c in choices("operator:eq", {"numeric": {"weight": 2}})] == ["eq", "numeric"]
    chosen = choices("numeric", {"format": {"weight": 0.2}, "numeric": {"weight": 3, "extract": "boxed"}})
    assert [(c.name, dict(c.weights)) for c in chosen] == [("numeric", {"numeric": 3.0}), ("format", {"format": 0.2})]
    assert chosen[0].options == {"extract": "boxed"}


def by_column(completion, level, *, scale=1.0):
    return scale * float(level) if completion else None


def raises(completion, answer):
    if completion == "bad":
        raise KeyError("no such thing")
    return {"fine": 1}


def test_a_task_with_several_rewards(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{i}", "answer": i, "level": i}) + "\n" for i in range(4)))
    rewards = {
        "form": {"reward": "format", "weight": 0.5, "tags": ("a",)},
        "level": {"reward": by_column, "weight": -1.0, "scale": 2.0},
        "raises": {"reward": raises, "weight": 0.0},
    }
    task = jsonl(path, test_size=1, reward="numeric", rewards=rewards, workers=1)
    assert dict(task.rewards) == {"numeric": 1.0, "form": 0.5, "level": -1.0, "raises": 0.0}
    example = task.train[0]
    level = float(example.answer)
    right, empty, bad = task.score([example] * 3, [f"<a>{example.answer}</a>", "", "bad"])
    assert right.reward == 1.5 - 2 * level and right.correct and right.error is None
    assert right.parts == {"numeric": 1.0, "form": 1.0, "level": 2 * level, "raises": 1.0, "raises/fine": 1.0}
    assert empty.parts["level"] is None and empty.reward == 0.0
    assert bad.error == "raises: KeyError: 'no such thing'"
    assert bad.error.traceback.startswith("Traceback") and "in raises" in bad.error.traceback
    assert "workers.py" not in bad.error.traceback
