"""Whether a text is only what it should be: a literal, or a formula. Some libraries run the texts that they judge."""

import ast

LONGEST = 10_000  # characters
ARITHMETIC = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Constant)
FUNCTIONS = frozenset(
    "sin cos tan cot sec csc asin acos atan acot asec acsc sinh cosh tanh coth asinh acosh atanh exp log ln sqrt cbrt "
    "Abs sign erf gamma factorial Rational Integer".split()
)


def tree_of(text: str) -> ast.expr | None:
    """The syntax of an expression; None if the text is none, or too long or deep to read."""
    try:
        return ast.parse(text.strip(), mode="eval") if len(text) <= LONGEST else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def is_literal(text: str) -> bool:
    """Whether a text is a number, a text, or lists of them, written as in Python."""
    if len(text) > LONGEST:
        return False
    try:
        ast.literal_eval(text.strip())
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return False
    return True


def is_arithmetic(text: str) -> bool:
    """Whether a text is numbers with ``+ - * / ** // %`` and parentheses, and nothing else."""
    tree = tree_of(text)
    return tree is not None and all(isinstance(node, ARITHMETIC) and _number(node) for node in ast.walk(tree))


def is_algebra(text: str) -> bool:
    """Whether a text is arithmetic with names (``x``, ``C``, ``pi``) and functions of mathematics (``sin(x)``)."""
    tree = tree_of(text)
    return tree is not None and all(map(_algebraic, ast.walk(tree)))


def _algebraic(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and not node.keywords
    if isinstance(node, ast.Name):
        return not node.id.startswith("_")
    return isinstance(node, (*ARITHMETIC, ast.Load)) and _number(node)


def _number(node: ast.AST) -> bool:
    return not isinstance(node, ast.Constant) or type(node.value) in (int, float)
