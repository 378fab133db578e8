"""The command line of an experiment: a config file, overrides of its fields, and flags of its own."""

import ast
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
from jaxpo.config.paths import expand_paths
from jaxpo.config.reward_flags import add_reward_fields
from jaxpo.registry import unknown
from jaxpo.storage.paths import expanded

OPEN = ("tokenizer.template_arguments",)  # blocks whose fields have any name
NAMELESS = ("task.name", "data.name", "protocol.name")  # blocks that may have no name


def read(path: str) -> ConfigDict:
    """Read a Python file and return its ``get_config()``.

    Raises:
      ValueError: no such file (the nearest one is named), or it has no ``get_config``.
    """
    file = Path(expanded(path))
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


def _take_open(config: ConfigDict, overrides: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Apply overrides in blocks whose fields have any name; return the other overrides.

    Values are read as Python writes them, true and false in any case; what is no such value is a text.
    """
    rest = []
    for path, value in overrides:
        block, _, field = path.rpartition(".")
        parent, _, name = block.rpartition(".")
        if block not in OPEN or name not in block_of(config, parent):
            rest.append((path, value))
            continue
        with config.unlocked():
            block_of(config, block)[field] = _literal(value)
    return rest


def _literal(value: str) -> Any:
    """The value that a text writes, or the text."""
    try:
        return ast.literal_eval(value.capitalize() if value.lower() in ("true", "false", "none") else value)
    except (ValueError, SyntaxError):
        return value


def parse(
    argv: Sequence[str], *, about: str | None = "", config_required: bool = True, **extra: Any
) -> tuple[ConfigDict | None, dict[str, Any]]:
    """Read ``--config=file.py``, its ``--config.a.b=value`` overrides, and the other flags of an experiment.

    Args:
      argv: the command line without the program's name.
      about: what --help shows before the flags: the program's docstring.
      config_required: whether a missing ``--config`` is an error.
      extra: flag name -> (default, help); the flag has the type of its default (a bool makes a switch).

    Returns:
      the filled and locked config (None without ``--config``, if that is allowed), and the values of the other flags.

    Raises:
      ValueError: a misspelt name or a wrong type, with the nearest valid choice.
      SystemExit: with status 0, for --help.
    """
    if asks_help(argv):
        print(help_text(argv, about or "", extra, config_required))
        raise SystemExit(0)
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
        elif name not in known and name.removeprefix("no") not in known:
            raise ValueError(unknown("flag", f"--{name}", [f"--{k}" for k in known]))
        elif name == "config":
            given["config"] = value
    if "config" in given:
        config = read(given["config"])
        overrides = _take_imports(config, _take_none(config, overrides))
        _take_names(config, overrides)
        fill(config)
        overrides = _take_open(config, overrides)
        add_reward_fields(config, overrides)
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
        raise ValueError(_said(error)) from error
    given = {name: values[name].value for name in extra}
    given |= {name: expanded(value) for name, value in given.items() if _is_home(value)}
    return (expand_paths(values["config"].value) if config is not None else None), given


def _is_home(value: Any) -> bool:
    """Whether a flag holds a path below a home folder; no shell expands ``--workdir=~/a``."""
    return isinstance(value, str) and value.startswith("~")


def _said(error: Exception) -> str:
    """What an error of a flag says; absl puts a tuple of Python in it where a value has the wrong type."""
    cause = error.__context__
    if cause is not None and len(cause.args) > 1 and str(cause.args) in str(error):
        return str(error).replace(str(cause.args), str(cause.args[0]))
    return str(error)


def asks_help(argv: Sequence[str]) -> bool:
    """Whether a command line asks what the program does."""
    return any(arg in ("--help", "-h", "--helpfull", "-help") for arg in argv)


def help_text(argv: Sequence[str], about: str, extra: dict[str, Any], config_required: bool) -> str:
    """What --help prints: the docstring, the flags with their defaults, and with ``--config=FILE`` the fields of that
    config."""
    files = [arg.partition("=")[2] for arg in argv if arg.startswith("--config=")]
    lines = [about.strip(), "", "flags:"] if about.strip() else ["flags:"]
    if config_required:
        lines.append("  --config=FILE: configuration file, e.g. configs/quickstart.py (required)")
        lines.append("  --config.FIELD=VALUE: overrides a field of it")
    for name, (value, text) in extra.items():
        shown = "" if value == "" or "(required)" in text else f" (default: {value})"
        lines.append(f"  --{name}{'' if isinstance(value, bool) else '=VALUE'}: {text}{shown}")
    if files:
        lines += ["", f"fields of {files[-1]}:", *_fields(fill(read(files[-1])))]
    elif config_required:
        lines += ["", "--config=FILE --help lists the fields of that config; jaxpo/config/fields.py explains them"]
    return "\n".join(lines)


def _fields(config: ConfigDict, path: str = "config") -> list[str]:
    """``config.a.b=value`` for every field."""
    out = []
    for name, value in config.items():
        here = f"{path}.{name}"
        out += _fields(value, here) if isinstance(value, ConfigDict) else [f"  --{here}={value}"]
    return out
