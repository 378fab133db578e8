"""Functions of the user, which a config names as ``"module:function"``: loaded, asked, and understood in one way.

Whatever is wrong with one (no such module, an error in it, no such name, no function, other arguments) is one line that
names the field of the config. This module imports no jax.
"""

import functools
import importlib
import inspect
import math
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from jaxpo.registry import unknown


def locate(path: str, field: str = "a function's path") -> Any:
    """The function that ``"package.module:name"`` names; a name may have dots.

    Args:
      path: of the function.
      field: what messages call it, such as ``config.task.reward``.

    Raises:
      ValueError: no such module or name (with the nearest), an error while the module is imported (with its place), or
        something that cannot be called.
    """
    module_name, _, name = str(path).partition(":")
    if not module_name or not name:
        raise ValueError(f'{field} {path!r} names no function: write "module:function"')
    found = module = _import(module_name, f"{field} {path!r}")
    for part in name.split("."):
        if not hasattr(found, part):
            names = [n for n in dir(found) if not n.startswith("_") and callable(getattr(found, n))]
            where = module_name if found is module else getattr(found, "__qualname__", module_name)
            raise ValueError(f"{field}: {where} has no function {part!r}: {_nearest(part, names)}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{field}: {path} is {found!r:.60}, a value of type {type(found).__name__}, and no function")
    return found


def _import(name: str, field: str) -> Any:
    """The module; ``ValueError`` in one line for whatever goes wrong."""
    importlib.invalidate_caches()  # the file may be younger than the last look into its folder
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            parent = error.name.rpartition(".")[0]
            folders = getattr(sys.modules.get(parent), "__path__", []) if parent else None
            near = [f"{parent}.{m.name}" if parent else m.name for m in pkgutil.iter_modules(folders)]
            hint = _nearest(error.name, near).partition("known: ")[0]
            raise ValueError(
                f"{field}: there is no module {error.name!r}: {hint}it must lie in a folder of PYTHONPATH or be "
                "installed"
            ) from None
        raise ValueError(f"{field}: module {name!r} cannot be imported: {describe(error)}") from None
    except (Exception, SystemExit) as error:  # user code: it may raise anything
        raise ValueError(f"{field}: module {name!r} cannot be imported: {describe(error)}") from None


def _nearest(name: str, choices: Iterable[str]) -> str:
    return unknown("", name, choices).partition(": ")[2]


def describe(error: BaseException) -> str:
    """An error in a line: its type, its message, and the line of code that raised it."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith("<") and "importlib" not in f.filename]
    if isinstance(error, SyntaxError) or not own or own[-1].filename == __file__:
        return text
    return f"{text} ({own[-1].filename}, line {own[-1].lineno})"


def check_places(function: Callable, names: Iterable[str], field: str) -> None:
    """Check that a function can be called with these arguments, by place.

    Raises:
      ValueError: it takes fewer, or needs more.
    """
    names = tuple(names)
    signature = signature_of(function)
    if signature is None:
        return
    try:
        signature.bind(*names)
    except TypeError as error:
        raise ValueError(
            f"{field} is called with ({', '.join(names)}), but {name_of(function)}{signature} does not take that: "
            f"{error}"
        ) from None


def signature_of(function: Callable) -> inspect.Signature | None:
    """The signature of a function; None if it tells none, as some that are written in C."""
    try:
        return inspect.signature(function)
    except (ValueError, TypeError):
        return None


def name_of(function: Any) -> str:
    """The name of a function, also of a partial one or of an object that can be called."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def as_number(value: Any) -> float:
    """A finite number that a function returned: of Python, a truth value, a NumPy scalar, an array without axes.

    Raises:
      ValueError: anything else.
    """
    if inspect.iscoroutine(value):
        value.close()
        raise ValueError("it returned a coroutine: write def instead of async def")
    shape = getattr(value, "shape", ())
    if isinstance(value, str | bytes) or not hasattr(value, "__float__") or tuple(shape) != ():
        raise ValueError(f"it returned {value!r:.80}, a value of type {type(value).__name__}, and not a number")
    try:
        number = float(value)
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"it returned {value!r:.80}: {error}") from None
    if not math.isfinite(number):
        raise ValueError(f"it returned {number}, and not a finite number")
    return number
