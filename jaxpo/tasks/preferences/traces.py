"""Traces of tool calls after an answer, for tool-augmented reward models (Themis, arXiv:2310.01045).

A trace is a list of (kind, text): the call ("tool"), its result ("observation"), and why the answer is good or not
("rationale"). Either the data hold traces (``chosen_trace``), or ``config.trace`` names a function "module:function" of
(question, answer) that makes them, both when pairs are read and when the trained model judges new answers.
"""

import ast
import operator
import re
from collections.abc import Callable, Sequence

from jaxpo.tasks.user_functions import check_places, locate

KINDS = {"tool": 1, "observation": 2, "rationale": 3}  # 0 is the question and the answer themselves
Trace = Sequence[tuple[str, str]]
Tracer = Callable[[str, str], Trace]

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
EXPRESSION = re.compile(r"[\d(][\d\s.()+*/-]*[\d)]")


def check_trace(trace: object) -> tuple[tuple[str, str], ...]:
    """The trace as tuples; ``ValueError`` for anything but pairs of a kind and a text."""
    out = tuple(tuple(part) for part in trace) if isinstance(trace, list | tuple) else None
    if out is None or any(len(p) != 2 or p[0] not in KINDS or not isinstance(p[1], str) for p in out):
        raise ValueError(f"a trace is a list of [kind, text], kinds {', '.join(KINDS)}, not {str(trace)[:60]!r}")
    return out


def tracer_of(path: str) -> Tracer:
    """The function that ``config.trace`` names: its traces are checked when it is called.

    Raises:
      ValueError: there is no such function, or it does not take (question, answer).
    """
    asked = locate(path, "config.trace")
    check_places(asked, ("question", "answer"), f"config.trace {path!r}")
    return lambda question, answer: check_trace(asked(question, answer))


def calculator(question: str, answer: str) -> Trace:
    """The longest arithmetic expression of the question, and its value; [] if the question has none."""
    found = max(EXPRESSION.findall(question), key=len, default="").strip()
    try:
        value = evaluate(ast.parse(found, mode="eval").body)
        shown = f"{value:g}"
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return []
    return [("tool", found), ("observation", shown)]


def evaluate(node: ast.AST) -> float:
    """The value of an expression of numbers, + - * / and parentheses; ``ValueError`` for anything else."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](evaluate(left), evaluate(right))
        case ast.UnaryOp(ast.USub(), operand):
            return -evaluate(operand)
    raise ValueError("not an arithmetic expression")


def reverser(question: str, answer: str) -> Trace:
    """The answer reversed: for a right answer that is the question, a word."""
    return [("tool", answer), ("observation", answer[::-1])]
