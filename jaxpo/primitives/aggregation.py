"""Aggregations turn (mask, count, batch) into the *weight* of every token, which makes one number of token losses.

The loss is ``sum(weight * value)``. The weight is computed once on the whole optimizer batch, so losses of
microbatches add up and no mean of means can exist. Notation: ``mask`` [B, T] marks the tokens that count, ``count`` [B]
is the multiplicity of rows, ``length_i`` is the number of masked tokens of row i. A row without tokens contributes 0
and still counts among the rows (`without_empty_rows` leaves it out); a row with count 0 leaves the denominator. Some
aggregations also read ``batch.group``. For a value per row, mask is [B, 1]."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from jaxpo.arguments import Positive, positive
from jaxpo.primitives.grouping import group_sum
from jaxpo.primitives.numerics import promote, ratio_or_zero

Aggregation = Callable[[Array, Array, Any], Array]
EmptyRows = Literal["count", "leave"]  # whether rows without tokens count in the number of rows


def token_mean(mask: Array, count: Array, batch: Any) -> Array:
    """``mask count / sum(mask count)``: every token of the batch has the same weight."""
    weight = promote(mask) * promote(count)[:, None]
    return ratio_or_zero(weight, weight.sum())


def seq_mean(mask: Array, count: Array, batch: Any) -> Array:
    """``mask count / (length_i sum(count))``: every row has the same weight."""
    mask, count = promote(mask), promote(count)[:, None]
    return ratio_or_zero(mask * count, mask.sum(-1, keepdims=True) * count.sum())


def seq_sum(mask: Array, count: Array, batch: Any) -> Array:
    """``mask count / sum(count)``: sum over a row's tokens, mean over rows."""
    count = promote(count)[:, None]
    return ratio_or_zero(promote(mask) * count, count.sum())


def seq_sum_const(L_const: Positive) -> Aggregation:  # noqa: N803 (the cards' name)
    """`seq_sum` divided by the constant ``L_const`` (the generation budget, never the padded width)."""
    constant = positive("L_const", L_const)

    def seq_sum_const(mask: Array, count: Array, batch: Any) -> Array:
        return seq_sum(mask, count, batch) / constant

    return seq_sum_const


def sum_const(L_const: Positive) -> Aggregation:  # noqa: N803
    """``mask count / L_const``: a sum that is not divided by the number of rows."""
    constant = positive("L_const", L_const)

    def sum_const(mask: Array, count: Array, batch: Any) -> Array:
        return promote(mask) * promote(count)[:, None] / constant

    return sum_const


def group_mean(mask: Array, count: Array, batch: Any) -> Array:
    """``mask count / (length_i count_group n_groups)``: mean over groups of the mean over their rows; empty groups do
    not count."""
    mask, count = promote(mask), promote(count)[:, None]
    size = group_sum(count[:, 0], batch.group)[:, None]
    n_groups = ratio_or_zero(count, size).sum()
    return ratio_or_zero(mask * count, mask.sum(-1, keepdims=True) * size * n_groups)


def unit_mean(mask: Array, count: Array, batch: Any) -> Array:
    """``count / sum(count)`` [B, 1]: mean over units, if every row of a unit holds the unit's value."""
    count = promote(count)[:, None]
    return ratio_or_zero(jnp.ones_like(mask, count.dtype) * count, count.sum())


def prompt_mean(mask: Array, count: Array, batch: Any) -> Array:
    """``mask count / (length_i count_group G)``: mean over all G groups of the batch, also those that have no row in
    this term, of the mean over their rows in it."""
    mask, count = promote(mask), promote(count)[:, None]
    size = group_sum(count[:, 0], batch.group)[:, None]
    return ratio_or_zero(mask * count, mask.sum(-1, keepdims=True) * size * groups(batch))


def prompt_sum(mask: Array, count: Array, batch: Any) -> Array:
    """``count / G`` [B, 1]: mean over all G groups of the batch of the sum over their rows, empty ones included."""
    return ratio_or_zero(jnp.ones_like(promote(mask)) * promote(count)[:, None], groups(batch))


def groups(batch: Any) -> Array:
    """G, the number of groups with a counted row."""
    count = promote(batch.count)
    return ratio_or_zero(count, group_sum(count, batch.group)).sum()


def row_sum(mask: Array, count: Array, batch: Any) -> Array:
    """``mask count`` [B, 1]: the sum over the rows that have tokens."""
    return promote(mask) * promote(count)[:, None]


@functools.cache
def without_empty_rows(aggregate: Aggregation) -> Aggregation:
    """The aggregation over the rows that have tokens: an empty row leaves the denominators, as in verl."""

    @functools.wraps(aggregate)
    def of_rows_with_tokens(mask: Array, count: Array, batch: Any) -> Array:
        return aggregate(mask, promote(count) * jnp.any(mask > 0, -1), batch)

    return of_rows_with_tokens


PER_TOKEN = {"token_mean": token_mean, "seq_mean": seq_mean, "seq_sum": seq_sum, "group_mean": group_mean}
WITH_CONSTANT = {"seq_sum_const": seq_sum_const, "sum_const": sum_const}
PER_ROW = (seq_mean, group_mean, unit_mean, prompt_mean, prompt_sum, row_sum)
OVER_ROWS = ("seq_mean", "seq_sum", "seq_sum_const", "group_mean")  # those that divide by a number of rows


def is_per_row(aggregate: Aggregation) -> bool:
    """Whether an aggregation takes one value a row."""
    return getattr(aggregate, "__wrapped__", aggregate) in PER_ROW
