"""One function accumulates value, gradient and metrics for every objective; one makes an optimizer step of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxpo import metrics as metrics_lib
from jaxpo.batch import Rollouts, TokenStats, slices
from jaxpo.objectives.grammar.base import Objective, State
from jaxpo.primitives.numerics import promote

Params = Any
Apply = Callable[[Params, Rollouts], TokenStats]
SliceLoss = Callable[[TokenStats, Rollouts], tuple[Array, metrics_lib.Metrics]]
# (params, batch, loss of a slice, unit=rows that no cut may part) -> (sum over slices, metrics [slices, ...])
Fused = Callable[..., tuple[Array, metrics_lib.Metrics]]


def in_slices(f: Callable[[Rollouts], Any], batch: Rollouts, n: int) -> Any:
    """``f`` of ``n`` equal slices of the rows in turn; results stacked along a new leading axis."""
    if n == 1:
        return jax.tree.map(lambda x: x[None], f(batch))
    return jax.lax.map(f, slices(batch, n))


def score(apply: Apply, params: Params, batch: Rollouts, *, microbatches: int = 1) -> TokenStats:
    """What the policy says of the batch, without gradient, in slices: leaves [B, ...]."""
    stats = in_slices(lambda part: jax.lax.stop_gradient(apply(params, part)), batch, microbatches)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stats)


def accumulate(
    objective: Objective,
    apply: Apply,
    params: Params,
    batch: Rollouts,
    state: State,
    *,
    microbatches: int = 1,
    fused: Fused | None = None,
    place: Callable[[Params], Params] = lambda grads: grads,
) -> tuple[Array, Params, metrics_lib.Metrics]:
    """Loss, gradient and metrics of a weighed batch, summed over ``microbatches`` slices of its rows.

    Weights were fixed by ``weigh`` on the whole batch, so the sum is the loss of the whole batch, whatever the split.
    Gradients are summed in at
    least float32 and returned in the dtype of the parameters.

    Args:
      fused: gives the loss of a microbatch in one pass over the logits, slice by slice (`jaxpo.policy.loss`); None =
        the loss of what ``apply`` says of it.
      place: says where gradients lie, of each microbatch and summed: on a mesh, where their parameters do.

    Raises:
      ValueError: the rows do not divide, or a slice would cut a unit; an objective with ``coupling="group"`` needs
        slices of whole groups. The objective asks its policy about another batch than the slice.
    """

    def of_slice(stats: TokenStats, part: Rollouts) -> tuple[Array, metrics_lib.Metrics]:
        def policy(asked: Rollouts) -> TokenStats:
            if asked is not part:
                raise ValueError("an objective's loss may ask its policy only about the slice that it is given")
            return stats

        return objective.loss(policy, part, state)

    def value_and_grad(part: Rollouts) -> tuple[Array, Params, metrics_lib.Metrics]:
        def loss(p: Params) -> tuple[Array, metrics_lib.Metrics]:
            if fused is None:
                return of_slice(apply(p, part), part)
            value, reports = fused(p, part, of_slice, unit=unit_of(objective, part))
            return value, metrics_lib.merge(reports)

        (value, report), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, place(jax.tree.map(promote, grads)), report

    if microbatches == 1:
        value, grads, report = value_and_grad(batch)
        report = jax.tree.map(lambda x: x[None], report)
    else:
        parts = slices(batch, microbatches)
        cut = batch.shared_prompt == 1 or parts.shared_prompt < batch.shared_prompt
        if objective.unit.coupling == "group" and cut:
            raise ValueError(
                f"{microbatches} microbatches cut groups of {batch.shared_prompt} rows, which this objective "
                "must see whole"
            )
        zero = place(jax.tree.map(lambda p: jnp.zeros_like(promote(p)), params))

        def add(grads: Params, part: Rollouts) -> tuple[Params, tuple[Array, metrics_lib.Metrics]]:
            value, more, report = value_and_grad(part)
            return jax.tree.map(jnp.add, grads, more), (value, report)

        grads, (values, report) = jax.lax.scan(add, zero, parts)
        value = values.sum()
    return value, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), metrics_lib.merge(report)


def unit_of(objective: Objective, batch: Rollouts) -> int:
    """Consecutive rows that one call of the objective's loss must see together."""
    if objective.unit.coupling == "row":
        return max(len(batch.layout), 1)
    return batch.shared_prompt if batch.shared_prompt > 1 else batch.rows


def active_labels(objective: Objective, batch: Rollouts) -> dict[str, Array]:
    """label of parameters -> bool: some token or row of a term that trains them has weight. Where none has, they are
    not moved, since optimizers move on a zero gradient."""
    weighed: dict[str, list[Array]] = {}
    for name, weight in batch.weights.items():
        if not name.endswith(("/center", "/total")):
            weighed.setdefault(objective.trains.get(name, "policy"), []).append(jnp.any(weight != 0))
    return {label: jnp.any(jnp.stack(some)) for label, some in {"policy": [jnp.asarray(False)], **weighed}.items()}


def moved_share(params: Params, updates: Any, new: Params) -> dict[str, Array]:
    """``update/moved_frac``: of the numbers in less than float32 that the optimizer wants to change, the share that
    changed; 1 if it wants to change none. The others were too large beside their update, which rounding swallowed. {}
    if all parameters are float32."""
    leaves = zip(*map(jax.tree.leaves, (params, updates, new)), strict=True)
    low = [(p, u, q) for p, u, q in leaves if jnp.issubdtype(p.dtype, jnp.floating) and p.dtype.itemsize < 4]
    if not low:
        return {}
    wanted = sum(jnp.sum(u != 0, dtype=jnp.float32) for _, u, _ in low)
    moved = sum(jnp.sum((q != p) & (u != 0), dtype=jnp.float32) for p, u, q in low)
    return {"update/moved_frac": jnp.where(wanted > 0, moved / jnp.maximum(wanted, 1), 1.0)}


def optimizer_step(
    objective: Objective,
    apply: Apply,
    optimizer: optax.GradientTransformation,
    params: Params,
    opt_state: Any,
    state: State,
    batch: Rollouts,
    *,
    microbatches: int = 1,
    fresh: bool = False,
    peeked: Apply | None = None,
    fused: Fused | None = None,
    place: Callable[[Params], Params] = lambda grads: grads,
) -> tuple[Params, Any, State, dict[str, Array]]:
    """``weigh -> accumulate -> optimizer -> update`` on one optimizer batch (already prepared).

    A step is skipped whole (parameters, optimizer and objective state unchanged) when the loss or the gradient is not
    finite, or when no token has weight; ``step/nonfinite`` and ``step/empty`` say so. Where the terms of one label
    (`jaxpo.learning.optimizers.by_label`) have no weight, its parameters and its optimizer's state stay as they are.
    Parameters in bfloat16 add ``update/moved_frac`` (`moved_share`).

    Args:
      fresh: the parameters are those that scored ``logp_old``: the peek is free, and what the policy gives measures
        the gap to the sampler.
      peeked: the policy with the statistics that the objective peeks at; None = ``apply``.
      fused, place: as of `accumulate`.
    """
    peek = None
    if objective.asks.peeks:
        known = {"logp": batch.logp_old, "entropy": batch.entropy_old}
        free = fresh and all(known.get(name) is not None for name in objective.asks.peeks)
        peek = (
            TokenStats(logp=batch.logp_old, entropy=batch.entropy_old)
            if free
            else score(peeked or apply, params, batch, microbatches=microbatches)
        )
    batch = objective.weigh(batch, state, peek)
    slicing = dict(microbatches=microbatches, fused=fused, place=place)
    value, grads, report = accumulate(objective, apply, params, batch, state, **slicing)
    norm = optax.tree.norm(jax.tree.map(promote, grads))
    finite, active = jnp.isfinite(value) & jnp.isfinite(norm), active_labels(objective, batch)
    updates, new_opt_state = optax.with_extra_args_support(optimizer).update(grads, opt_state, params, active=active)
    filled = jnp.any(jnp.stack([*active.values()]))
    new = optax.apply_updates(params, updates), new_opt_state, objective.update(state, batch, report)
    moved = moved_share(params, updates, new[0])
    new = jax.tree.map(lambda a, b: jnp.where(finite & filled, a, b), new, (params, opt_state, state))
    out = {**metrics_lib.results(report), **moved, "grad_norm": norm, "step/nonfinite": ~finite, "step/empty": ~filled}
    return *new, {k: v.astype(jnp.float32) for k, v in out.items()}
