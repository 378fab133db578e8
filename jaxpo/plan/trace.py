"""The functions that a run of a config compiles, traced for a mesh of devices that need not be there: shapes only."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxpo.batch import Rollouts, logps
from jaxpo.config import checks
from jaxpo.config.resolve import (
    microbatch_rows,
    objective_of,
    protocol_name,
    protocol_of,
    rows_per_prompt,
    sampling_of,
    transformer_of,
)
from jaxpo.fields import VECTORS, WEIGHTS
from jaxpo.learning import references
from jaxpo.learning.compiled import Compiled
from jaxpo.learning.needs import must_score, slots_of
from jaxpo.learning.programs import compile_functions, optimizer_of, several
from jaxpo.learning.state import TrainState
from jaxpo.learning.trainable import random_params
from jaxpo.objectives import Objective
from jaxpo.parallel import ROWS, replicated, reshaped, shardings
from jaxpo.parallel.offload import host_shardings
from jaxpo.policy import transformer
from jaxpo.policy.hf import read_config
from jaxpo.policy.packing import lanes_of
from jaxpo.protocols.protocol import Protocol
from jaxpo.rollout.engine import decode_trips
from jaxpo.runs.gatherer import as_scored
from jaxpo.runs.workspace import make_tokenizer, tokenize
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


def data_of(config: ConfigDict) -> Data:
    """Sizes that the run reads from its data. A pretrained policy with a fixed ``rollout.prompt_width`` needs none, so
    neither its task nor its tokenizer has to be there."""
    width = config.rollout.prompt_width
    if config.policy.name == "pretrained" and width is not None:
        ids = read_config(config.policy.path).get("eos_token_id") or ()
        return Data(None, width, tuple(ids) if isinstance(ids, list) else (ids,), 0)
    task = build({k: v for k, v in config.task.items() if v is not None})
    tokenizer = make_tokenizer(config, task)
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


def trace_run(config: ConfigDict, mesh: Mesh, data: Data) -> Planned:
    """The rollout, scoring and update steps of an iteration, as `jaxpo.runs.loop` calls them.

    Raises:
      ValueError: whatever `jaxpo.config.checks.validate` refuses for so many devices, or parameters that the mesh
        does not divide.
    """
    checks.validate(config, mesh.size)
    objective, protocol = objective_of(config), protocol_of(config)
    model = transformer.build(transformer_of(config, data.vocab_size or 1), several(mesh))
    key = jax.ShapeDtypeStruct((), jax.eval_shape(lambda: jax.random.key(0)).dtype, sharding=replicated(mesh))
    rows = NamedSharding(mesh, PartitionSpec(ROWS))

    def shapes_of(make: Callable[..., Any]) -> Any:
        made = jax.eval_shape(make, key)
        return placed(made, shardings(made, mesh))

    base = shapes_of(partial(transformer.init, model.config)) if config.lora.rank else None
    functions = compile_functions(
        config, mesh, model, objective, protocol.compiles, microbatch_rows(config), data.pad_id, lambda _: None, base
    )
    params = shapes_of(partial(random_params, config, model, objective))
    moments = jax.eval_shape(optimizer_of(config).init, params)
    memory = everywhere(jax.eval_shape(objective.init), replicated(mesh))
    state = TrainState(params, placed(moments, shardings(moments, mesh)), memory)
    sampling, reshard, sampler = reshaped(mesh, config.rollout.mesh), None, None
    if functions["reshard"]:
        reshard = Step(
            "reshard", functions["reshard"], (params,), {}, 1, ("params", *(() if base is None else ("base",))), mesh
        )
        moved = reshard.trace().out_info
        sampler = placed(moved, shardings(moved, sampling))
    offloaded = config.training.offload_reference
    frozen_copy = placed(params, host_shardings(params, mesh)) if offloaded else params
    kept = references.held(slots_of(objective, protocol.provides), protocol.keeps, frozen_copy, state.opt_state)
    scored = references.scored(objective, kept)
    frozen = {} if base is None else {"base": base}

    g, k = config.rollout.prompts, config.rollout.responses
    tokens, length = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for shape in ((g, data.prompt_width), (g,)))
    options = sampling_of(config, data.eos_ids)
    rollout = Step(
        *("rollout", functions["generate"], (sampler or params, tokens, length, key, options), dict(responses=k)),
        *(1, ("sampler",) if sampler else ("params", *frozen), sampling, decode_trips(config.sampling.max_new_tokens)),
    )
    trained = g * rows_per_prompt(config, objective)
    if protocol.rows:
        width = data.prompt_width, config.sampling.max_new_tokens
        batch = everywhere(unit_shapes(objective, protocol, trained, *width, trained // g, config.heads.gate), rows)
    else:
        batch = labelled_shapes(rollout.trace().out_info, rows)
    seen = as_scored(batch)
    how = longest(config, mesh, trained)
    score = Step("scoring", functions["score"], (params, seen), how, 0, ("params", *frozen), mesh)
    stats = everywhere(score.trace().out_info, rows)
    batch = batch.with_token(**logps(dict.fromkeys(scored, stats.logp)))
    updates = config.training.epochs * config.training.minibatches
    old = protocol.stale or updates > 1 or must_score(objective, batch, memory)
    if old:
        constants = dict(logp_old=stats.logp, entropy_old=stats.entropy, value_old=stats.value)
        batch = batch.replace(**constants).with_token(**logps(stats.derived))
    own = score._replace(times=old if offloaded else len(scored) + old)
    reference = score._replace(name="reference", arguments=(frozen_copy, seen), state=(*frozen,))
    scoring = [reference._replace(times=len(scored))] * offloaded + [own] * (own.times > 0)
    prepared = everywhere(jax.eval_shape(objective.prepare, batch, memory)[0], rows)
    n, held = trained // config.training.minibatches, ("params", "opt_state", *frozen)
    chosen, how = everywhere(np.zeros(n, np.int32), replicated(mesh)), dict(fresh=False) | longest(config, mesh, n)
    update = Step("update", functions["step"], (state, prepared, chosen), how, updates, held, mesh)
    return Planned(
        model,
        data,
        [*([reshard, rollout] if reshard else [rollout]) * samples(config), *scoring, update],
        dict(params=params, opt_state=state.opt_state, **kept, **frozen, **({"sampler": sampler} if sampler else {})),
    )


def samples(config: ConfigDict) -> bool:
    """Whether an iteration generates: all do, but those that take every answer from preference data."""
    objective = objective_of(config)
    if config.data.name is None or protocol_name(config, objective) != "preference_data":
        return True
    return config.protocol.get("rejected") == "policy" or "own" in objective.unit.layout


def unit_shapes(
    objective: Objective,
    protocol: Protocol,
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

    needs, number = objective.asks.needs & protocol.provides, shape(dtype=jnp.int32)
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


def longest(config: ConfigDict, mesh: Mesh, rows: int) -> dict[str, Any]:
    """The arguments by which so many rows are packed that are all as long as can be: where packing gains nothing."""
    if not config.training.packing:
        return {}
    bins = microbatch_rows(config) // lanes_of(mesh, microbatch_rows(config))
    return dict(plan=jax.ShapeDtypeStruct((rows, 3), jnp.int32, sharding=replicated(mesh)), bins=bins)


def labelled_shapes(out: Rollouts, rows: NamedSharding) -> Rollouts:
    """Generated rows as the loop hands them on: labelled and rewarded."""

    def whole(out: Rollouts) -> Rollouts:
        indices = jnp.zeros(out.rows // out.shared_prompt, jnp.int32)
        out = out.replace(
            prompt=jnp.repeat(indices, out.shared_prompt),
            seed=jnp.zeros(out.rows, jnp.uint32),
            role=jnp.zeros(out.rows, jnp.int32),
            count=jnp.ones(out.rows),
        )
        return out.replace(reward=out.count, correct=out.count)

    return everywhere(jax.eval_shape(whole, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), out)), rows)
