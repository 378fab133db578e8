"""Add to named blocks the arguments that they lack, before flags are parsed; a misspelt field is an error."""

import inspect
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict, config_dict

from jaxpo import registry
from jaxpo.config.blocks import EMPTY, NAMED, OWN, arguments_of, block_of
from jaxpo.config.fields import default
from jaxpo.config.imports import add_imports, load_imports
from jaxpo.fields import JUDGED
from jaxpo.objectives import Objective, make
from jaxpo.policy.adapters import read_adapter
from jaxpo.registry import unknown


def value_of(parameter: inspect.Parameter) -> Any:
    """The default as a config value. None keeps the declared type, so that a flag can set a number."""
    if isinstance(parameter.default, Mapping):  # arguments of any name
        return ConfigDict(dict(parameter.default))
    if parameter.default is not None and parameter.default is not EMPTY:
        return parameter.default
    options = (
        typing.get_args(parameter.annotation)
        if isinstance(parameter.annotation, types.UnionType)
        else (parameter.annotation,)
    )
    kinds = [k for k in (typing.get_origin(k) or k for k in options) if k in (bool, int, float, str, tuple)]
    return config_dict.placeholder(kinds[0] if kinds else object)


def check_names(config: ConfigDict, known: ConfigDict, path: str = "") -> None:
    """Raise ``ValueError`` for a field that no config has. Named blocks are checked when they are filled."""
    for field, value in config.items():
        if field not in known:
            raise ValueError(unknown(f"field of config{path}", field, known))
        if isinstance(value, ConfigDict) and f"{path}.{field}"[1:] not in (*NAMED, "protocol"):
            check_names(value, known[field], f"{path}.{field}")


def fill(config: ConfigDict) -> ConfigDict:
    """Add to every named block, and to the protocol, the arguments that it lacks, with their defaults.

    Raises:
      ValueError: an unknown name or argument (with the nearest), or a missing required argument.
    """
    fill_blocks(config)
    fill_protocol(config, objective_of(config))
    return config


def fill_blocks(config: ConfigDict, but: Collection[str] = ()) -> None:
    """Fill all named blocks except those in ``but``.

    Hyperparameters that depend on the generation budget (``L_const``, ``max_len``, ...) get it from
    ``sampling.max_new_tokens``.
    """
    check_names(config, default())
    load_imports(config.imports)
    with config.unlocked():
        for path in NAMED:
            if path not in but:
                fill_block(config, path)
        add_imports(config)


def fill_lora(config: ConfigDict) -> None:
    """Give ``config.lora`` the rank, alpha and targets of the adapter in its path, if it names one.

    Raises:
      ValueError: there is no adapter, or one of the three is set to something else."""
    own = config.lora
    if own.path is None:
        return
    try:
        found = read_adapter(own.path)._asdict()
    except ValueError as error:
        raise ValueError(f"config.lora.path: {error}") from None
    for field, value in found.items():
        given, start = own[field], default().lora[field]
        if given not in (start, value) and set(np.atleast_1d(given)) != set(np.atleast_1d(value)):
            raise ValueError(f"config.lora.{field} is {given!r}, the adapter in config.lora.path has {value!r}")
        own[field] = value


def fill_block(config: ConfigDict, path: str) -> None:
    """Fill one block of an unlocked config."""
    block = block_of(config, path)
    parameters = dict(NAMED[path](block.name))
    variadic = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    parameters = {k: p for k, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    own = ("name", *OWN.get(path, ()))
    for field in block:
        if field not in own and field not in parameters and not variadic:
            raise ValueError(unknown(f"field of config.{path} ({block.name})", field, [*own, *parameters]))
    row = registry.entry(block.name) if path == "objective" else None
    of_run = (
        row.of_run(config.sampling.max_new_tokens, config.steps, arguments_of(block, row.parameters)) if row else {}
    )
    for name, parameter in parameters.items():
        if name in of_run and block.get(name) is None:
            block[name] = of_run[name]
        elif name not in block:
            block[name] = value_of(parameter)


def tie_temperature(config: ConfigDict) -> bool:
    """Let the trainer score at the temperature of sampling, where none of its own is set; whether that was so."""
    tied = config.policy_temperature is None
    if tied:
        config.policy_temperature = config.sampling.temperature
    return tied


def fill_protocol(config: ConfigDict, objective: Objective) -> None:
    """Fill the protocol's options, without those that the objective's hyperparameters set."""
    block, name = config.protocol, protocol_name(config, objective)
    parameters = registry.entry(name, "protocol").parameters
    taken = objective.protocol.options if name == objective.protocol.name else {}
    for field in block:
        if field in taken:
            raise ValueError(f"config.protocol.{field} is set by config.objective.{field} ({config.objective.name})")
        if field != "name" and field not in parameters:
            raise ValueError(unknown(f"field of config.protocol ({name})", field, ["name", *parameters]))
    with config.unlocked():
        for field, parameter in parameters.items():
            if field not in block and field not in taken:
                block[field] = value_of(parameter)


def objective_of(config: ConfigDict) -> Objective:
    """Build the objective that a filled config names."""
    parameters = registry.entry(config.objective.name).parameters
    return make(config.objective.name, **arguments_of(config.objective, parameters))


def protocol_name(config: ConfigDict, objective: Objective) -> str:
    """The name of the run's protocol: the config's choice, or else the objective's.

    If neither names one, preferences come from ``config.data``; without data, an objective that needs them gets
    ``judged``, and others get ``on_policy``.
    """
    if config.protocol.name or objective.protocol.name != "on_policy":
        return config.protocol.name or objective.protocol.name
    if config.data.name:
        return "preference_data"
    return "judged" if objective.unit.layout or objective.asks.needs & JUDGED else "on_policy"
