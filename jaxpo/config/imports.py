"""Modules of a user's own, which register tasks, objectives and other things that a config chooses by name.

``config.imports`` names them. It is part of a run's config.json, so that whatever opens the run later knows its names.
"""

import importlib
import re
import sys
from collections.abc import Iterable

from ml_collections import ConfigDict

from jaxpo import registry
from jaxpo.config.blocks import NAMED, block_of

MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
KINDS = {"objective": "objective", "task": "task", "judge": "judge", "tokenizer": "tokenizer", "policy": "policy"}


def modules_in(text: str) -> tuple[str, ...]:
    """The modules that a flag lists: ``a,b.c``, or as in Python ``('a', 'b.c')``; "" = none."""
    return tuple(part for part in re.split(r"[\s,()\[\]'\"]+", text) if part)


def load_imports(modules: Iterable[str], field: str = "config.imports") -> None:
    """Import modules, which registers what they define.

    Raises:
      ValueError: a name that no module can have, a module that is not found or that fails; it names ``field``.
    """
    if isinstance(modules, str):
        modules = modules_in(modules)
    for name in modules:
        if not isinstance(name, str) or not MODULE.fullmatch(name):
            raise ValueError(f"{field}: {name!r} is no name of a module: write it as in an import, package.module")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{field} names the module {name!r}, which is not found ({error}): call the program where "
                f"'import {name}' works, or put its folder on PYTHONPATH"
            ) from error
        except Exception as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{field}: the module {name!r} fails when it is imported: {what}") from error


def add_imports(config: ConfigDict) -> None:
    """Add to ``config.imports`` the modules that registered what the config names, where a config file imported them
    itself: another process does not read that file."""
    found = [
        registry.entry(block_of(config, path).name, KINDS[path]).factory.__module__
        for path in NAMED
        if path in KINDS and block_of(config, path).name in registry.names(KINDS[path])
    ]
    own = [m for m in found if m.partition(".")[0] not in ("jaxpo", "__main__") and m in sys.modules]
    config.imports = tuple(dict.fromkeys((*config.imports, *own)))
