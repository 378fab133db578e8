"""Any sensible combination of registered parts from a config: strings that name parts with their arguments."""

import ast
from typing import Any

from jaxpo.arguments import Whole
from jaxpo.calls import call_of, elements_of, finite_number
from jaxpo.objectives.grammar.base import Objective
from jaxpo.objectives.grammar.parts import Part
from jaxpo.objectives.grammar.policy_gradient import policy_gradient
from jaxpo.objectives.parts import aggregation_of
from jaxpo.primitives import aggregation
from jaxpo.registry import check_arguments, entry, make, register


@register(id="policy_gradient", source="any parts together", budget={"max_new_tokens": 1.0, "steps": "steps"})
def composed(
    advantage: str = "group_normalized",
    ratio: str = "token",
    surrogate: str = "clipped",
    agg: str = "token_mean",
    regularizers: str = "",
    filters: str = "",
    shaping: str = "",
    corrections: str = "",
    max_new_tokens: Whole | None = None,
    steps: Whole | None = None,
) -> Objective:
    """*advantage x ratio x surrogate x regularizers x aggregation*, each named, with arguments like a call:
    ``surrogate="clipped(eps_high=0.28)"``, ``regularizers="0.04 * kl_to_reference(estimator='k2') + 0.001 * entropy"``,
    ``filters="mixed_groups, not_truncated"``, ``agg="seq_sum_const(L_const=512)"``.

    Shapes: logp [B, T], reward [B]. What exists: ``python -m jaxpo.objectives``.

    Args:
      advantage, ratio, surrogate, agg: one part each. regularizers: a sum of parts with numbers before them.
      filters, shaping (kind "reward"), corrections: lists, applied in turn.
      max_new_tokens, steps: of the run, which sets them: parts that scale with the generation budget or the number of
        iterations take them where they are not told otherwise."""
    facts = (max_new_tokens, steps)
    one = {
        kind: _build(kind, _items(kind, text, exactly=1)[0][1], facts)
        for kind, text in (("advantage", advantage), ("ratio", ratio), ("surrogate", surrogate))
    }
    parts = {
        kind: [(coef, _build(kind, call, facts)) for coef, call in _items(kind, text)]
        for kind, text in (
            ("regularizer", regularizers),
            ("filter", filters),
            ("reward", shaping),
            ("correction", corrections),
        )
    }
    for kind in ("filter", "reward", "correction"):
        if any(coef != 1 for coef, _ in parts[kind]):
            raise ValueError(f"a {kind} has no coefficient")
    _check(one, [p for _, p in parts["filter"]], ratio)
    aggregate = _build("aggregation", _items("aggregation", agg, exactly=1)[0][1], facts)
    if one["ratio"].id == "sequence_token" and aggregate is aggregation.token_mean:
        raise ValueError("sequence ratios averaged over tokens weigh rows by their length: take agg='seq_mean'")
    return policy_gradient(
        **one,
        aggregate=aggregate,
        regularizers=parts["regularizer"],
        filters=[p for _, p in parts["filter"]],
        shaping=[p for _, p in parts["reward"]],
        corrections=[p for _, p in parts["correction"]],
    )


def _items(kind: str, text: str, exactly: int | None = None) -> list[tuple[float, ast.expr]]:
    """(coefficient, name or call) of the parts that a text names: ``a, b(x=1)`` or ``0.1 * a + b``."""
    if not text.strip() and exactly is None:
        return []
    try:
        elements = elements_of(text)
    except ValueError as error:
        raise ValueError(
            f"{kind} {text[:80]!r} is not a list of names or calls such as name(option=1): {error}"
        ) from None
    items: list[tuple[float, ast.expr]] = []

    def add(node: ast.expr) -> None:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            add(node.left), add(node.right)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            items.append((_number(node.left, text), node.right))
        else:
            items.append((1.0, node))

    for element in elements:
        add(element)
    if exactly is not None and (len(items) != exactly or items[0][0] != 1):
        raise ValueError(f"{kind} takes one part, not {text!r}")
    return items


def _number(node: ast.expr, text: str) -> float:
    try:
        return finite_number(node)
    except ValueError as error:
        raise ValueError(
            f"in {text[:80]!r} a coefficient must be a number, as in 0.1 * name(option=1): {error}"
        ) from None


def _build(kind: str, node: ast.expr, facts: tuple[int | None, int | None]) -> Any:
    """The part that ``name`` or ``name(option=literal, ...)`` asks for; options that follow the run are taken from
    it."""
    try:
        name, given = call_of(node)
    except ValueError as error:
        raise ValueError(f"{kind} {error}") from error
    row = entry(name, kind)
    given = {**row.of_run(*facts, given), **given}
    check_arguments(f"{kind} {name!r}", given, row.parameters)
    return aggregation_of(name, **given) if kind == "aggregation" else make(name, kind, **given)


def _check(one: dict[str, Part], filters: list[Part], ratio: str) -> None:
    if not one["surrogate"].uses_ratio and ratio != "token":
        raise ValueError(f"the surrogate {one['surrogate'].id} looks at no ratio, so ratio={ratio!r} has no effect")
    if one["advantage"].id == "asymre" and "mixed_groups" in [p.id for p in filters]:
        raise ValueError("asymre pushes up answers of solved groups too; the filter mixed_groups would remove them")
    if one["advantage"].id == "gtpo" and one["surrogate"].uses_ratio and one["ratio"].id != "on_policy":
        raise ValueError("gtpo's advantage follows the current policy, so it takes ratio='on_policy'")
