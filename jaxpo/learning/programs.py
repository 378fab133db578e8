"""The compiled functions of a run, and what an optimizer step changes."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpo.batch import Rollouts, TokenStats, take
from jaxpo.learning.compiled import Compiled
from jaxpo.learning.needs import JUDGING, derived_needs
from jaxpo.learning.optimizers import make_optimizer
from jaxpo.learning.state import TrainState
from jaxpo.learning.step import Apply, Fused, accumulate, in_slices, optimizer_step, score
from jaxpo.learning.trainable import seen_with_base, with_base
from jaxpo.metrics import Metrics
from jaxpo.objectives import Objective, State
from jaxpo.parallel import batch_shards, constrain_rows, lay_out, replicated, reshaped, shardings
from jaxpo.parallel.distributed import place, to_host
from jaxpo.parallel.offload import fetched
from jaxpo.policy import packing, stats
from jaxpo.policy.loss import policy_loss
from jaxpo.policy.packing import SHARES, lanes_of, with_plan
from jaxpo.policy.transformer import Model, Params
from jaxpo.primitives.numerics import promote, ratio_or_zero
from jaxpo.rollout import SamplingOptions, generate


def compile_functions(
    config: ConfigDict,
    mesh: Mesh,
    model: Model,
    objective: Objective,
    compiles: Mapping[str, int],
    rows_at_once: int,
    pad_id: int,
    report: Callable[[str], None],
    base: Params | None = None,
) -> dict[str, Compiled]:
    """The compiled functions of the loop; those that are never called cost nothing.

    Args:
      compiles: shapes that the protocol calls them with besides those of every run. rows_at_once: of a microbatch.
      base: of `Workspace`; bound to each as an argument (a constant would be compiled into every one of them).
    """
    apply, training = policy_of(model, config, objective, mesh=mesh), config.training
    look = policy_of(model, config, objective, objective.asks.peeks, mesh=mesh) if objective.asks.peeks else None
    recall = policy_of(model, config, objective, derived_needs(objective), mesh=mesh)
    beside, seen = partial(with_base, config), partial(seen_with_base, config)
    slices, steps = training.minibatches * training.microbatches, training.epochs * training.minibatches
    packings = SHARES if training.packing else 1
    sampling_mesh = reshaped(mesh, config.rollout.mesh)
    elsewhere, sampler = sampling_mesh is not mesh, model._replace(mesh=several(sampling_mesh))

    def run_reshard(base: Params | None, params: Params) -> Params:
        return lay_out(in_compute_dtype(model, beside(base, params)), sampling_mesh)

    def run_complete(
        base: Params | None,
        params: Params,
        tokens: Array,
        length: Array,
        budget: Array | None,
        key: Array,
        options: SamplingOptions,
        responses: int,
        partner: Params | None = None,
        share: Array | None = None,
    ) -> Rollouts:
        lengths = dict(prompt_length=length, budget=budget, responses=responses)
        out = generate(
            *(sampler, beside(base, params), tokens, key, options),
            **lengths,
            partner=None if partner is None else beside(base, partner),
            share=share,
            policy_temperature=config.policy_temperature,
            pad_id=pad_id,
            scan_layers=config.rollout.scan_layers,
        )
        return constrain_rows(out, mesh)

    def run_generate(
        base: Params | None,
        params: Params,
        tokens: Array,
        length: Array,
        key: Array,
        options: SamplingOptions,
        responses: int,
        partner: Params | None = None,
        share: Array | None = None,
    ) -> Rollouts:
        return run_complete(base, params, tokens, length, None, key, options, responses, partner, share)

    def run_score(
        base: Params | None, params: Params, batch: Rollouts, plan: Array | None = None, bins: int = 0
    ) -> TokenStats:
        # What is not of a block is small, and used in several places; blocks are fetched in turn (`Model.run_block`).
        params = {name: x if name == "blocks" else fetched(x) for name, x in params.items()}
        return score(seen(base, partial(recall, bins=bins)), params, with_plan(batch, plan), microbatches=slices)

    def run_noise(base: Params | None, state: TrainState, batch: Rollouts, halves: Array) -> dict[str, Array]:
        own = seen(base, apply)
        peek = seen(base, look or apply)
        return gradient_noise(objective, own, mesh, state, batch, halves, look=peek, rows_at_once=rows_at_once)

    def run_opinion(base: Params | None, params: Params, batch: Rollouts) -> TokenStats:
        heads = policy_of(model, config, objective, objective.asks.wants & JUDGING, mesh=mesh)
        said = score(seen(base, heads), params, batch, microbatches=slices if batch.rows % slices == 0 else 1)
        return said.replace(logp=None, entropy=None)  # so that nothing of the vocabulary is computed

    def run_measure(base: Params | None, params: Params, batch: Rollouts, state: State) -> Metrics:
        return measured(objective, seen(base, apply), seen(base, look or apply), params, batch, state, slices)

    def compiled(name: str, f: Callable[..., Any], shapes: int = 1, bound: Params | None = base, **options: Any):
        options = dict(bound=(bound,), report=report, **options)
        return Compiled(name, f, expected=shapes + compiles.get(name, 0), **options)

    sampling = dict(bound=None if elsewhere else base, static_argnames="responses")
    return dict(
        reshard=compiled("reshard", run_reshard) if elsewhere else None,
        # training rollouts and greedy evaluation differ in shape and in what is compiled
        generate=compiled("generate", run_generate, 2, **sampling),
        complete=compiled("complete", run_complete, **sampling),
        # once more for parameters in the memory of the host
        score=compiled("score", run_score, (1 + training.offload_reference) * packings, static_argnames="bins"),
        prepare=compiled("prepare", lambda _, batch, state: objective.prepare(batch, state)),
        noise=compiled("noise", run_noise),
        measure=compiled("measure", run_measure),
        opinion=compiled("opinion", run_opinion),
        step=make_step(
            config,
            objective,
            apply,
            optimizer_of(config),
            mesh,
            base=base,
            microbatches=training.microbatches,
            look=look,
            fused=fused_of(model, config, objective, mesh),
            report=report,
            expected=(2 if objective.asks.peeks and steps > 1 else 1) * packings,
        ),
    )


def measured(
    objective: Objective, apply: Apply, look: Apply, params: Params, batch: Rollouts, state: State, slices: int
) -> Metrics:
    """What the objective reports of a batch (scored, not prepared), without a gradient, to be merged over ``slices``
    and further batches."""
    batch, state = objective.prepare(batch, state)
    peek = score(look, params, batch, microbatches=slices) if objective.asks.peeks else None
    batch = objective.weigh(batch, state, peek)
    return in_slices(lambda part: objective.loss(partial(apply, params), part, state)[1], batch, slices)


def in_compute_dtype(model: Model, params: Params) -> Params:
    """Parameters as the model multiplies with them: all but norms, whose arithmetic is wider than its results. The
    values that it computes stay the same, bit for bit."""

    def cast(path: tuple[Any, ...], x: Array) -> Array:
        return x if "norm" in jax.tree_util.keystr(path) else x.astype(model.config.dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def gradient_noise(
    objective: Objective,
    apply: Apply,
    mesh: Mesh,
    state: TrainState,
    batch: Rollouts,
    halves: Array,
    *,
    look: Apply,
    rows_at_once: int,
) -> dict[str, Array]:
    """The gradients g1, g2 of two half-batches, each prepared by itself, as numbers.

    ``noise``: variance of the mean gradient over its square, ``|g1 - g2|^2 / |g1 + g2|^2`` (0 without gradients);
    ``gradient_cosine``: of the angle between them.

    Args:
      halves: [2, B/2] rows. rows_at_once: of a microbatch; a half is cut into as few slices as keep to it.
    """
    size, shards = halves.shape[1], batch_shards(mesh)
    whole = batch.shared_prompt if objective.unit.coupling == "group" else 1
    fitting = [n for n in range(1, size + 1) if size % n == 0 and size // n % shards == 0 and size // n % whole == 0]
    if not fitting:
        raise ValueError(f"a half-batch of {size} rows does not divide over {shards} devices: raise rollout.prompts")
    n = next((n for n in fitting if size // n <= rows_at_once), fitting[-1])

    def gradient(rows: Array) -> Params:
        half = constrain_rows(take(batch, rows, shared_prompt=batch.shared_prompt), mesh)
        half, memory = objective.prepare(half, state.objective)
        peek = score(look, state.params, half, microbatches=n) if objective.asks.peeks else None
        half = objective.weigh(half, memory, peek)
        return jax.tree.map(promote, accumulate(objective, apply, state.params, half, memory, microbatches=n)[1])

    both = jax.lax.map(gradient, halves)  # in turn: one program, compiled once

    g1, g2 = (jax.tree.map(lambda x, i=i: x[i], both) for i in range(2))
    square1, square2, product = (optax.tree.vdot(a, b) for a, b in ((g1, g1), (g2, g2), (g1, g2)))
    return dict(
        noise=ratio_or_zero(square1 + square2 - 2 * product, square1 + square2 + 2 * product),
        gradient_cosine=ratio_or_zero(product, jnp.sqrt(square1 * square2)),
    )


def policy_of(
    model: Model,
    config: ConfigDict,
    objective: Objective,
    asked: frozenset[str] | None = None,
    mesh: Mesh | None = None,
) -> Apply:
    """``(params, batch) -> TokenStats`` with what is asked (None = what the objective wants), and the entropy for the
    metrics (it costs nothing more). With a ``mesh`` of several devices the head is used where it lies."""
    wants = (objective.asks.wants if asked is None else asked) | {"entropy"}
    options = dict(derived=objective.asks.derived, temperature=config.policy_temperature, mesh=several(mesh))
    return stats.policy_of(model, wants=wants, **options)


def fused_of(model: Model, config: ConfigDict, objective: Objective, mesh: Mesh) -> Fused | None:
    """What gives the loss in one pass over the logits. None = a gradient flows through statistics that other heads
    give, or that the policy derives from the logits by itself."""
    if not objective.asks.wants <= set(stats.AVAILABLE):
        return None
    options = dict(temperature=config.policy_temperature, mesh=several(mesh))
    return partial(policy_loss, model, wants=objective.asks.wants | {"entropy"}, **options)


def several(mesh: Mesh | None) -> Mesh | None:
    """The mesh, if there is anything to spread over it."""
    return mesh if mesh is not None and mesh.size > 1 else None


def optimizer_of(config: ConfigDict) -> optax.GradientTransformation:
    """The optimizer of the reinforcement-learning phase; its schedule runs over all of its optimizer steps."""
    steps = config.steps * config.training.epochs * config.training.minibatches
    return make_optimizer(config.optimizer.to_dict(), max(1, steps))


def init_state(params: Params, optimizer: optax.GradientTransformation, objective: Objective, mesh: Mesh) -> TrainState:
    """Fresh optimizer and objective state, where `make_step` leaves them (or the second step would be compiled
    anew)."""
    opt_state = jax.jit(optimizer.init, out_shardings=shardings(jax.eval_shape(optimizer.init, params), mesh))(params)
    return TrainState(params, opt_state, place(objective.init(), replicated(mesh)))


def where_parameters_lie(mesh: Mesh, grads: Params) -> Params:
    """Inside jit: gradients cut as their parameters are, before they are added to those of other microbatches."""
    if mesh.size == 1:
        return grads
    # The barrier: XLA's TPU compiler fails (RET_CHECK in while_loop_all_reduce_code_motion) where it tries to move the
    # sum over devices of an untied embedding's gradient out of the loop over microbatches.
    return jax.lax.optimization_barrier(jax.lax.with_sharding_constraint(grads, shardings(grads, mesh)))


def make_step(
    config: ConfigDict,
    objective: Objective,
    apply: Apply,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    base: Params | None = None,
    microbatches: int = 1,
    look: Apply | None = None,
    fused: Fused | None = None,
    name: str = "update",
    report: Callable[[str], None] = print,
    expected: int = 1,
) -> Compiled:
    """The compiled ``(train state, batch, rows, plan, fresh, bins) -> (train state, metrics)``: one optimizer step on
    the chosen rows, packed if there is a plan of them (`packed`). Donates the state."""
    seen = partial(seen_with_base, config)

    def run_step(
        base: Params | None,
        state: TrainState,
        batch: Rollouts,
        rows: Array,
        plan: Array | None = None,
        fresh: bool = False,
        bins: int = 0,
    ) -> tuple[TrainState, dict[str, Array]]:
        batch = constrain_rows(with_plan(take(batch, rows, shared_prompt=batch.shared_prompt), plan), mesh)
        own, peek, once = (f and (partial(f, bins=bins) if bins else f) for f in (apply, look or apply, fused))
        params, opt_state, memory, out = optimizer_step(
            objective,
            seen(base, own),
            optimizer,
            state.params,
            state.opt_state,
            state.objective,
            batch,
            microbatches=microbatches,
            fresh=fresh,
            look=seen(base, peek),
            fused=once and (lambda params, *args, **unit: once(with_base(config, base, params), *args, **unit)),
            place=partial(where_parameters_lie, mesh),
        )
        where = TrainState(shardings(params, mesh), shardings(opt_state, mesh), replicated(mesh))
        return jax.lax.with_sharding_constraint(TrainState(params, opt_state, memory), where), out

    options = dict(report=report, expected=expected, bound=(base,), static_argnames=("fresh", "bins"), donate_argnums=1)
    return Compiled(name, run_step, **options)


def packed(config: ConfigDict, mesh: Mesh, batch: Rollouts, slices: int, rows: np.ndarray | None = None) -> dict:
    """The arguments ``plan`` and ``bins`` by which `Workspace.score` and `Workspace.step` pack the rows (None = all) of
    a batch, each of ``slices`` and each device's part of it by itself; {} if the run does not."""
    if not config.training.packing or isinstance(batch.mask, jax.core.Tracer):  # tracing asks for shapes alone
        return {}
    length, prompt = to_host((packing.lengths(batch.mask), batch.prompt_length))
    prompt = np.full(batch.rows, batch.prompt_width) if prompt is None else prompt
    if rows is not None:
        length, prompt = length[rows], prompt[rows]
    lanes = slices * lanes_of(mesh, len(length) // slices)
    plan, bins = packing.plan(length, prompt, batch.width, batch.prompt_width, lanes)
    return dict(plan=plan, bins=bins)
