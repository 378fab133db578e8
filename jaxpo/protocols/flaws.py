"""A generative reward model looks for wrong steps in right answers (FAPO)."""

import numpy as np
from jax import Array
from ml_collections import ConfigDict

from jaxpo.batch import Rollouts
from jaxpo.learning.state import Run
from jaxpo.parallel.distributed import from_rows, own_rows, to_host
from jaxpo.protocols.gatherer import Gatherer
from jaxpo.protocols.on_policy import sample_once
from jaxpo.protocols.protocol import Facts, Protocol
from jaxpo.registry import register
from jaxpo.tasks.user_functions import check_places, locate
from jaxpo.text.conversations import plain_text


@register("protocol", source="FAPO, arXiv:2510.22543; recipe/fapo of volcengine/verl")
def fapo(genrm: str | None = None) -> Protocol:
    """Sample as `on_policy`, and ask a function about every right answer: the row field ``flawed`` is 1 where it finds
    a wrong step. A call that fails counts as not flawed.

    Metric ``flawed/rate``: share of the right answers.

    Args:
      genrm: ``"module:function"`` of (question, answer), both texts, which returns the index of the first wrong step,
        -1 if there is none; or a truth value.
    """
    find = None if genrm is None else locate(genrm, "config.protocol.genrm")
    if find is not None:
        check_places(find, ("question", "answer"), "config.protocol.genrm")

    def collect(run: Run, gather: Gatherer, key: Array) -> tuple[Run, Rollouts]:
        run, out = sample_once(run, gather, key)
        batch = to_host(out)
        right = np.flatnonzero(np.asarray(batch.correct) > 0)
        own = right[np.isin(right, own_rows(batch.prompt))]
        texts = gather.texts(batch)
        asked = [(plain_text(gather.train.examples[batch.prompt[i]].question), texts[i]) for i in own]
        said = gather.call("genrm of config.protocol.genrm", find, asked)
        mine = own_rows(batch.prompt)
        flawed = np.zeros(len(mine))
        flawed[np.searchsorted(mine, own)] = [is_flawed(x) for x in said]
        flawed = from_rows(flawed, mine, batch.rows).astype(np.float32)
        gather.note("flawed/rate", float(flawed[right].mean()) if len(right) else 0.0)
        return run, batch.replace(flawed=flawed)

    def check(config: ConfigDict) -> None:
        if genrm is None:
            raise ValueError(
                'config.protocol.genrm names no function: write "module:function" of one that looks for wrong steps'
            )

    return Protocol(collect, facts=Facts(provides=frozenset({"flawed"}), check=check))


def is_flawed(said: object) -> bool:
    """What the function returned as a truth value; None (it failed) is False.

    Raises:
      ValueError: it returned neither a truth value nor a whole number."""
    if said is None or isinstance(said, bool | np.bool_):
        return bool(said)
    if isinstance(said, int | np.integer):
        return said >= 0
    raise ValueError(
        f"config.protocol.genrm must return the index of a step or a truth value; it returned {said!r:.60}"
    )
