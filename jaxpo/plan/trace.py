"""The functions that a run of a config compiles, traced for a mesh of devices that need not be there: shapes only."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpo.batch import Rollouts
from jaxpo.config.resolved import Resolved
from jaxpo.fields import FIELDS, VECTORS, WEIGHTS
from jaxpo.learning import references
from jaxpo.learning.compiled import Compiled
from jaxpo.learning.needs import copies_of
from jaxpo.learning.programs import Computation, Programs, compile_programs, optimizer_of, several
from jaxpo.learning.state import Run, TrainState
from jaxpo.learning.trainable import random_params
from jaxpo.objectives import Objective
from jaxpo.parallel import ROWS, replicated, shardings
from jaxpo.parallel.offload import host_shardings, is_on_host
from jaxpo.policy import heads, transformer
from jaxpo.policy.config import TransformerConfig
from jaxpo.policy.hf import read_config
from jaxpo.policy.packing import lanes_of
from jaxpo.policy.stats import Other
from jaxpo.policy.transformer import Params
from jaxpo.protocols.gatherer import Watch
from jaxpo.protocols.protocol import Facts
from jaxpo.protocols.rows import as_scored, in_a_column, labelled
from jaxpo.rollout.engine import decode_trips
from jaxpo.runs.iteration import Stage, learn, score_references
from jaxpo.runs.models import find_critic, find_models, heads_read
from jaxpo.runs.questions import tokenize
from jaxpo.runs.workspace import make_tokenizer
from jaxpo.tasks import build


class Data(NamedTuple):
    """What the shapes of a run take from its data. vocab_size: of the tokenizer; None = the pretrained policy's own."""

    vocab_size: int | None
    prompt_width: int
    eos_ids: tuple[int, ...]
    pad_id: int


class Step(NamedTuple):
    """A compiled function of a run. mesh: that its arguments lie on; times: calls per iteration; state: what of the
    run's state it is given (the rest waits in memory beside it); loop: trips of the loops whose end depends on the
    data, by depth."""

    name: str
    function: Compiled
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    times: int
    state: tuple[str, ...]
    mesh: Mesh
    loop: tuple[float, ...] = ()

    def trace(self) -> Any:
        """The step traced for its mesh: `jax.stages.Traced`."""
        with jax.set_mesh(self.mesh):
            return self.function.trace(*self.arguments, **self.options)


class Planned(NamedTuple):
    """A config on a mesh: its steps, and the shapes of its state with where they lie, by name (``params``,
    ``opt_state``, ``ref``, ...)."""

    model: transformer.Model
    data: Data
    steps: list[Step]
    state: dict[str, Any]


def data_of(resolved: Resolved) -> Data:
    """Sizes that the run reads from its data. A pretrained policy with a fixed ``rollout.prompt_width`` needs none, so
    neither its task nor its tokenizer has to be there."""
    config = resolved.config
    width = config.rollout.prompt_width
    if config.policy.name == "pretrained" and width is not None:
        ids = read_config(config.policy.path).get("eos_token_id") or ()
        return Data(None, width, tuple(ids) if isinstance(ids, list) else (ids,), 0)
    task = build({k: v for k, v in config.task.items() if v is not None})
    tokenizer = make_tokenizer(resolved, task)
    if width is None:
        examples = [*task.train, *task.test[: config.evaluation.prompts]]
        width = max(len(ids) for ids in tokenize(examples, tokenizer, None)[1])
    return Data(tokenizer.vocab_size, width, tokenizer.eos_ids, tokenizer.pad_id)


def placed(tree: Any, where: Any) -> Any:
    """Shapes with their sharding."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where)


def everywhere(tree: Any, sharding: NamedSharding) -> Any:
    """Shapes that all lie alike."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=sharding), tree)


class Recorder:
    """Stands in for a compiled function: notes each call as a `Step` and gives the placed shapes of its results.

    of: the function.
    mesh: that its arguments lie on.
    state: what of the run's state it is given.
    place: (shapes of the results) -> the same with where they lie.
    steps: where calls are noted; the same call again adds to its ``times``.
    """

    def __init__(
        self,
        name: str,
        of: Compiled,
        mesh: Mesh,
        state: tuple[str, ...],
        place: Callable[[Any], Any],
        steps: list[Step],
        loop: tuple[float, ...] = (),
    ):
        self.step, self.place, self.steps, self.loop = Step(name, of, (), {}, 0, state, mesh, loop), place, steps, loop

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        where = [is_on_host(x) for x in jax.tree.leaves(arguments[0])]
        for i, step in enumerate(self.steps):
            known = [is_on_host(x) for x in jax.tree.leaves(step.arguments[0])]
            if step.function is self.step.function and known == where:
                self.steps[i] = step._replace(times=step.times + 1)
                return self.place(step.trace().out_info)
        on_host = any(where)
        name, state = ("reference", self.step.state[1:]) if on_host else (self.step.name, self.step.state)
        step = self.step._replace(name=name, arguments=arguments, options=options, times=1, state=state)
        self.steps.append(step)
        return self.place(step.trace().out_info)


def trace_run(resolved: Resolved, mesh: Mesh, data: Data) -> Planned:
    """The rollout, scoring and update steps of an iteration: `jaxpo.runs.iteration`, run on shapes.

    Raises:
      ValueError: parameters that the mesh does not divide.
    """
    config, objective, facts = resolved.config, resolved.objective, resolved.protocol.facts
    model = transformer.build(resolved.transformer(data.vocab_size or 1), several(mesh))
    rows, everywhere_ = NamedSharding(mesh, PartitionSpec(ROWS)), replicated(mesh)
    key = jax.ShapeDtypeStruct((), jax.eval_shape(lambda: jax.random.key(0)).dtype, sharding=everywhere_)

    def shapes_of(make: Callable[..., Any]) -> Any:
        made = jax.eval_shape(make, key)
        return placed(made, shardings(made, mesh))

    base = shapes_of(partial(transformer.init, model.config)) if config.lora.rank else None
    found = find_models(resolved, model.config, mesh)
    others = {
        n: Other(transformer.build(f.config, several(mesh)), shapes_of(partial(with_heads, f.config, heads_read(n))))
        for n, f in found.items()
    }
    start = find_critic(resolved, model.config, mesh)
    critic = None if start is None else transformer.build(start.config, several(mesh))
    of = Computation(config, mesh, model, objective, data.pad_id, resolved.microbatch_rows, base, others, critic)
    programs = compile_programs(of, facts.compiles, lambda message: None)
    params = shapes_of(partial(random_params, config, model, resolved.heads, critic=start and start.config))
    moments = jax.eval_shape(optimizer_of(config, resolved.objective).init, params)
    memory = everywhere(jax.eval_shape(objective.init), everywhere_)
    state = TrainState(params, placed(moments, shardings(moments, mesh)), memory)
    frozen = {} if base is None else {"base": base}
    steps: list[Step] = []
    record = partial(recorded, of, steps, tuple(frozen), rows)
    batch, sampler = gathered(resolved, of, programs, data, record, params, key, rows)
    copy = placed(params, host_shardings(params, mesh)) if config.training.offload_reference else params
    kept = references.held(resolved.references, facts.references, copy, state.opt_state)
    learned(resolved, of, programs, record, Run(state, kept), batch)
    waits = dict(params=params, opt_state=state.opt_state, **kept, **frozen)
    waits |= {part: x for name in others for part, x in parts_of(of, name).items()}
    return Planned(model, data, steps, waits | ({} if sampler is None else {"sampler": sampler}))


def with_heads(config: TransformerConfig, names: tuple[str, ...], key: Array) -> Params:
    """Random parameters of a model beside the policy, with these heads of one number each."""
    return {**transformer.init(config, key), **heads.init(config.width, dict.fromkeys(names, ()), key)}


def parts_of(of: Computation, name: str) -> dict[str, Any]:
    """A model beside the policy as entries of `Planned.state`: the head by itself, if the update is given it."""
    params = of.others[name].params
    head = of.beside.heads.get(name, {})
    rest = {key: x for key, x in params.items() if key not in head}
    return {name: rest} | ({f"{name}_head": head} if head else {})


def recorded(
    of: Computation,
    steps: list[Step],
    frozen: tuple[str, ...],
    rows: NamedSharding,
    name: str,
    function: Compiled,
    **changes: Any,
) -> Recorder:
    """A recorder of a compiled function that is given the parameters and gives rows."""
    given = dict(mesh=of.mesh, state=("params", *frozen), place=partial(everywhere, sharding=rows)) | changes
    return Recorder(name, function, steps=steps, **given)


def gathered(
    resolved: Resolved,
    of: Computation,
    programs: Programs,
    data: Data,
    record: Callable[..., Recorder],
    params: Any,
    key: Any,
    rows: NamedSharding,
) -> tuple[Rollouts, Any]:
    """The shapes of the rows that a protocol collects, and of the parameters where they sample (None = where they
    train)."""
    config, facts, sampler = resolved.config, resolved.protocol.facts, None
    g, k = config.rollout.prompts, config.rollout.responses
    tokens, length = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for shape in ((g, data.prompt_width), (g,)))
    out = None
    if resolved.samples:
        mesh = of.sampling_mesh
        if programs.reshard:
            there = record("reshard", programs.reshard, place=lambda tree: placed(tree, shardings(tree, mesh)))
            sampler = there(params)
        state = {"state": ("sampler",)} if sampler else {}
        loop = decode_trips(config.sampling.max_new_tokens)
        generate = record("rollout", programs.generate, mesh=mesh, loop=loop, **state)
        out = generate(sampler or params, tokens, length, key, resolved.sampling(data.eos_ids), responses=k)
    if not facts.rows:
        return judged_shapes(out, rows, resolved.objective.asks.needs, facts), sampler
    width, vector = (data.prompt_width, config.sampling.max_new_tokens), config.heads.gate
    shapes = unit_shapes(resolved.objective, facts.provides, resolved.rows, *width, resolved.rows_per_prompt, vector)
    return everywhere(shapes, rows), sampler


def learned(
    resolved: Resolved, of: Computation, programs: Programs, record: Callable[..., Recorder], run: Run, batch: Rollouts
) -> None:
    """Record the scoring and update steps: `jaxpo.runs.iteration.score_references` and `learn`, on shapes."""
    config, mesh = resolved.config, of.mesh
    everything = replicated(mesh)
    score = record("scoring", programs.score_old)
    n = resolved.rows // config.training.minibatches
    heads = [f"{name}_head" for name in of.beside.heads]
    held = ("params", "opt_state", *(() if of.base is None else ("base",)), *heads)
    update = record("update", programs.update, state=held, place=lambda out: (run.state, out[1]))
    rows = batch.tokens.sharding

    def prepare(batch: Rollouts, memory: Any) -> tuple[Rollouts, Any]:
        return everywhere(jax.eval_shape(resolved.objective.prepare, batch, memory)[0], rows), memory

    def whole_step(state: Any, batch: Rollouts, rows: Any, *, fresh: bool, **packing: Any) -> Any:
        return update(state, batch, rows, fresh=False, **packing)  # a step that peeks by itself takes the most

    def ask(name: str, batch: Rollouts) -> Any:
        said_by = record(name, programs.score_others[name], state=tuple(parts_of(of, name)))
        return said_by(of.others[name].params, as_scored(batch), **longest(resolved, mesh, batch.rows))

    chosen = everywhere(np.zeros(n, np.int32), everything)
    stage = Stage(
        objective=resolved.objective,
        protocol=resolved.protocol,
        steps=resolved.optimizer_steps,
        score=lambda params, seen: score(params, as_scored(seen), **longest(resolved, mesh, seen.rows)),
        prepare=prepare,
        update=whole_step,
        pack=lambda *_: (longest(resolved, mesh, n), {}),
        watch=Watch(),
        others={name: partial(ask, name) for name in of.others},
    )
    batch = score_references(stage, run, batch)
    copies = {name: run.references[name] for name in copies_of(of.objective)}
    learn(stage, Run(run.state, copies), batch, lambda _: [chosen] * resolved.optimizer_steps)


def unit_shapes(
    objective: Objective,
    provides: Collection[str],
    rows: int,
    prompt_width: int,
    width: int,
    of_prompt: int,
    vector: int | None = None,
) -> Rollouts:
    """Rows of preferences as their protocols hand them on: with the numbers that the objective needs, lists of
    ``vector`` numbers among them."""

    def shape(*axes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *axes), dtype)

    needs, number = objective.asks.needs & {*provides}, shape(dtype=jnp.int32)
    tokens = sorted(needs & {*WEIGHTS, "segment"})
    numbers = needs - {*tokens, "reward"}
    return Rollouts(
        tokens=shape(prompt_width + width, dtype=jnp.int32),
        mask=shape(width),
        prompt_length=number,
        count=shape(),
        group=number,
        role=number,
        prompt=number,
        seed=shape(dtype=jnp.uint32),
        reward=shape() if "reward" in objective.asks.needs else None,
        per_row={name: shape(*([vector] if name in VECTORS else [])) for name in sorted(numbers)},
        per_token={name: shape(width, dtype=jnp.int32 if name == "segment" else jnp.float32) for name in tokens},
        layout=objective.unit.layout,
        shared_prompt=of_prompt,
    )


def longest(resolved: Resolved, mesh: Mesh, rows: int) -> dict[str, Any]:
    """The arguments by which so many rows are packed that are all as long as can be: where packing gains nothing."""
    if not resolved.config.training.packing:
        return {}
    bins = resolved.microbatch_rows // lanes_of(mesh, resolved.microbatch_rows)
    return dict(plan=jax.ShapeDtypeStruct((rows, 3), jnp.int32, sharding=replicated(mesh)), bins=bins)


def judged_shapes(out: Rollouts, rows: NamedSharding, needs: Collection[str], facts: Facts) -> Rollouts:
    """Generated rows as the loop hands them on: labelled and rewarded (several rewards take no more than one, beside
    the tokens), with what the protocol adds."""
    more = 0 if facts.room is None else facts.room(out.width)
    axes = {"row": (out.rows,), "token": out.mask.shape}
    added = {name: jnp.zeros(axes[FIELDS[name].axes]) for name in facts.provides & needs if name in FIELDS}

    def whole(out: Rollouts) -> Rollouts:
        indices, seeds = np.zeros(out.rows // out.shared_prompt, np.int32), jnp.zeros(out.rows, jnp.uint32)
        out = labelled(out, indices, seeds)
        tokens = jnp.pad(out.tokens, ((0, 0), (more, 0)))
        given = dict(reward=out.count, correct=out.count, **in_a_column(out.count, needs))
        return out.replace(tokens=tokens, **given, **added)

    return everywhere(jax.eval_shape(whole, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), out)), rows)
