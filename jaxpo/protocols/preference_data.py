"""Units of preference data in shuffled epochs, alone or with fresh samples of the policy or an earlier checkpoint."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import numpy as np
from jax import Array

from jaxpo.arguments import Domain, Whole
from jaxpo.batch import Rollouts, take
from jaxpo.fields import GIVEN, WEIGHTS, role_id
from jaxpo.learning.needs import form_of
from jaxpo.learning.references import stored
from jaxpo.learning.state import Run, advance
from jaxpo.objectives import Objective
from jaxpo.policy.transformer import Params
from jaxpo.protocols.gatherer import Gatherer
from jaxpo.protocols.protocol import Facts, Protocol
from jaxpo.protocols.rows import stacked
from jaxpo.registry import register

Keeps = dict[str, Mapping[str, Any]]


def rows(objective: Objective, responses: int) -> int:
    """The number of rows of a unit of data."""
    form = form_of(objective, responses)
    return form.size if form else max(len(objective.unit.layout), 1)


def rounds(prev_every: int | None, ref_every: int | None) -> Keeps:
    """The options of the references "prev" and "ref", which are renewed every so many iterations."""
    given = {"prev": prev_every, "ref": ref_every}
    return {name: {"every": every} for name, every in given.items() if every is not None}


@register("protocol", source="arXiv:2305.18290; policy samples as the rejected answers: arXiv:2401.01335")
def preference_data(
    rejected: Literal["data", "policy"] = "data", prev_every: Whole | None = None, ref_every: Whole | None = None
) -> Protocol:
    """Each iteration takes the next ``config.rollout.prompts`` units of ``config.data``, in epochs shuffled by (seed,
    epoch).

    If a unit's layout has answers of the policy itself (role "own", as in HyPO), they are sampled afresh.

    Args:
      rejected: where rejected answers come from: "data", or "policy", a sample of the current policy. A pair whose two
        answers are equal then does not count.
      prev_every: the previous iterate becomes the current policy every so many iterations; None = every iteration.
      ref_every: the reference becomes the current policy every so many iterations; None = never.
    """

    def collect(run: Run, gather: Gatherer, key: Array) -> tuple[Run, Rollouts]:
        run, batch = next_units(run, gather)
        form = gather.preferences.form
        wanted = [i for i, role in enumerate(form.layout) if role == "own"]
        if rejected == "policy":
            batch = with_samples(batch, run, gather, run.state.params, key, ["rejected"])
            return run, without_equal_pairs(batch)
        return run, with_samples(batch, run, gather, run.state.params, key, ["own"] * len(wanted)) if wanted else batch

    keeps = rounds(prev_every, ref_every)
    facts = Facts(GIVEN | {*WEIGHTS, "segment"}, rows, references=keeps, compiles={"score": 2})
    return Protocol(collect, facts=facts)


@register("protocol", source="SePPO, arXiv:2410.05255")
def seppo(size: Annotated[int, Domain(2, whole=True)] = 7, every: Whole = 30) -> Protocol:
    """Pair each chosen answer of the data with a sample of an earlier checkpoint in place of the rejected answer. Each
    iteration draws that checkpoint from a pool; it is the reference too.

    Args:
      size: checkpoints in the pool; the first one is the start of the run.
      every: iterations between them.
    """
    keeps = {"pool": dict(size=size, every=every)}

    def collect(run: Run, gather: Gatherer, key: Array) -> tuple[Run, Rollouts]:
        run, batch = next_units(run, gather)
        drawn_key, key = jax.random.split(key)
        place = int(jax.random.randint(drawn_key, (), 0, stored(keeps, run.iteration)))
        gather.note("pool/place", place)
        past = run.references["pool"][str(place)]
        run = advance(run, references={**run.references, "ref": past})
        return run, with_samples(batch, run, gather, past, key, ["rejected"])

    return Protocol(collect, facts=Facts(rows=rows, references=keeps, compiles={"score": 1}))


def next_units(run: Run, gather: Gatherer) -> tuple[Run, Rollouts]:
    """The next units of the data; ``ValueError`` if the run has none."""
    if gather.preferences is None:
        raise ValueError("this protocol reads preference data: set config.data.name to jsonl, datasets or task")
    position = run.position
    run, places = gather.draw_units(run, gather.prompts)
    return run, gather.preferences.units(places, (1, position))


def with_samples(batch: Rollouts, run: Run, gather: Gatherer, params: Params, key: Array, roles: list[str]) -> Rollouts:
    """Add a sample of ``params`` to each unit for each of ``roles``. It replaces the answer of that role; if the unit
    has no such role, it comes after the other answers."""
    layout, options = list(batch.layout), gather.sampling(run)
    size, k = len(layout), len(roles)
    n = batch.rows // size
    first = take(batch, np.arange(0, batch.rows, size))
    prompt = first.tokens[:, : batch.prompt_width]
    draw_key, seed_key = jax.random.split(key)
    budget = np.full(n, batch.width, np.int32)
    sampled = gather.complete(params, prompt, first.prompt_length, budget, draw_key, options, k)
    fresh = Rollouts(
        tokens=np.asarray(sampled.tokens),
        mask=np.asarray(sampled.mask),
        prompt_length=np.repeat(first.prompt_length, k),
        count=np.ones(n * k, np.float32),
        group=np.repeat(first.group, k),
        role=np.tile(np.array([role_id(r) for r in roles], np.int32), n),
        prompt=np.repeat(first.prompt, k),
        seed=np.asarray(jax.random.bits(seed_key, (n * k,))),
        per_row={name: np.zeros((n * k, *x.shape[1:]), x.dtype) for name, x in batch.per_row.items()},
    )
    both = stacked([batch.replace(layout=(), shared_prompt=1), fresh])
    whole = [*layout, *(r for r in roles if r not in layout)]
    new = iter(range(k))
    at = [("new", next(new)) if role in roles else ("old", layout.index(role)) for role in whole]
    units = np.arange(n)[:, None]
    order = np.concatenate(
        [units * size + i if where == "old" else n * size + units * k + i for where, i in at], 1
    ).reshape(-1)
    return take(both, order, shared_prompt=len(whole)).replace(layout=tuple(whole))


def without_equal_pairs(batch: Rollouts) -> Rollouts:
    """Set the count of units whose first two answers are the same tokens to 0."""
    tokens = np.where(batch.mask > 0, batch.completions, -1)
    answers = batch.unit(tokens)
    differ = (answers[:, 0] != answers[:, 1]).any(-1)
    return batch.replace(count=batch.count * np.repeat(differ, len(batch.layout)).astype(np.float32))
