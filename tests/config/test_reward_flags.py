"""Rewards and their options as flags."""

import json
import textwrap

import pytest

from jaxpo.config.command_line import parse
from jaxpo.runs.workspace import examples_of

CONFIG = """
    from ml_collections import ConfigDict
    from jaxpo.config.fields import default
    def get_config():
        c = default()
        c.task = ConfigDict(dict(name="jsonl", path={path!r}, test_size=1, {more}))
        return c
"""
FUNCTIONS = "def good(completion, answer, *, scale=1.0, style=None):\n    return scale\n"


@pytest.fixture
def task(tmp_path, monkeypatch):
    """The task that flags make of a config file."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"q{i}", "answer": i}) + "\n" for i in range(4)))
    (tmp_path / "flag_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)

    def parsed(*flags, more=""):
        (tmp_path / "config.py").write_text(textwrap.dedent(CONFIG).format(path=str(data), more=more))
        config, _ = parse([f"--config={tmp_path / 'config.py'}", *(f"--config.task.{flag}" for flag in flags)])
        return config, examples_of(config)[0]

    return parsed


def test_options_of_the_deciding_reward(task):
    config, made = task("reward=numeric", "extract=boxed", "tolerance=0.5", "locale=de")
    assert (config.task.extract, config.task.tolerance, config.task.percent) == ("boxed", 0.5, "either")
    assert made.score(made.test, [rf"\boxed{{{made.test[0].answer},4}}"])[0].correct
    assert made.demonstrate(made.test[0]).startswith(r"\boxed")


def test_the_default_reward_has_options_too(task):
    assert task("extract=boxed")[0].task.extract == "boxed"


def test_more_rewards_with_weights(task):
    config, made = task("reward=numeric", "rewards.format.weight=-0.25", "rewards.format.tags=('a',)")
    assert dict(made.rewards) == {"numeric": 1.0, "format": -0.25}
    assert config.task.rewards.format.to_dict() == dict(weight=-0.25, tags=("a",), opened=False, pattern=None)
    [score] = made.score(made.test, [f"<a>{made.test[0].answer}</a>"])
    assert score.reward == 0.75 and score.correct


def test_one_function_under_several_names(task):
    flags = (
        "rewards.short.reward=length",
        "rewards.short.most=100",
        "rewards.long.reward=length",
        "rewards.long.target=9",
    )
    _, made = task("reward=exact", *flags)
    assert dict(made.rewards) == {"exact": 1.0, "long": 1.0, "short": 1.0}


def test_the_weight_of_the_deciding_reward(task):
    assert dict(task("reward=numeric", "rewards.numeric.weight=2", "extract=boxed")[1].rewards) == {"numeric": 2.0}
    config, made = task("reward=numeric", "rewards.numeric.weight=0", "rewards.numeric.extract=boxed")
    assert dict(made.rewards) == {"numeric": 0.0} and config.task.rewards.numeric.extract == "boxed"
    assert dict(task("rewards.format.weight=2")[1].rewards) == {"exact": 1.0, "format": 2.0}


def test_functions_of_the_user(task):
    config, made = task("reward=flag_rewards:good", "scale=3", "rewards.good.weight.a=0.5", "rewards.good.weight.b=-1")
    assert config.task.scale == 3.0 and dict(made.rewards) == {"good/a": 0.5, "good/b": -1.0}
    _, made = task("reward=exact", "rewards.mine.reward=flag_rewards:good", "rewards.mine.scale=3")
    assert dict(made.rewards) == {"exact": 1.0, "mine": 1.0}


def test_another_reward_drops_the_options_of_the_old_one(task):
    config, _ = task("reward=numeric", more="reward='exact', ignore_case=True")
    assert "ignore_case" not in config.task and config.task.tolerance == 0.0
    config, made = task(
        "rewards.format.weight=0.5", more="reward='numeric', tolerance=1.0, rewards=dict(format=dict(weight=2))"
    )
    assert config.task.tolerance == 1.0 and dict(made.rewards) == {"numeric": 1.0, "format": 0.5}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["extract=boxd"], "unknown extract 'boxd': did you mean 'boxed'"),
        (["extrat=boxed"], "unknown field of config.task 'extrat': did you mean 'extract'"),
        (["reward=numeric", "tolerance=abc"], "could not convert string to float"),
        (["reward=numeric", "percent=shar"], "percent must be one of either, share, number, not 'shar'"),
        (["reward=numerc"], "'numerc': did you mean 'numeric'"),
        (["rewards.formt.weight=1"], "config.task.rewards.formt.*'formt': did you mean 'format'"),
        (["rewards.format.weigth=1"], "unknown field of config.task.rewards.format 'weigth': did you mean 'weight'"),
        (["rewards.format.weight=much"], "could not convert string to float"),
        (["rewards.format=0.2"], "is a block: set its weight, --config.task.rewards.format.weight=0.2"),
        (["reward=flag_rewards:god"], "config.task.reward: flag_rewards has no function 'god': did you mean 'good'"),
        (["reward=exact", "rewards.m.reward=flag_rewards:god"], "config.task.rewards.m: flag_rewards has no function"),
    ],
)
def test_wrong_flags(task, flags, message):
    with pytest.raises(ValueError, match=message):
        task(*flags)
