"""Named blocks of a config: which arguments each name takes."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxpo import registry
from jaxpo.learning.optimizers import optimizer_arguments, schedule_arguments
from jaxpo.tasks.base import task_arguments
from jaxpo.tasks.preferences.sets import set_arguments

EMPTY = inspect.Parameter.empty


def registered(kind: str) -> Callable[[str], Mapping[str, inspect.Parameter]]:
    """A function: name of a registered entry of this kind -> its arguments."""
    return lambda name: registry.entry(name, kind).parameters


def optional_name(arguments: Any) -> Any:
    """The same function for a block whose name may be None: None takes no arguments."""
    return lambda name: {} if name is None else arguments(name)


# path of a named block -> the arguments that its name takes
NAMED = {
    "objective": registered("objective"),
    "task": optional_name(task_arguments),
    "data": optional_name(set_arguments),
    "judge": registered("judge"),
    "tokenizer": registered("tokenizer"),
    "policy": registered("policy"),
    "optimizer": optimizer_arguments,
    "optimizer.schedule": schedule_arguments,
    "optimizers.critic": optional_name(optimizer_arguments),
    "optimizers.critic.schedule": schedule_arguments,
    "warm_start.optimizer": optimizer_arguments,
    "warm_start.optimizer.schedule": schedule_arguments,
}
OPTIMIZERS = ("optimizer", "optimizers.critic", "warm_start.optimizer")
OWN = dict.fromkeys(OPTIMIZERS, ("learning_rate", "clip_norm", "schedule"))


# ---- filling and flags


def block_of(config: ConfigDict, path: str) -> ConfigDict:
    for part in path.split("."):
        config = config[part]
    return config


def arguments_of(block: ConfigDict, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """The fields of a block, without its name and without fields that are None but have another default."""
    out = {k: v for k, v in block.items() if k != "name"}
    return {
        k: v.to_dict() if isinstance(v, ConfigDict) else v
        for k, v in out.items()
        if v is not None or k not in parameters or parameters[k].default is None
    }
