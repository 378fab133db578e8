"""The command line of an experiment: a config file, overrides of its fields, and flags of its own."""

import importlib.util
import traceback
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict
from ml_collections.config_flags import config_flags

from jaxpo.config.blocks import NAMED, OWN, block_of
from jaxpo.config.fill import fill
from jaxpo.config.imports import load_imports, modules_in
from jaxpo.registry import unknown

NAMELESS = ("task.name", "data.name", "protocol.name")  # blocks that may have no name


def read(path: str) -> ConfigDict:
    """Read a Python file and return its ``get_config()``.

    Raises:
      ValueError: no such file (the nearest one is named), or it has no ``get_config``.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(unknown("config file", str(file), [str(p) for p in file.parent.glob("*.py")]))
    spec = importlib.util.spec_from_loader(file.stem, SourceFileLoader(file.stem, str(file)))
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        made = module.get_config() if callable(getattr(module, "get_config", None)) else None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        lines += [error.lineno] if isinstance(error, SyntaxError) and error.filename == str(file) else []
        where = f"{path}, line {lines[-1]}" if lines else path
        raise ValueError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if made is None:
        raise ValueError(f"{path} has no function get_config() that returns a config")
    if not isinstance(made, ConfigDict):
        raise ValueError(
            f"{path}: get_config() returns a {type(made).__name__}: start from jaxpo.config.fields.default()"
        )
    return made


def _check_paths(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Raise ``ValueError`` for the first override whose path does not exist; it names the nearest field."""
    for path in overrides:
        here: Any = config
        for i, part in enumerate(path.split(".")):
            if not isinstance(here, ConfigDict) or part not in here:
                where = ".".join(["config", *path.split(".")[:i]])
                raise ValueError(unknown(f"field of {where}", part, list(here) if isinstance(here, ConfigDict) else []))
            here = here.get_ref(part).get() if not isinstance(here[part], ConfigDict) else here[part]


def _take_none(config: ConfigDict, overrides: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Apply overrides such as ``--config.task.name=None``, which empty a block; return the other overrides.

    absl would read "None" as a name.
    """
    none = [(path, value) for path, value in overrides if path in NAMELESS and value == "None"]
    for path, _ in none:
        with config.unlocked():
            config[path.split(".")[0]] = ConfigDict(dict(name=config_dict.placeholder(str)))
    return [override for override in overrides if override not in none]


def _take_imports(config: ConfigDict, overrides: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Apply ``--config.imports=a,b`` and load all modules that the config names, before any name is looked up; return
    the other overrides."""
    for path, value in overrides:
        if path == "imports":
            config.imports = modules_in(value)
    load_imports(config.get("imports") or ())
    return [override for override in overrides if override[0] != "imports"]


def _take_names(config: ConfigDict, overrides: Sequence[tuple[str, str]]) -> None:
    """Apply the overrides that decide which fields exist and their defaults: names, generation budget, steps.

    This must happen before the fields are filled in.
    """
    for path, value in overrides:  # a new name has its own arguments: drop those of the old one
        block = path.rsplit(".", 1)[0]
        if path.endswith(".name") and block in NAMED and block_of(config, block).name != value:
            with config.unlocked():
                if block == "objective":  # a new objective has its own protocol
                    config.protocol = ConfigDict(dict(name=config_dict.placeholder(str)))
                for field in [f for f in block_of(config, block) if f not in ("name", *OWN.get(block, ()))]:
                    del block_of(config, block)[field]
                block_of(config, block).name = value
    for path, value in overrides:
        if path == "sampling.max_new_tokens" and value.isdigit():
            config.sampling.max_new_tokens = int(value)
        if path == "steps" and value.isdigit():
            config.steps = int(value)
        if path == "protocol.name":
            config.protocol.name = value


def parse(
    argv: Sequence[str], *, config_required: bool = True, **extra: Any
) -> tuple[ConfigDict | None, dict[str, Any]]:
    """Read ``--config=file.py``, its ``--config.a.b=value`` overrides, and the other flags of an experiment.

    Args:
      argv: the command line without the program's name.
      config_required: whether a missing ``--config`` is an error.
      extra: flag name -> (default, help); the flag has the type of its default (a bool makes a switch).

    Returns:
      the filled and locked config (None without ``--config``, if that is allowed), and the values of the other flags.

    Raises:
      ValueError: a misspelt name or a wrong type, with the nearest valid choice.
    """
    values = flags.FlagValues()
    known = {"config": "configuration file", **{k: v[1] for k, v in extra.items()}}
    config = None
    given, overrides = {}, []
    for arg in argv:
        name, _, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--"):
            raise ValueError(f"unexpected argument {arg!r}: flags are written --name=value")
        if name.startswith("config."):
            overrides.append((name[len("config.") :], value))
        elif name in ("help", "helpfull"):
            raise SystemExit(
                "\n".join(["flags:", *[f"  --{k}: {v}" for k, v in known.items()], "  --config.FIELD=VALUE: overrides"])
            )
        elif name not in known and name.removeprefix("no") not in known:
            raise ValueError(unknown("flag", f"--{name}", [f"--{k}" for k in known]))
        elif name == "config":
            given["config"] = value
    if "config" in given:
        config = read(given["config"])
        overrides = _take_imports(config, _take_none(config, overrides))
        _take_names(config, overrides)
        fill(config)
        _check_paths(config, [path for path, _ in overrides])
        argv = [a for a in argv if not a.startswith("--config")]
        argv += [f"--config.{path}={value}" for path, value in overrides]
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["", *argv])
    elif config_required or overrides:
        raise ValueError("--config=FILE is required, e.g. --config=configs/quickstart.py")
    for name, (value, text) in extra.items():
        define = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer, float: flags.DEFINE_float}.get(
            type(value), flags.DEFINE_string
        )
        define(name, value, text, flag_values=values)
    try:
        values(["", *argv])
    except (flags.Error, TypeError) as error:
        raise ValueError(str(error)) from error
    return (values["config"].value if config is not None else None), {name: values[name].value for name in extra}
