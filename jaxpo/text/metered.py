"""Chat templates with a limit of time and of output: a template is a program, and it comes with a model from elsewhere.

Jinja's sandbox keeps a template from Python's objects, but not from loops within loops, or from a text that is doubled
forty times. So the template is compiled with counters: each pass of a loop and each call of a macro looks at the clock,
and what would make a large object is refused before it is made. This costs a function call a pass, on any thread.
"""

import functools
import importlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

SECONDS = 5.0  # of one rendering
CHARACTERS = 1 << 24  # of one text, and of all that is written
ITEMS = 1 << 20  # of a list, and of an object that is written
NUMBER = 1 << 20  # the largest whole number that is given to a function
WIDTH = re.compile(r"\d{7,}")  # of a format


class TooMuch(ValueError):
    """A template takes longer, or writes more, than any conversation needs."""


class _Budget(threading.local):
    """What is left of the rendering of this thread; ``ends`` is None outside of one."""

    ends: float | None = None
    characters: int = 0


_left = _Budget()


@contextmanager
def metered() -> Iterator[None]:
    """The ``with`` block is one rendering."""
    _left.ends, _left.characters = time.monotonic() + SECONDS, CHARACTERS
    try:
        yield
    finally:
        _left.ends = None


def look_at_the_clock() -> None:
    """Raise `TooMuch` if the time is over."""
    if _left.ends is not None and time.monotonic() > _left.ends:
        raise TooMuch(f"it takes longer than {SECONDS:g} s")


def wrote(characters: int) -> None:
    """Count what is written."""
    _left.characters -= characters
    if _left.ends is not None and _left.characters < 0:
        raise TooMuch(f"it writes more than {CHARACTERS:,} characters")


def size_of(x: Any) -> int:
    """Characters of a text, items of a container."""
    return len(x) if isinstance(x, str | bytes | list | tuple | dict) else 0


def fits(size: int, of: Any) -> None:
    """Raise `TooMuch` for an object of ``size`` characters, or items if ``of`` is no text."""
    most, what = (CHARACTERS, "characters") if isinstance(of, str | bytes) else (ITEMS, "items")
    if size > most:
        raise TooMuch(f"it makes something of {size:,} {what}")


def flat(x: Any) -> None:
    """Raise `TooMuch` for a container that holds more than `ITEMS`, at all depths: it is to be written."""
    waiting, seen = [x], 0
    while waiting:
        x = waiting.pop()
        seen += 1
        if seen > ITEMS:
            raise TooMuch(f"it writes an object of more than {ITEMS:,} items")
        if isinstance(x, Mapping):
            waiting += [*dict.keys(x), *dict.values(x)] if isinstance(x, dict) else [*x, *x.values()]
        elif isinstance(x, list | tuple | set | frozenset):
            waiting += x


def small(arguments: Any) -> None:
    """Raise `TooMuch` for a large whole number among arguments, or a format with a large width."""
    for x in arguments:
        if isinstance(x, int) and not isinstance(x, bool) and abs(x) > NUMBER:
            raise TooMuch(f"it gives the number {x:.3g} to a function")


def joined(parts: list[str]) -> str:
    """The parts as one text."""
    fits(sum(map(len, parts)), "")
    return "".join(parts)


def counted(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja that refuses to make something large."""

    @functools.wraps(filter_)
    def one(*arguments: Any, **named: Any) -> Any:
        look_at_the_clock()
        small([*arguments[1:], *named.values()])
        for x in arguments:
            if name in ("string", "tojson", "pprint", "join", "safe", "escape", "e", "urlize", "xmlattr"):
                flat(x)
            if name == "format" and isinstance(x, str) and WIDTH.search(x):
                raise TooMuch("it formats with a large width")
        if name == "join":
            texts = next((a for a in arguments if isinstance(a, list | tuple)), ())
            between = max([size_of(a) for a in [*arguments, *named.values()] if isinstance(a, str)], default=0)
            fits(sum(size_of(t) + between for t in texts), "")
        if name == "replace":
            fits(_replaced(*[a for a in (*arguments, *named.values()) if isinstance(a, str)]), "")
        out = filter_(*arguments, **named)
        fits(size_of(out), out)
        return out

    return one


def _replaced(text: str = "", old: str = "", new: str = "", *_: str) -> int:
    """Characters of ``text.replace(old, new)``."""
    times = text.count(old) if old else len(text) + 1
    return len(text) + times * max(len(new) - len(old), 0)


@functools.cache
def environment_class() -> type:
    """Jinja's sandbox with counters. A class that is made when jinja2 is there."""
    sandbox = importlib.import_module("jinja2.sandbox")

    class Metered(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "+", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**":
                small([left, right])
                if isinstance(right, int) and right > 64:
                    raise TooMuch("it takes a large power")
            elif operator == "*":
                for x, n in ((left, right), (right, left)):
                    if isinstance(n, int) and size_of(x):
                        fits(size_of(x) * max(n, 0), x)
            elif operator == "+":
                fits(size_of(left) + size_of(right), left)
            elif isinstance(left, str) and WIDTH.search(left):
                raise TooMuch("it formats with a large width")
            return super().call_binop(context, operator, left, right)

        def call(__self, __context: Any, __obj: Any, *arguments: Any, **named: Any) -> Any:  # noqa: N805
            look_at_the_clock()
            small([*arguments, *named.values()])
            owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # the sandbox wraps str.format
            method = getattr(__obj, "__name__", "")
            if isinstance(owner, str) and method == "join" and arguments:
                texts = list(arguments[0])
                fits(sum(size_of(t) + len(owner) for t in texts), "")
                arguments = (texts, *arguments[1:])
            if isinstance(owner, str) and method == "replace":
                fits(_replaced(owner, *[a for a in arguments if isinstance(a, str)]), "")
            if isinstance(owner, str) and method.startswith("format") and WIDTH.search(owner):
                raise TooMuch("it formats with a large width")
            out = super().call(__context, __obj, *arguments, **named)
            fits(size_of(out), out)
            return out

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            return with_counters(super()._parse(source, name, filename))

    return Metered


def with_counters(tree: Any) -> Any:
    """The template with a look at the clock in every loop and macro, and counted texts."""
    nodes = importlib.import_module("jinja2.nodes")

    def filtered(node: Any, name: str, *arguments: Any) -> Any:
        made = nodes.Filter(node, name, list(arguments), [], None, None)
        return made.set_environment(tree.environment).set_lineno(getattr(node, "lineno", 1))

    for node in [*tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock))]:
        node.body.insert(0, nodes.ExprStmt(filtered(nodes.Const(0), "_tick")).set_lineno(node.lineno))
    for output in [*tree.find_all(nodes.Output)]:
        output.nodes = [
            filtered(nodes.Const(x.data), "_written") if isinstance(x, nodes.TemplateData) else filtered(x, "_written")
            for x in output.nodes
        ]
    replace_concats(tree, filtered)
    return tree


def replace_concats(node: Any, filtered: Callable[..., Any]) -> None:
    """Let `_joined` put texts together in place of ``~``, everywhere below a node."""
    nodes = importlib.import_module("jinja2.nodes")
    for field, value in node.iter_fields():
        if isinstance(value, list):
            new = [swapped(x, filtered) for x in value]
            value[:] = new
        elif isinstance(value, nodes.Node):
            setattr(node, field, swapped(value, filtered))


def swapped(node: Any, filtered: Callable[..., Any]) -> Any:
    """The node, or what takes its place."""
    nodes = importlib.import_module("jinja2.nodes")
    if not isinstance(node, nodes.Node):
        if isinstance(node, tuple):
            return tuple(swapped(x, filtered) for x in node)
        return node
    replace_concats(node, filtered)
    if isinstance(node, nodes.Concat):
        return filtered(nodes.List(node.nodes).set_lineno(node.lineno), "_joined")
    return node


def filters() -> dict[str, Callable[..., Any]]:
    """The counters, as filters of a template. They take the context, so that Jinja does not run them beforehand."""
    pass_context = importlib.import_module("jinja2").pass_context

    @pass_context
    def _tick(context: Any, x: Any) -> str:
        look_at_the_clock()
        return ""

    @pass_context
    def _written(context: Any, x: Any) -> Any:
        if not isinstance(x, str):
            flat(x)
            x = str(x)
        wrote(len(x))
        return x

    @pass_context
    def _joined(context: Any, parts: list[Any]) -> str:
        for x in parts:
            flat(x)
        return joined([x if isinstance(x, str) else str(x) for x in parts])

    return {"_tick": _tick, "_written": _written, "_joined": _joined}


def with_limits(environment: Any, source: str) -> Any:
    """A template in an environment of Jinja's sandbox, compiled with counters; to be rendered inside `metered`."""
    environment = environment.overlay()
    environment.__class__ = environment_class()
    environment.filters = {name: counted(name, f) for name, f in environment.filters.items()} | filters()
    return environment.from_string(source)
