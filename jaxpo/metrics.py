"""Metrics that merge exactly: whatever the split into microbatches, the result is that of the whole batch."""

from collections.abc import Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array


def _wide(value: Array, weight: Array) -> tuple[Array, Array]:
    """Both in one shape and one float dtype: at least float32, and float64 where there is one of the two."""
    value, weight = jnp.asarray(value), jnp.asarray(weight)
    floats = [x.dtype for x in (value, weight) if jnp.issubdtype(x.dtype, jnp.floating)] or [jnp.result_type(float)]
    dtype = jnp.result_type(jnp.float32, *floats)
    return tuple(jnp.broadcast_arrays(value.astype(dtype), weight.astype(dtype)))


@struct.dataclass
class Mean:
    """Weighted mean: ``total / weight``, and 0 over nothing."""

    total: Array
    weight: Array

    @classmethod
    def of(cls, value: Array, weight: Array) -> "Mean":
        """Mean of ``value`` under non-negative ``weight``; both broadcast against each other."""
        value, weight = _wide(value, weight)
        return cls(jnp.sum(jnp.where(weight != 0, value, 0.0) * weight), jnp.sum(weight))

    def merge(self) -> "Mean":
        return Mean(self.total.sum(0), self.weight.sum(0))

    def results(self, name: str) -> dict[str, Array]:
        return {name: jnp.where(self.weight > 0, self.total / jnp.where(self.weight > 0, self.weight, 1.0), 0.0)}


@struct.dataclass
class Sum:
    """A total over the batch (losses, whose weights already hold the normalizer)."""

    total: Array

    def merge(self) -> "Sum":
        return Sum(self.total.sum(0))

    def results(self, name: str) -> dict[str, Array]:
        return {name: self.total}


@struct.dataclass
class Max:
    """Largest value; -inf over nothing is reported as 0."""

    value: Array

    @classmethod
    def of(cls, value: Array, weight: Array) -> "Max":
        value, weight = _wide(value, weight)
        return cls(jnp.max(jnp.where(weight != 0, value, -jnp.inf), initial=-jnp.inf))

    def merge(self) -> "Max":
        return Max(self.value.max(0))

    def results(self, name: str) -> dict[str, Array]:
        # Only the empty maximum is replaced: NaN and +inf have to stay visible.
        return {name: jnp.where(self.value == -jnp.inf, 0.0, self.value)}


@struct.dataclass
class Moments:
    """Mean and standard deviation (ddof 0) by Chan's parallel update: no cancellation, exact under merging."""

    n: Array
    mean: Array
    m2: Array

    @classmethod
    def of(cls, value: Array, weight: Array) -> "Moments":
        value, weight = _wide(value, weight)
        value = jnp.where(weight != 0, value, 0.0)
        n = jnp.sum(weight)
        mean = jnp.sum(value * weight) / jnp.where(n > 0, n, 1.0)
        return cls(n, mean, jnp.sum(weight * jnp.square(value - mean)))

    def merge(self) -> "Moments":
        n = self.n.sum(0)
        mean = jnp.sum(self.n * self.mean, 0) / jnp.where(n > 0, n, 1.0)
        return Moments(n, mean, jnp.sum(self.m2 + self.n * jnp.square(self.mean - mean), 0))

    def results(self, name: str) -> dict[str, Array]:
        return {f"{name}/mean": self.mean, f"{name}/std": jnp.sqrt(self.m2 / jnp.where(self.n > 0, self.n, 1.0))}


Metric: TypeAlias = Mean | Sum | Max | Moments
Metrics: TypeAlias = Mapping[str, Metric]


def _is_metric(x: object) -> bool:
    return isinstance(x, Mean | Sum | Max | Moments)


def merge(stacked: Metrics) -> Metrics:
    """Merge metrics whose leaves carry a leading axis of slices."""
    return jax.tree.map(lambda m: m.merge(), stacked, is_leaf=_is_metric)


def results(metrics: Metrics) -> dict[str, Array]:
    """Plain scalars under their public names (``Moments`` gives ``/mean`` and ``/std``)."""
    return {key: value for name, metric in metrics.items() for key, value in metric.results(name).items()}
