"""Metrics of held-out units: how well a run does on preferences that it was not trained on."""

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
START = "start_logp"  # table [units, rows of a unit]: log-probs of the held-out answers under the first policy
LABELS_ONLY = 0.75  # assumed share of annotators who agree with a hard label (arXiv:2405.19534)


def measurable(workspace: Workspace) -> bool:
    """Whether there are held-out units whose answers are all in the data."""
    data = workspace.preferences
    return data is not None and bool(data.test) and len(data.form.given) == len(data.form.layout)


def how_many(workspace: Workspace) -> str:
    """The number of held-out pairs or labelled answers, in words."""
    return f"{len(workspace.preferences.test)} held-out {'pairs' if workspace.preferences.form.layout else 'answers'}"


def chunks(workspace: Workspace) -> Iterator[tuple[np.ndarray, Rollouts]]:
    """Yield the held-out units in batches of the size of an iteration: their indices, and the rows.

    The last batch is filled up with rows of count 0.
    """
    data, n = workspace.preferences, workspace.config.rollout.prompts
    for start in range(0, len(data.test), n):
        real = np.arange(start, min(start + n, len(data.test)))
        places = np.concatenate([real, np.full(n - len(real), real[-1])])
        batch = data.units(places, (0, start), held_out=True)
        counted = np.arange(batch.rows) < len(real) * (batch.rows // n)
        yield real, workspace.put(batch.replace(count=batch.count * counted))


def sums(workspace: Workspace, params: Params) -> np.ndarray:
    """Log-probs of the held-out answers [units, rows of a unit]."""
    out = []
    for real, batch in chunks(workspace):
        logp = to_host(workspace.score(params, as_scored(batch)).logp)
        row = np.where(to_host(batch.mask) > 0, logp, 0).sum(1)
        out.append(row.reshape(workspace.config.rollout.prompts, -1)[: len(real)])
    return np.concatenate(out)


def tables(workspace: Workspace) -> dict[str, np.ndarray]:
    """The table of first log-probs that a checkpoint holds, if the policy itself ranks held-out pairs; {} otherwise."""
    data = workspace.preferences
    scores = workspace.objective.asks.wants & set(heads.NAMES)  # a reward model's log-probs say nothing
    if data is None or not data.test or data.form.kind != "pair" or scores:
        return {}
    return {START: np.zeros((len(data.test), len(data.form.given)), np.float32)}


def started(workspace: Workspace, params: Params, tables: dict[str, Any]) -> dict[str, Any]:
    """The tables at the start of a run, filled with the log-probs of ``params``."""
    return {**tables, START: sums(workspace, params).astype(np.float32)} if START in tables else tables


def held_out(workspace: Workspace, run: Run) -> dict[str, float]:
    """Measure the run on held-out units; {} without them.

    The objective's own metrics (not if a unit needs fresh samples, as in HyPO):

      eval/loss                   the objective's loss
      eval/<metric>               its preference metrics, such as ``eval/accuracy`` and ``eval/margin`` (of its margin)

    For pairs that the policy ranks:

      eval/logp_<role>            mean log-prob of the answers
      eval/drift_<role>           its change since the start of the run
      eval/reward_accuracy        share of pairs whose chosen answer has gained more log-prob than the rejected one
      eval/ranking_accuracy       share of pairs whose chosen answer is more likely
      eval/difficulty             mean log-prob of the rejected answer minus the chosen one, at the start of the run
      eval/idealized_accuracy     share that the optimum of DPO with the objective's beta (`Objective.beta`) would rank
                                  right (arXiv:2405.19534); only if it has one
      eval/kl                     mean of ``logp - logp_ref``, summed over whole answers that the policy samples; only
                                  with a reference
    """
    out = measured(workspace, run) if measurable(workspace) else {}
    return out | ranked(workspace, run) | implicit_kl(workspace, run) if START in run.tables else out


def measured(workspace: Workspace, run: Run) -> dict[str, float]:
    """The objective's loss and preference metrics, with all held-out units as one batch."""
    stage, batches = make_stage(workspace, Watch()), []
    for i, (_, batch) in enumerate(chunks(workspace)):
        batch = batch.replace(group=batch.group + i * batch.rows)  # groups of different chunks stay apart
        batches.append(score_references(stage, run, batch))
    report = workspace.programs.measure(run.state.params, concatenate(batches), run.state.objective)
    results = {k: float(v) for k, v in metrics_lib.results(report).items()}
    wanted = {name: f"eval/{name.split('/')[-1]}" for name in results if name.startswith("preference/")}
    return {"eval/loss": results["loss"], **{to: results[name] for name, to in wanted.items()}}


def implicit_kl(workspace: Workspace, run: Run) -> dict[str, float]:
    """Measure ``eval/kl``: the mean of ``sum_t (logp - logp_ref)`` over answers that the policy samples.

    It samples for ``rollout.prompts`` test prompts; {} without a reference.
    """
    if "ref" not in run.references:
        return {}
    n, params = workspace.config.rollout.prompts, run.state.params
    prompts = workspace.questions.test
    at = np.resize(np.arange(len(prompts)), n)  # a whole batch: prompts repeat if there are fewer
    first = prompts.take(at)
    options = dict(responses=workspace.config.rollout.responses, chunk=n)
    (_, rollouts), *_ = answers.complete(workspace, params, first, workspace.sampling, jax.random.key(0), **options)
    seen, mask = workspace.put(as_scored(rollouts)), rollouts.mask > 0
    own, ref = (to_host(workspace.score(p, seen).logp) for p in (params, run.references["ref"]))
    return {"eval/kl": float(np.where(mask, own - ref, 0).sum(1).mean())}


def ranked(workspace: Workspace, run: Run) -> dict[str, float]:
    """Metrics of how log-probs of held-out pairs have moved, and of how the policy ranks them."""
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
