"""What a run has learned of preferences that it was not trained on: metrics of held-out units."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxpo import metrics as metrics_lib
from jaxpo.batch import Rollouts, concatenate
from jaxpo.fields import PAIR
from jaxpo.learning.state import Run
from jaxpo.parallel.distributed import to_host
from jaxpo.policy import heads
from jaxpo.policy.transformer import Params
from jaxpo.primitives import preference_diagnostics as diagnostics
from jaxpo.protocols.gatherer import Watch
from jaxpo.protocols.rows import as_scored
from jaxpo.runs.evaluation import answers
from jaxpo.runs.gatherer import make_stage
from jaxpo.runs.iteration import score_references
from jaxpo.runs.workspace import Workspace

SHOWN = ("eval/accuracy", "eval/ece", "eval/margin", "eval/ranking_accuracy", "eval/idealized_accuracy")
START = "start_logp"  # table: log-probs of the held-out answers under the policy at the start [units, rows of a unit]
LABELS_ONLY = 0.75  # share of annotators who agree with a hard label, where nothing says it (arXiv:2405.19534)


def measurable(workspace: Workspace) -> bool:
    """Whether there are held-out units, of answers that are all given."""
    data = workspace.preferences
    return data is not None and bool(data.test) and len(data.form.given) == len(data.form.layout)


def how_many(workspace: Workspace) -> str:
    """How many held-out pairs, or labelled answers, there are."""
    return f"{len(workspace.preferences.test)} held-out {'pairs' if workspace.preferences.form.layout else 'answers'}"


def chunks(workspace: Workspace) -> Iterator[tuple[np.ndarray, Rollouts]]:
    """Held-out units in batches of the size of an iteration: their places, and the rows; the last batch is filled up
    with rows of count 0."""
    data, n = workspace.preferences, workspace.config.rollout.prompts
    for start in range(0, len(data.test), n):
        real = np.arange(start, min(start + n, len(data.test)))
        places = np.concatenate([real, np.full(n - len(real), real[-1])])
        batch = data.units(places, (0, start), held_out=True)
        counted = np.arange(batch.rows) < len(real) * (batch.rows // n)
        yield real, workspace.put(batch.replace(count=batch.count * counted))


def sums(workspace: Workspace, params: Params) -> np.ndarray:
    """[units, rows of a unit] log-probs of the held-out answers."""
    out = []
    for real, batch in chunks(workspace):
        logp = to_host(workspace.score(params, as_scored(batch)).logp)
        row = np.where(to_host(batch.mask) > 0, logp, 0).sum(1)
        out.append(row.reshape(workspace.config.rollout.prompts, -1)[: len(real)])
    return np.concatenate(out)


def tables(workspace: Workspace) -> dict[str, np.ndarray]:
    """The table that a checkpoint holds, of pairs that the policy itself is to rank."""
    data = workspace.preferences
    scores = workspace.objective.asks.wants & set(heads.NAMES)  # a reward model's log-probs say nothing
    if data is None or not data.test or data.form.kind != "pair" or scores:
        return {}
    return {START: np.zeros((len(data.test), len(data.form.given)), np.float32)}


def started(workspace: Workspace, params: Params, tables: dict[str, Any]) -> dict[str, Any]:
    """The tables at the start of a run."""
    return {**tables, START: sums(workspace, params).astype(np.float32)} if START in tables else tables


def held_out(workspace: Workspace, run: Run) -> dict[str, float]:
    """``eval/<metric>`` of the objective on held-out units (not where fresh samples belong to them, as in HyPO), and of
    pairs how log-probs have moved since the start of the run and how the policy ranks answers; {} without held-out
    units.

    ``eval/accuracy``, ``eval/margin``: of the objective's own margin. ``eval/logp_<role>``, ``eval/drift_<role>``: mean
    log-prob of the answers, and its change. ``eval/reward_accuracy``: share of pairs whose chosen answer has gained
    more; ``eval/ranking_accuracy``: share whose chosen answer is more likely; ``eval/idealized_accuracy``: the share
    that the optimum of DPO with the objective's beta would rank right (arXiv:2405.19534), if it has one
    (`Objective.beta`). ``eval/kl``: mean of ``logp - logp_ref`` over whole answers of the policy's own, if there is a
    reference.
    """
    out = measured(workspace, run) if measurable(workspace) else {}
    return out | ranked(workspace, run) | implicit_kl(workspace, run) if START in run.tables else out


def measured(workspace: Workspace, run: Run) -> dict[str, float]:
    """The objective's loss and its metrics of preferences, of all held-out units as one batch."""
    stage, batches = make_stage(workspace, Watch()), []
    for i, (_, batch) in enumerate(chunks(workspace)):
        batch = batch.replace(group=batch.group + i * batch.rows)  # groups of different chunks stay apart
        batches.append(score_references(stage, run, batch))
    report = workspace.programs.measure(run.state.params, concatenate(batches), run.state.objective)
    results = {k: float(v) for k, v in metrics_lib.results(report).items()}
    wanted = {name: f"eval/{name.split('/')[-1]}" for name in results if name.startswith("preference/")}
    return {"eval/loss": results["loss"], **{to: results[name] for name, to in wanted.items()}}


def implicit_kl(workspace: Workspace, run: Run) -> dict[str, float]:
    """``eval/kl``: mean of ``sum_t (logp - logp_ref)`` over answers that the policy samples to ``rollout.prompts`` test
    prompts; {} without a reference."""
    if "ref" not in run.references:
        return {}
    n, params = workspace.config.rollout.prompts, run.state.params
    prompts = workspace.questions.test
    at = np.resize(np.arange(len(prompts)), n)  # whole batches: in turn, if there are fewer
    first = prompts.take(at)
    options = dict(responses=workspace.config.rollout.responses, chunk=n)
    (_, rollouts), *_ = answers.complete(workspace, params, first, workspace.sampling, jax.random.key(0), **options)
    seen, mask = workspace.put(as_scored(rollouts)), rollouts.mask > 0
    own, ref = (to_host(workspace.score(p, seen).logp) for p in (params, run.references["ref"]))
    return {"eval/kl": float(np.where(mask, own - ref, 0).sum(1).mean())}


def ranked(workspace: Workspace, run: Run) -> dict[str, float]:
    """Drift and ranking of held-out pairs."""
    now, start, layout = sums(workspace, run.state.params), run.tables[START], workspace.preferences.form.layout
    w, l = (layout.index(role) for role in PAIR)  # noqa: E741
    pref_prob = [entry[w].numbers.get("pref_prob", LABELS_ONLY) for entry in workspace.preferences.test]
    values = {
        "ranking_accuracy": diagnostics.ranking_accuracy(now[:, w], now[:, l]),
        "reward_accuracy": diagnostics.reward_accuracy(now[:, w] - start[:, w], now[:, l] - start[:, l]),
        "difficulty": diagnostics.difficulty(start[:, w], start[:, l]),
    }
    if (beta := workspace.objective.beta) is not None:
        ideal = diagnostics.idealized_accuracy(start[:, w], start[:, l], np.asarray(pref_prob), beta)
        values["idealized_accuracy"] = ideal
    for role, at in zip(PAIR, (w, l), strict=True):
        values |= {f"logp_{role}": now[:, at], f"drift_{role}": now[:, at] - start[:, at]}
    return {f"eval/{name}": float(np.mean(np.asarray(x))) for name, x in values.items()}
