"""Experience replay: train on groups of past batches together with fresh ones."""

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxpo.arguments import OpenShare, Whole
from jaxpo.batch import Rollouts
from jaxpo.fields import role_id
from jaxpo.learning.state import Run, advance
from jaxpo.parallel.distributed import to_host
from jaxpo.protocols.gatherer import Gatherer
from jaxpo.protocols.on_policy import sample_once
from jaxpo.protocols.protocol import Facts, Protocol
from jaxpo.protocols.rows import with_rows
from jaxpo.registry import register


@register("protocol", source="R2VPO's off-policy mode, arXiv:2601.03320 (mixing ratio and buffer are assumed)")
def replay(fraction: OpenShare = 0.5, capacity: Whole = 4) -> Protocol:
    """Sample on policy, then replace ``round(fraction * prompts)`` groups of the batch by groups of the ``capacity``
    batches before it, drawn at random without replacement. The first iteration replaces none.

    A replayed row keeps the values that it had when it was fresh: its tokens, ``reward``, ``correct``, and above all
    its own ``logp_old``, ``logp_beh``, ``entropy_old`` and ``logp_<slot>``. Its role is "replay", and it takes
    ``group`` and ``seed`` of the row that it replaces. Every fresh group is stored, even if it was replaced, and a
    drawn group stays in the buffer. Choose this protocol for any objective by ``config.protocol.name = "replay"``.

    Tables: batches, the scored `Rollouts` with leaves [capacity, B, ...]; iteration [capacity] of each, -1 = none yet.
    Metric ``replay/age``: mean age in iterations of the replayed groups; 0 if there are none.

    Args:
      fraction: share of groups that are replayed; at least one is replayed, and at least one is fresh.
      capacity: how many batches are kept.
    """

    def tables(gather: Gatherer) -> dict[str, Rollouts | np.ndarray]:
        batches = jax.tree.map(lambda x: np.zeros((capacity, *x.shape), x.dtype), gather.scored())
        return dict(batches=batches, iteration=np.full(capacity, -1, np.int32))

    def before(run: Run, gather: Gatherer, rollouts: Rollouts) -> tuple[Run, Rollouts]:
        fresh, past, born = to_host(rollouts), run.tables["batches"], run.tables["iteration"]
        mixed, ages = fresh, np.zeros(1)
        if (born >= 0).any():
            # Seeds are drawn from (seed, iteration), so this is a function of them too.
            drawn = draw(np.random.default_rng(fresh.seed), born, round(fraction * gather.prompts), gather.prompts)
            mixed, ages = replaced(fresh, past, *drawn), run.iteration - born[drawn[1]]
        gather.note("replay/age", float(ages.mean()))
        place = run.iteration % capacity
        past = jax.tree.map(lambda table, new: with_rows(table, place, new), past, fresh)
        return advance(run, tables=dict(batches=past, iteration=with_rows(born, place, run.iteration))), mixed

    def check(config: ConfigDict) -> None:
        prompts = config.rollout.prompts
        if not 0 < round(fraction * prompts) < prompts:
            raise ValueError(
                f"config.protocol.fraction {fraction} of config.rollout.prompts {prompts} is "
                f"{round(fraction * prompts)} groups: at least one group must be replayed and one must be fresh"
            )

    return Protocol(sample_once, before=before, tables=tables, facts=Facts(check=check, stale=True))


def draw(rng: np.random.Generator, born: np.ndarray, n: int, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw the ``n`` groups of a batch to replace, and for each the batch (its place in the buffer) and the group of
    that batch that replaces it."""
    filled = np.flatnonzero(born >= 0)
    place = rng.choice(groups, n, replace=False)
    chosen = rng.choice(len(filled) * groups, n, replace=False)
    return place, filled[chosen // groups], chosen % groups


def replaced(fresh: Rollouts, past: Rollouts, place: np.ndarray, batch: np.ndarray, group: np.ndarray) -> Rollouts:
    """``fresh``, in which the groups at ``place`` [n] are replaced by ``group`` [n] of ``batch`` [n] of the buffer."""
    responses = np.arange(fresh.shared_prompt)
    at, row = ((x[:, None] * fresh.shared_prompt + responses).reshape(-1) for x in (place, group))
    which = np.repeat(batch, fresh.shared_prompt)
    mixed = jax.tree.map(lambda new, old: with_rows(new, at, old[which, row]), fresh, past)
    return mixed.replace(group=fresh.group, seed=fresh.seed, role=with_rows(fresh.role, at, role_id("replay")))
