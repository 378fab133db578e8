"""Aggregations by name: ``(mask, count, batch) -> weight``. Their formulas are in `jaxpo.primitives.aggregation`."""

from collections.abc import Callable
from typing import get_args

from jaxpo.arguments import Positive, choice
from jaxpo.primitives import aggregation
from jaxpo.primitives.aggregation import OVER_ROWS, PER_TOKEN, WITH_CONSTANT, EmptyRows, without_empty_rows
from jaxpo.registry import make, names, register, unknown

EMPTY = get_args(EmptyRows)


def _factory(name: str, fn: Callable) -> Callable[..., aggregation.Aggregation]:
    """A factory of an aggregation, documented as what it gives, with the options that it has."""

    def whole() -> aggregation.Aggregation:
        return fn

    def over_rows(empty_rows: EmptyRows = "count") -> aggregation.Aggregation:
        return of_rows(fn, empty_rows)

    def with_constant(L_const: Positive, empty_rows: EmptyRows = "count") -> aggregation.Aggregation:  # noqa: N803
        return of_rows(fn(L_const), empty_rows)

    if name == "sum_const":
        return fn
    factory = with_constant if name in WITH_CONSTANT else over_rows if name in OVER_ROWS else whole
    factory.__name__, factory.__doc__ = fn.__name__, fn.__doc__
    return factory


def of_rows(aggregate: aggregation.Aggregation, empty_rows: EmptyRows) -> aggregation.Aggregation:
    """The aggregation; with "leave" rows without tokens leave its denominators."""
    return aggregate if choice("empty_rows", empty_rows, EMPTY) == "count" else without_empty_rows(aggregate)


for _name, _fn in {**PER_TOKEN, **WITH_CONSTANT}.items():
    _budget = {"L_const": 1.0} if _name in WITH_CONSTANT else None
    register("aggregation", id=_name, budget=_budget)(_factory(_name, _fn))


def aggregation_of(
    agg: str,
    L_const: Positive | None = None,  # noqa: N803
    empty_rows: EmptyRows = "count",
) -> aggregation.Aggregation:
    """The aggregation called ``agg``; ``L_const`` belongs to the ``*_const`` ones and is refused elsewhere, as
    ``empty_rows`` where no number of rows divides."""
    if agg not in names("aggregation"):
        raise ValueError(unknown("aggregation", agg, names("aggregation")))
    options = {} if empty_rows == "count" else {"empty_rows": empty_rows}
    if options and agg not in OVER_ROWS:
        raise ValueError(f"empty_rows has no effect with agg={agg!r}; it belongs to {' and '.join(OVER_ROWS)}")
    if agg in WITH_CONSTANT:
        return make(agg, "aggregation", L_const=L_const, **options)
    if L_const is not None:
        raise ValueError(f"L_const has no effect with agg={agg!r}; it belongs to {' and '.join(WITH_CONSTANT)}")
    return make(agg, "aggregation", **options)
