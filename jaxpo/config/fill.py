"""Fill named blocks with the arguments that they lack, before flags are parsed; a misspelt field fails."""

import inspect
import types
import typing
from typing import Any

from ml_collections import ConfigDict, config_dict

from jaxpo import registry
from jaxpo.config.blocks import EMPTY, NAMED, OWN, block_of
from jaxpo.config.fields import default
from jaxpo.config.resolve import objective_of, protocol_name
from jaxpo.registry import unknown


def _value(parameter: inspect.Parameter) -> Any:
    """The default as a config value: None keeps its type, so that a flag can give it a number."""
    if parameter.default is not None and parameter.default is not EMPTY:
        return parameter.default
    options = (
        typing.get_args(parameter.annotation)
        if isinstance(parameter.annotation, types.UnionType)
        else (parameter.annotation,)
    )
    kinds = [k for k in (typing.get_origin(k) or k for k in options) if k in (bool, int, float, str, tuple)]
    return config_dict.placeholder(kinds[0] if kinds else object)


def _check_fields(config: ConfigDict, known: ConfigDict, path: str = "") -> None:
    """``ValueError`` for a field that no run has; named blocks are checked where their names are."""
    for field, value in config.items():
        if field not in known:
            raise ValueError(unknown(f"field of config{path}", field, known))
        if isinstance(value, ConfigDict) and f"{path}.{field}"[1:] not in (*NAMED, "protocol"):
            _check_fields(value, known[field], f"{path}.{field}")


def fill(config: ConfigDict) -> ConfigDict:
    """Add to every named block the arguments it lacks, with their defaults.

    Hyperparameters that are a share of the generation budget (``L_const``, ``max_len``, ...) get it from
    ``sampling.max_new_tokens``.

    Raises:
      ValueError: an unknown name or argument (with the nearest), or a required argument that nothing gives.
    """
    _check_fields(config, default())
    with config.unlocked():
        for path, arguments in NAMED.items():
            block = block_of(config, path)
            parameters = dict(arguments(block.name))
            variadic = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            parameters = {k: p for k, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
            own = ("name", *OWN.get(path, ()))
            for field in block:
                if field not in own and field not in parameters and not variadic:
                    raise ValueError(unknown(f"field of config.{path} ({block.name})", field, [*own, *parameters]))
            row = registry.entry(block.name) if path == "objective" else None
            of_run = row.of_run(config.sampling.max_new_tokens, config.steps) if row else {}
            for name, parameter in parameters.items():
                if name in of_run and block.get(name) is None:
                    block[name] = of_run[name]
                elif name not in block:
                    block[name] = _value(parameter)
        _fill_protocol(config)
    return config


def _fill_protocol(config: ConfigDict) -> None:
    """The protocol's own options; those that the objective's hyperparameters set are not asked for again."""
    block, objective = config.protocol, objective_of(config)
    name = protocol_name(config, objective)
    parameters = registry.entry(name, "protocol").parameters
    taken = objective.protocol.options if name == objective.protocol.name else {}
    for field in block:
        if field in taken:
            raise ValueError(f"config.protocol.{field} is set by config.objective.{field} ({config.objective.name})")
        if field != "name" and field not in parameters:
            raise ValueError(unknown(f"field of config.protocol ({name})", field, ["name", *parameters]))
    for field, parameter in parameters.items():
        if field not in block and field not in taken:
            block[field] = _value(parameter)
