"""Aggregations by name: ``(mask, count, batch) -> weight``. Their formulas are in `jaxpo.primitives.aggregation`."""

import functools
from collections.abc import Callable

from jaxpo.arguments import Positive
from jaxpo.primitives import aggregation
from jaxpo.registry import make, names, register, unknown


def _constant(fn: aggregation.Aggregation) -> Callable[[], aggregation.Aggregation]:
    """A factory without options, documented as what it gives."""

    @functools.wraps(fn)
    def factory() -> aggregation.Aggregation:
        return fn

    del factory.__wrapped__, factory.__annotations__  # its signature is its own
    return factory


for _name, _fn in aggregation.PER_TOKEN.items():
    register("aggregation", id=_name)(_constant(_fn))
for _name, _fn in aggregation.WITH_CONSTANT.items():
    register("aggregation", id=_name, budget={"L_const": 1.0})(_fn)


def aggregation_of(agg: str, L_const: Positive | None = None) -> aggregation.Aggregation:  # noqa: N803
    """The aggregation called ``agg``; ``L_const`` belongs to the ``*_const`` ones and is refused elsewhere."""
    if agg not in names("aggregation"):
        raise ValueError(unknown("aggregation", agg, names("aggregation")))
    if agg in aggregation.WITH_CONSTANT:
        return make(agg, "aggregation", L_const=L_const)
    if L_const is not None:
        raise ValueError(
            f"L_const has no effect with agg={agg!r}; it belongs to {' and '.join(aggregation.WITH_CONSTANT)}"
        )
    return make(agg, "aggregation")
