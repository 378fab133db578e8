"""The compiled functions of a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpo.batch import Rollouts, TokenStats, compared, take
from jaxpo.learning.compiled import Compiled
from jaxpo.learning.needs import JUDGING, compared_of, copies_of, derived_needs
from jaxpo.learning.optimizers import by_label, make_optimizer
from jaxpo.learning.references import SCORED
from jaxpo.learning.state import TrainState
from jaxpo.learning.step import Apply, Fused, accumulate, in_slices, optimizer_step, score
from jaxpo.learning.trainable import policy_alone, seen_with_base, with_base
from jaxpo.metrics import Metrics, merge
from jaxpo.objectives import Objective, State
from jaxpo.parallel import batch_shards, constrain_rows, lay_out, replicated, reshaped, shardings
from jaxpo.parallel.distributed import place, to_host
from jaxpo.parallel.offload import fetched
from jaxpo.policy import packing, stats
from jaxpo.policy.loss import policy_loss
from jaxpo.policy.packing import SHARES, lanes_of, with_plan
from jaxpo.policy.stats import Other
from jaxpo.policy.transformer import Model, Params
from jaxpo.primitives.numerics import promote, ratio_or_zero
from jaxpo.rollout import SamplingOptions, generate


class Programs(NamedTuple):
    """The compiled functions of a run. One that is never called costs nothing.

    reshard: (params) -> the parameters on the mesh that samples; None = the mesh that trains samples too.
    generate: (sampler's params, tokens, length, key, options, responses[, partner, share]) -> `Rollouts`.
    complete: (sampler's params, tokens, length, budget, key, options, responses) -> `Rollouts`.
    score_old: (params, batch[, plan, bins]) -> `TokenStats` of the old policy or of a reference.
    prepare: (batch, objective state) -> (batch, objective state).
    update: (train state, batch, rows[, plan, fresh, bins]) -> (train state, metrics): one optimizer step.
    noise: (train state, batch, halves) -> numbers about the gradients of two half-batches.
    measure: (params, batch, objective state) -> the objective's metrics on all held-out units.
    score_heads: (params, batch) -> what the heads of a reward model say of its rows, without log-probs.
    score_others: name -> (that model's params, batch[, plan, bins]) -> `TokenStats` of a model beside the policy.
    """

    reshard: Compiled | None
    generate: Compiled
    complete: Compiled
    score_old: Compiled
    prepare: Compiled
    update: Compiled
    noise: Compiled
    measure: Compiled
    score_heads: Compiled
    score_others: Mapping[str, Compiled]

    @property
    def compiled(self) -> tuple[Compiled, ...]:
        """The functions that were compiled."""
        own = [f for name, f in self._asdict().items() if f is not None and name != "score_others"]
        return tuple(f for f in (*own, *self.score_others.values()) if f.compilations)

    def sampler_params(self, params: Params) -> Params:
        """The parameters as ``generate`` and ``complete`` take them."""
        return params if self.reshard is None else self.reshard(params)


NO_COPIES: Mapping[str, Params] = MappingProxyType({})


class Beside(NamedTuple):
    """Frozen arrays that a compiled function is given beside what is trained. They are arguments of it: constants would
    be compiled into every function.

    base: weights that adapters are trained beside; None = everything is trained.
    heads: of the models that the policy is compared with, by name (`jaxpo.policy.stats.head_of`).
    """

    base: Params | None
    heads: Mapping[str, Params]


@dataclass(frozen=True)
class Computation:
    """What the compiled functions of a run are made of.

    config: of the run, filled.
    mesh: that trains.
    model: the policy's.
    objective: what is minimized.
    pad_id: of the tokenizer.
    rows: of a microbatch.
    base: frozen weights that adapters are trained beside; None = everything is trained.
    others: models beside the policy by name, with their parameters (or the shapes of them).
    critic: a critic of its own, trained beside the policy; None = it is a head, or there is none.
    """

    config: ConfigDict
    mesh: Mesh
    model: Model
    objective: Objective
    pad_id: int
    rows: int
    base: Params | None = None
    others: Mapping[str, Other] = field(default_factory=dict)
    critic: Model | None = None

    @property
    def beside(self) -> Beside:
        """What functions that compute the policy's statistics are given beside what is trained."""
        heads = {name: stats.head_of(self.others[name]).params for name in self.compared}
        return Beside(self.base, heads)

    @property
    def compared(self) -> list[str]:
        """The models, of those that are there, that the policy is compared with."""
        return sorted(compared_of(self.objective).intersection(self.others))

    @property
    def slices(self) -> int:
        """Slices in which a whole rollout batch is scored."""
        return self.config.training.minibatches * self.config.training.microbatches

    @property
    def sampling_mesh(self) -> Mesh:
        return reshaped(self.mesh, self.config.rollout.mesh)

    @property
    def moves(self) -> bool:
        """Whether parameters move to another mesh before they sample."""
        return self.sampling_mesh is not self.mesh

    def policy(self, asked: frozenset[str] | None = None) -> Apply:
        """``(params, batch) -> TokenStats``; see `policy_of`."""
        return policy_of(self.model, self.config, self.objective, asked, mesh=self.mesh, critic=self.critic)

    @property
    def peeked(self) -> Apply:
        """The policy that the objective peeks at; the one that it learns from if it peeks at nothing."""
        peeks = self.objective.asks.peeks
        return self.policy(peeks) if peeks else self.policy()

    def seen(self, beside: Beside, apply: Apply) -> Apply:
        """``apply`` as a function of what is trained."""
        if beside.heads:
            models = {name: self.others[name].model if name in self.others else self.model for name in beside.heads}
            heads = {name: stats.Other(models[name], head) for name, head in beside.heads.items()}
            apply = partial(apply, others=heads)
        return seen_with_base(self.config, beside.base, apply)

    def with_copies(self, beside: Beside, copies: Mapping[str, Params]) -> Beside:
        """``beside`` with the heads of copies of the policy too."""
        models = {name: stats.Other(self.model, self.whole(beside, params)) for name, params in copies.items()}
        return beside._replace(heads={**beside.heads, **{n: stats.head_of(x).params for n, x in models.items()}})

    def whole(self, beside: Beside, params: Params) -> Params:
        """The parameters that the policy samples with."""
        return with_base(self.config, beside.base, policy_alone(params))


# ---- what is compiled; `of` and `beside` are bound


def run_reshard(of: Computation, beside: Beside, params: Params) -> Params:
    """The parameters in the dtype of the computation, on the mesh that samples."""
    return lay_out(in_compute_dtype(of.model, of.whole(beside, params)), of.sampling_mesh)


def run_complete(
    of: Computation,
    beside: Beside,
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
    """``responses`` continuations of each row of tokens [n, P], within ``budget`` [n] (None = all)."""
    sampler = of.model._replace(mesh=several(of.sampling_mesh))
    out = generate(
        *(sampler, of.whole(beside, params), tokens, key, options),
        prompt_length=length,
        budget=budget,
        responses=responses,
        partner=None if partner is None else of.whole(beside, partner),
        share=share,
        policy_temperature=of.config.policy_temperature,
        pad_id=of.pad_id,
        scan_layers=of.config.rollout.scan_layers,
    )
    return constrain_rows(out, of.mesh)


def run_generate(
    of: Computation,
    beside: Beside,
    params: Params,
    tokens: Array,
    length: Array,
    key: Array,
    options: SamplingOptions,
    responses: int,
    partner: Params | None = None,
    share: Array | None = None,
) -> Rollouts:
    """``responses`` completions of each prompt."""
    return run_complete(of, beside, params, tokens, length, None, key, options, responses, partner, share)


def run_score(
    of: Computation, beside: Beside, params: Params, batch: Rollouts, plan: Array | None = None, bins: int = 0
) -> TokenStats:
    """What the policy says of a batch, with what the objective needs of the old policy."""
    # What is not of a block is small, and used in several places; blocks are fetched in turn (`Model.run_block`).
    params = {name: x if name == "blocks" else fetched(x) for name, x in params.items()}
    asked = asked_of_old(of.objective, batch)
    if of.critic and stats.CRITIC not in params:  # a reference has no critic
        asked -= {"value"}
    if copies_of(of.objective):  # what is scored may be one of them
        asked |= {stats.HIDDEN}
    old = partial(of.policy(asked), bins=bins)
    return score(of.seen(beside, old), params, with_plan(batch, plan), microbatches=of.slices)


def asked_of_old(objective: Objective, batch: Rollouts) -> frozenset[str]:
    """What the objective needs of the old policy; without comparisons with another model in a batch that this model has
    not scored, as where a protocol asks for log-probs alone."""

    def there(name: str) -> bool:
        return all(stats.hidden_field(n) in batch.per_token for n in compared(objective.asks.derived, [name]))

    return frozenset(filter(there, derived_needs(objective)))


def run_score_other(
    of: Computation, name: str, params: Params, batch: Rollouts, plan: Array | None = None, bins: int = 0
) -> TokenStats:
    """What the model ``name`` says of a batch; with its hidden states, if the policy is compared with it; its score
    alone, if it is a reward model."""
    scores = SCORED[name].gives == "model_score"
    wants = {"score"} if scores else {"logp", stats.HIDDEN} if name in of.compared else {"logp"}
    options = dict(wants=frozenset(wants), temperature=of.config.policy_temperature, mesh=several(of.mesh), bins=bins)
    other = stats.policy_of(of.others[name].model, **options)
    said = score(other, params, with_plan(batch, plan), microbatches=of.slices)
    return said.replace(logp=None, entropy=None) if scores else said  # so that nothing of the vocabulary is computed


def run_noise(of: Computation, beside: Beside, state: TrainState, batch: Rollouts, halves: Array) -> dict[str, Array]:
    """See `gradient_noise`."""
    own, peeked = of.seen(beside, of.policy()), of.seen(beside, of.peeked)
    return gradient_noise(of.objective, own, of.mesh, state, batch, halves, peeked=peeked, rows_at_once=of.rows)


def run_score_heads(of: Computation, beside: Beside, params: Params, batch: Rollouts) -> TokenStats:
    """What the heads of a reward model say, without log-probs."""
    heads = of.policy(of.objective.asks.wants & JUDGING)
    slices = of.slices if batch.rows % of.slices == 0 else 1
    said = score(of.seen(beside, heads), params, batch, microbatches=slices)
    return said.replace(logp=None, entropy=None)  # so that nothing of the vocabulary is computed


def run_measure(of: Computation, beside: Beside, params: Params, batch: Rollouts, state: State) -> Metrics:
    """What the objective reports of a batch (scored, not prepared), without a gradient."""
    objective, own, slices = of.objective, of.seen(beside, of.policy()), batch.rows // of.rows
    batch, state = objective.prepare(batch, state)
    peek = score(of.seen(beside, of.peeked), params, batch, microbatches=slices) if objective.asks.peeks else None
    batch = objective.weigh(batch, state, peek)
    return merge(in_slices(lambda part: objective.loss(partial(own, params), part, state)[1], batch, slices))


def compile_programs(of: Computation, compiles: Mapping[str, int], report: Callable[[str], None]) -> Programs:
    """The compiled functions of a run.

    Args:
      compiles: shapes that the protocol calls them with, besides those of every run, by function.
      report: where messages about compilation go.
    """
    training = of.config.training
    steps, packings = training.epochs * training.minibatches, SHARES if training.packing else 1

    def compiled(name: str, f: Callable[..., Any], shapes: int = 1, beside: Beside = of.beside, **options: Any):
        expected = shapes + compiles.get(name, 0)
        return Compiled(name, partial(f, of), report=report, expected=expected, bound=(beside,), **options)

    sampling = dict(beside=Beside(None if of.moves else of.base, {}), static_argnames="responses")
    # Scoring compiles once more for references in the memory of the host, or without the policy's critic.
    again = training.offload_reference or of.critic is not None
    scoring = dict(shapes=(1 + again) * packings, static_argnames="bins")
    return Programs(
        reshard=compiled("reshard", run_reshard, beside=Beside(of.base, {})) if of.moves else None,
        # training rollouts and greedy evaluation differ in shape and in what is compiled
        generate=compiled("generate", run_generate, 2, **sampling),
        complete=compiled("complete", run_complete, **sampling),
        score_old=compiled("score", run_score, **scoring),
        prepare=compiled("prepare", lambda of, _, batch, state: of.objective.prepare(batch, state)),
        update=make_step(
            of,
            optimizer_of(of.config, of.objective),
            report=report,
            expected=(2 if of.objective.asks.peeks and steps > 1 else 1) * packings,
        ),
        noise=compiled("noise", run_noise),
        measure=compiled("measure", run_measure),
        score_heads=compiled("score_heads", run_score_heads),
        score_others={
            name: Compiled(
                f"score by the {name}",
                partial(run_score_other, of, name),
                report=report,
                expected=packings + compiles.get("score", 0),
                static_argnames="bins",
            )
            for name in of.others
        },
    )


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
    peeked: Apply,
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
        peek = score(peeked, state.params, half, microbatches=n) if objective.asks.peeks else None
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
    critic: Model | None = None,
) -> Apply:
    """``(params, batch) -> TokenStats`` with what is asked (None = what the objective wants), and the entropy for the
    metrics (it costs nothing more). With a ``mesh`` of several devices the head is used where it lies."""
    wants = (objective.asks.wants if asked is None else asked) | {"entropy"}
    options = dict(derived=objective.asks.derived, temperature=config.policy_temperature, mesh=several(mesh))
    return stats.policy_of(model, wants=wants, critic=critic, **options)


def fused_of(model: Model, config: ConfigDict, objective: Objective, mesh: Mesh) -> Fused | None:
    """The one-pass loss; None if the objective differentiates another head or a derived statistic, which it cannot
    compute."""
    if not objective.asks.wants <= set(stats.AVAILABLE):
        return None
    options = dict(temperature=config.policy_temperature, mesh=several(mesh))
    return partial(policy_loss, model, wants=objective.asks.wants | {"entropy"}, **options)


def several(mesh: Mesh | None) -> Mesh | None:
    """The mesh, if there is anything to spread over it."""
    return mesh if mesh is not None and mesh.size > 1 else None


def optimizer_of(config: ConfigDict, objective: Objective) -> optax.GradientTransformation:
    """The optimizer of the reinforcement-learning phase, one for each label of parameters that the objective trains;
    their schedules run over all of its optimizer steps."""
    steps = max(1, config.steps * config.training.epochs * config.training.minibatches)
    rules = {"policy": make_optimizer(config.optimizer.to_dict(), steps)}
    for label in {*objective.trains.values()} - {"policy"}:
        own = config.optimizers[label].name is not None
        field = f"optimizers.{label}" if own else "optimizer"
        block = config.optimizers[label] if own else config.optimizer
        rules[label] = make_optimizer(block.to_dict(), steps, field)
    return by_label(rules)


def init_state(params: Params, optimizer: optax.GradientTransformation, objective: Objective, mesh: Mesh) -> TrainState:
    """Fresh optimizer and objective state, where `make_step` leaves them (or the second step would be compiled
    anew)."""
    opt_state = jax.jit(optimizer.init, out_shardings=shardings(jax.eval_shape(optimizer.init, params), mesh))(params)
    return TrainState(params, opt_state, place(objective.init(), replicated(mesh)))


def where_parameters_lie(mesh: Mesh, grads: Params) -> Params:
    """Shard each gradient like its parameter before microbatches are summed (inside jit)."""
    if mesh.size == 1:
        return grads
    # The barrier: XLA's TPU compiler fails (RET_CHECK in while_loop_all_reduce_code_motion) where it tries to move the
    # sum over devices of an untied embedding's gradient out of the loop over microbatches.
    return jax.lax.optimization_barrier(jax.lax.with_sharding_constraint(grads, shardings(grads, mesh)))


def make_step(
    of: Computation,
    optimizer: optax.GradientTransformation,
    *,
    microbatches: int | None = None,
    name: str = "update",
    report: Callable[[str], None] = print,
    expected: int = 1,
) -> Compiled:
    """The compiled ``(train state, batch, rows, plan, fresh, bins) -> (train state, metrics)``: one optimizer step on
    the chosen rows, packed if there is a plan of them (`packed`). Donates the state.

    Args:
      microbatches: slices of the rows; None = as many as the run trains with.
    """
    slices = of.config.training.microbatches if microbatches is None else microbatches
    options = dict(report=report, expected=expected, bound=(of.beside,), static_argnames=("fresh", "bins"))
    return Compiled(name, partial(run_step, of, optimizer, slices), donate_argnums=1, **options)


def run_step(
    of: Computation,
    optimizer: optax.GradientTransformation,
    microbatches: int,
    beside: Beside,
    state: TrainState,
    batch: Rollouts,
    rows: Array,
    plan: Array | None = None,
    fresh: bool = False,
    bins: int = 0,
    copies: Mapping[str, Params] = NO_COPIES,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step on the chosen rows; ``copies`` of the policy by name, with which it is compared."""
    mesh, beside = of.mesh, of.with_copies(beside, copies)
    batch = constrain_rows(with_plan(take(batch, rows, shared_prompt=batch.shared_prompt), plan), mesh)
    fused = fused_of(of.model, of.config, of.objective, mesh)
    own, peeked, once = (f and (partial(f, bins=bins) if bins else f) for f in (of.policy(), of.peeked, fused))
    params, opt_state, memory, out = optimizer_step(
        of.objective,
        of.seen(beside, own),
        optimizer,
        state.params,
        state.opt_state,
        state.objective,
        batch,
        microbatches=microbatches,
        fresh=fresh,
        peeked=of.seen(beside, peeked),
        fused=once and (lambda params, *args, **unit: once(of.whole(beside, params), *args, **unit)),
        place=partial(where_parameters_lie, mesh),
    )
    where = TrainState(shardings(params, mesh), shardings(opt_state, mesh), replicated(mesh))
    return jax.lax.with_sharding_constraint(TrainState(params, opt_state, memory), where), out


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
