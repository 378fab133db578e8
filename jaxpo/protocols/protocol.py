"""What a protocol is (`Protocol`): how data is gathered and weights are moved; and what it may call (`Tools`)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from jaxpo.batch import Rollouts, TokenStats
from jaxpo.learning.state import Run
from jaxpo.objectives import Objective, State
from jaxpo.objectives.grammar.base import NONE
from jaxpo.policy.transformer import Params
from jaxpo.rollout.sampling import SamplingOptions


class Protocol(NamedTuple):
    """How data is gathered and weights are moved: host-side hooks of the training loop, which owns ``Run`` and
    ``Tools``. None = nothing to do.

    collect(run, tools, key) -> (run, rollouts): any number of generate/score calls, fixed shapes.
    before(run, tools, rollouts) -> (run, rollouts): scored, no gradient yet. after(run, tools, rollouts) -> run: last
    optimizer step done, rollouts as prepared.
    tables(tools) -> pytrees of NumPy arrays by name: its memory at the start (``run.tables``), checkpointed.
    init(run, tools, key) -> run: fills it; not called when a run is resumed.
    sampler(options, state) -> SamplingOptions: the configured ones, changed by what the objective remembers.
    check(config): ``ValueError`` for a config that it cannot run with, before anything is compiled.
    provides: fields of the batch that it adds. compiles: shapes, beyond those of every run, that it calls compiled
    functions with, by function. rows: (objective, responses) -> rows that it makes of a prompt; None = the responses.
    keeps: frozen companions that it has besides those that the objective needs, or whose update it has a say in, with
    the options of `jaxpo.learning.references`. stale: its batches hold rows of earlier policies too, so ``logp_old`` is
    always scored and never taken for what the current policy says. judges: it asks ``config.judge`` about the policy's
    own answers.
    """

    collect: Callable[[Any, Any, Array], tuple[Any, Rollouts]]
    before: Callable[[Any, Any, Rollouts], tuple[Any, Rollouts]] | None = None
    after: Callable[[Any, Any, Rollouts], Any] | None = None
    tables: Callable[[Any], dict[str, Any]] | None = None
    init: Callable[[Any, Any, Array], Any] | None = None
    sampler: Callable[[Any, State], Any] | None = None
    check: Callable[[Any], None] | None = None
    provides: frozenset[str] = frozenset()
    compiles: Mapping[str, int] = NONE
    rows: Callable[[Objective, int], int] | None = None
    keeps: Mapping[str, Mapping[str, Any]] = NONE
    stale: bool = False
    judges: bool = False


class Verdict(NamedTuple):
    """What a judge says of K answers to each of G prompts: scores [G, K], and wins [G, K, K], the probability that the
    first beats the second (1/2 on the diagonal)."""

    scores: np.ndarray
    wins: np.ndarray


class Tools(NamedTuple):
    """What a protocol may call, and the run's sizes.

    prompts, responses: of an iteration. size: training prompts there are. prompt_width, width: P and T.
    draw(run, n) -> (run, indices of the next n training prompts).
    encoded(indices) -> their tokens [n, P], left-padded, and lengths [n].
    sampling(run) -> the options to sample with now.
    generate(params, indices, key, options=None, partner=None, share=0) -> rollouts without rewards, on the mesh; None =
      the configured options. With a ``partner`` they are samples of the geometric mixture ``params^(1 - share)
      partner^share``. Compiled for each number of indices.
    complete(params, tokens [n, P + T], length [n], budget [n], key, options, responses) -> rollouts (NumPy) that go on
      from any left-padded tokens, within so many of T new ones; any n, in batches of ``prompts``.
    scored() -> the shapes of a batch that is generated, judged and scored, as ``before`` gets it.
    reward(rollouts) -> with reward and correct, judged by the completions' text and ``prompt``.
    score(params, rollouts) -> what the policy says of them.
    noise(run, rollouts) -> the gradients of two half-batches before any step (`Workspace.noise`).
    note(name, value): a metric of this iteration. say(text): a message to who watches.
    preferences: the run's preference data; None = it has none.
    draw_units(run, n) -> (run, places of the next n units of the data).
    judge(*columns) -> what ``config.judge`` says of answers to the same prompts, of one or several generated batches.
    objective: what is trained.
    demonstrations(indices) -> the task's own answers to these training prompts (NumPy), one each.
    """

    prompts: int
    responses: int
    size: int
    prompt_width: int
    width: int
    draw: Callable[[Run, int], tuple[Run, np.ndarray]]
    encoded: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    sampling: Callable[[Run], SamplingOptions]
    generate: Callable[..., Rollouts]
    complete: Callable[..., Rollouts]
    scored: Callable[[], Rollouts]
    reward: Callable[[Rollouts], Rollouts]
    score: Callable[[Params, Rollouts], TokenStats]
    noise: Callable[[Run, Rollouts], dict[str, Array]]
    note: Callable[[str, float], None]
    say: Callable[[str], None]
    preferences: Any = None
    draw_units: Callable[[Run, int], tuple[Run, np.ndarray]] | None = None
    judge: Callable[..., Verdict] | None = None
    objective: Objective | None = None
    demonstrations: Callable[[np.ndarray], Rollouts] | None = None


class NothingLeft(RuntimeError):
    """Dynamic sampling found too few groups with mixed outcomes."""
