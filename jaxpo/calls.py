"""Names with arguments, written as in Python: ``grpo(eps_high=0.3)``."""

import ast
import math
from typing import Any

UNREADABLE = (SyntaxError, ValueError, TypeError, MemoryError, RecursionError)  # what ast raises for texts


def elements_of(text: str) -> list[ast.expr]:
    """The expressions of a list ``a, b(x=1)``.

    Raises:
      ValueError: the text is no such list, or one that cannot be read (too deep, an odd character)."""
    try:
        tree = ast.parse(f"[{text}]", mode="eval").body
    except UNREADABLE as error:
        raise ValueError(getattr(error, "msg", None) or str(error) or "it is nested too deeply") from None
    if not isinstance(tree, ast.List) or ast.unparse(tree) == "[]":
        raise ValueError("names or calls are expected, separated by commas")
    return tree.elts


def finite_number(node: ast.expr) -> float:
    """The number that an expression is; ``ValueError`` for anything else, NaN and infinity among it."""
    try:
        value = ast.literal_eval(node)
        finite = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    except (*UNREADABLE, OverflowError):
        finite = False
    if not finite:
        raise ValueError(f"{shown(node)} is no finite number")
    return value


def shown(node: ast.expr) -> str:
    """The text of an expression, for messages."""
    text = ast.unparse(node)
    return repr(text if len(text) <= 80 else f"{text[:80]}...")


def call_of(node: ast.expr) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of ``name`` or ``name(option=literal, ...)``.

    Raises:
      ValueError: anything else.
    """
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    text = shown(node)
    if not isinstance(call.func, ast.Name) or call.args or any(k.arg is None for k in call.keywords):
        raise ValueError(f"{text}: write a name, or name(option=value) with every option named")
    names = [k.arg for k in call.keywords]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{text}: {twice[0]} is given twice")
    try:
        return call.func.id, {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    except UNREADABLE as error:
        raise ValueError(f"{text}: options are plain values") from error


def parse_calls(text: str) -> list[tuple[str, str, dict[str, Any]]]:
    """``"grpo, grpo(eps_high=0.3)"`` as (label, name, arguments); values are Python literals.

    Raises:
      ValueError: anything but names and calls with keyword arguments that are literals.
    """
    try:
        return [(ast.unparse(item), *call_of(item)) for item in elements_of(text)]
    except ValueError as error:
        raise ValueError(f"{text[:80]!r} is no list like grpo,grpo(eps_high=0.3): {error}") from None
