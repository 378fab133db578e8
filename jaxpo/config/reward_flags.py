"""Rewards on the command line: ``--config.task.reward=numeric --config.task.extract=boxed`` and
``--config.task.rewards.format.weight=0.2``.

The options of a reward become fields of the config with their defaults, so that flags set them like any others.
"""

import inspect
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from jaxpo.config.fill import value_of
from jaxpo.tasks.base import task_arguments
from jaxpo.tasks.rewards import options_of
from jaxpo.tasks.scoring import name_of_reward

TASK = "task."
MORE = "task.rewards."


def add_reward_fields(config: ConfigDict, overrides: Sequence[tuple[str, str]]) -> None:
    """Add the rewards that overrides name, and the options of all rewards of the task, to a filled config.

    Args:
      config: changed in place; nothing happens if its task has no rewards to choose.
      overrides: (path, value) from the command line.

    Raises:
      ValueError: an unknown reward (with the nearest), a function that cannot be loaded, or a weight that is no number.
    """
    if config.task.name is None or "rewards" not in (own := task_arguments(config.task.name)):
        return
    given = dict(overrides)
    with config.unlocked():
        _choose(config.task, given, own)
        _add_blocks(config.task, given)
        _add_options(config.task, given)


def _choose(task: ConfigDict, given: Mapping[str, str], own: Mapping[str, inspect.Parameter]) -> None:
    """Take the deciding reward from the overrides; a new one has its own options: drop those of the old one."""
    chosen = given.get("task.reward")
    if chosen is None or chosen == task.reward:
        return
    for field in [f for f in task if f != "name" and f not in own]:
        del task[field]
    task.reward = chosen


def _add_blocks(task: ConfigDict, given: Mapping[str, str]) -> None:
    """Add a block for each reward that an override gives a weight, another function or an option."""
    for path, value in given.items():
        if not path.startswith(MORE):
            continue
        name, *field = path.removeprefix(MORE).split(".")
        if not field:
            raise ValueError(f"--config.{path} is a block: set its weight, --config.{path}.weight={value}")
        if task.rewards is None:
            task.rewards = ConfigDict()
        if name not in task.rewards:
            task.rewards[name] = ConfigDict(dict(weight=1.0))
        if field == ["reward"]:
            task.rewards[name].reward = value
        if field[0] == "weight" and len(field) == 2:  # of a part of the dictionary that it returns
            if not isinstance(task.rewards[name].get("weight"), ConfigDict):
                del task.rewards[name]["weight"]  # a field keeps its type
                task.rewards[name].weight = ConfigDict()
            task.rewards[name].weight[field[1]] = 1.0


def _add_options(task: ConfigDict, given: Mapping[str, str]) -> None:
    """Add the options of every reward, with their defaults: those of the deciding one to the task itself, unless its
    block in ``rewards`` has them."""
    blocks, decides = task.rewards or {}, name_of_reward(task.reward)
    for name in blocks:
        block = blocks[name]
        weight = block.get("weight", 1)
        if isinstance(weight, int):  # a field keeps its type, and a flag may say 0.5
            if "weight" in block:
                del block["weight"]
            block.weight = float(weight)
        reward = task.reward if name == decides else block.get("reward") or name
        for option, parameter in options_of(reward, f"config.task.rewards.{name}").items():
            if option not in block and (name != decides or f"{MORE}{name}.{option}" in given):
                block[option] = value_of(parameter)
    for option, parameter in options_of(task.reward, "config.task.reward").items():
        if option not in task and option not in blocks.get(decides, {}):
            task[option] = value_of(parameter)
