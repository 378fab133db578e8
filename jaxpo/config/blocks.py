"""Named blocks of a config: which arguments each name takes."""

import inspect
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxpo import registry
from jaxpo.learning.optimizers import optimizer_arguments, schedule_arguments
from jaxpo.policy.config import TransformerConfig
from jaxpo.registry import unknown
from jaxpo.tasks.base import task_arguments
from jaxpo.tasks.preferences.sets import set_arguments

EMPTY = inspect.Parameter.empty


def tokenizer_arguments(name: str) -> Mapping[str, inspect.Parameter]:
    """Arguments of a tokenizer block; ``characters`` takes its alphabet from the task."""
    if name == "characters":
        return {}
    if name == "pretrained":

        def pretrained(path: str, chat_template: bool = True): ...

        return inspect.signature(pretrained).parameters
    if name == "integers":

        def integers(base: int = 10): ...

        return inspect.signature(integers).parameters
    raise ValueError(unknown("tokenizer", name, ("characters", "integers", "pretrained")))


def policy_arguments(name: str) -> Mapping[str, inspect.Parameter]:
    """Arguments of the policy block: every field of a transformer made here; for a pretrained one, which has its shape
    from its own files, where they are and how to compute."""
    if name == "transformer":
        parameters = inspect.signature(TransformerConfig).parameters
        return {field: p for field, p in parameters.items() if field != "vocab_size"}
    if name == "pretrained":

        def pretrained(
            path: str,  # a folder with config.json and safetensors, or a GGUF file
            dtype: str = "float32",
            param_dtype: str = "float32",
            scan_layers: bool = True,
            remat: str = "none",
            attention: str = "auto",
        ): ...

        return inspect.signature(pretrained).parameters
    raise ValueError(unknown("policy", name, ("transformer", "pretrained")))


def optional_name(arguments: Any) -> Any:
    """Arguments of a block whose name may be None, which takes none."""
    return lambda name: {} if name is None else arguments(name)


# path of a named block -> the arguments that its name takes
NAMED = {
    "objective": lambda name: registry.entry(name).parameters,
    "task": optional_name(task_arguments),
    "data": optional_name(set_arguments),
    "judge": lambda name: registry.entry(name, "judge").parameters,
    "tokenizer": tokenizer_arguments,
    "policy": policy_arguments,
    "optimizer": optimizer_arguments,
    "optimizer.schedule": schedule_arguments,
    "warm_start.optimizer": optimizer_arguments,
    "warm_start.optimizer.schedule": schedule_arguments,
}
OWN = {
    "optimizer": ("learning_rate", "clip_norm", "schedule"),
    "warm_start.optimizer": ("learning_rate", "clip_norm", "schedule"),
}


# ---- filling and flags


def block_of(config: ConfigDict, path: str) -> ConfigDict:
    for part in path.split("."):
        config = config[part]
    return config


def arguments_of(block: ConfigDict, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """The fields of a block without its name, and without unset fields whose default is not None."""
    out = {k: v for k, v in block.items() if k != "name"}
    return {
        k: v.to_dict() if isinstance(v, ConfigDict) else v
        for k, v in out.items()
        if v is not None or k not in parameters or parameters[k].default is None
    }
