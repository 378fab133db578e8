"""Names with arguments, written as in Python: ``grpo(eps_high=0.3)``."""

import ast
from typing import Any


def call_of(node: ast.expr) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of ``name`` or ``name(option=literal, ...)``.

    Raises:
      ValueError: anything else.
    """
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    text = ast.unparse(node)
    if not isinstance(call.func, ast.Name) or call.args or any(k.arg is None for k in call.keywords):
        raise ValueError(f"{text!r}: write a name, or name(option=value) with every option named")
    try:
        return call.func.id, {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    except ValueError as error:
        raise ValueError(f"{text!r}: options are plain values") from error


def parse_calls(text: str) -> list[tuple[str, str, dict[str, Any]]]:
    """``"grpo, grpo(eps_high=0.3)"`` as (label, name, arguments); values are Python literals.

    Raises:
      ValueError: anything but names and calls with keyword arguments that are literals.
    """
    try:
        items = ast.parse(f"({text},)", mode="eval").body.elts
        return [(ast.unparse(item), *call_of(item)) for item in items]
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{text!r} is no list like grpo,grpo(eps_high=0.3): {error}") from None
