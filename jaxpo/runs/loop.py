"""The loop of a run: iterate, and log, evaluate and save when it is due."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from jaxpo.batch import Rollouts
from jaxpo.learning.needs import is_reward_model
from jaxpo.learning.state import Run
from jaxpo.parallel.distributed import is_first
from jaxpo.protocols.gatherer import Gatherer, Watch
from jaxpo.protocols.protocol import NothingLeft
from jaxpo.runs.evaluation import answers, pairs, rewards
from jaxpo.runs.finite import not_finite
from jaxpo.runs.interrupt import Interrupt
from jaxpo.runs.iteration import Stage, iterate
from jaxpo.runs.restore import checkpoint_of
from jaxpo.runs.workspace import Workspace
from jaxpo.storage.checkpoint import Checkpoints
from jaxpo.storage.plots import plot_curves
from jaxpo.storage.rundir import Elsewhere, Progress, RunDirectory, harmless, read_metrics, say_once

MOVED = 0.5  # less than this share of parameters that moved is worth a warning
PROFILE_AFTER = 2  # iterations before a profile starts, since they compile


class Diverged(RuntimeError):
    """Too many optimizer steps in a row were not finite."""


@dataclass(frozen=True)
class Session:
    """What one process holds while it runs.

    workspace: everything that stays the same during the run.
    gatherer: the calls that a protocol may make.
    stage: the parts of an iteration.
    keys: independent random keys by purpose.
    log: where metrics and samples are written.
    checkpoints: where states are saved.
    """

    workspace: Workspace
    gatherer: Gatherer
    stage: Stage
    keys: Mapping[str, Array]
    log: RunDirectory | Elsewhere
    checkpoints: Checkpoints

    @property
    def watch(self) -> Watch:
        return self.gatherer.watch


def keys_of(seed: int) -> dict[str, Array]:
    """Independent keys of a run; all randomness is a function of these keys and the iteration."""
    return {
        name: jax.random.fold_in(jax.random.key(seed), i)
        for i, name in enumerate(("params", "rollout", "evaluate", "update", "protocol"))
    }


def minibatches(config: ConfigDict, key: Array, batch: Rollouts) -> Iterator[np.ndarray]:
    """Yield the rows of each optimizer step of an iteration; a minibatch holds whole groups."""
    responses = math.lcm(batch.shared_prompt, max(len(batch.layout), 1))
    groups = batch.rows // responses
    for epoch in range(config.training.epochs):
        order = np.arange(groups)
        if config.training.minibatches > 1:
            order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), groups))
        for part in order.reshape(config.training.minibatches, -1):
            yield (part[:, None] * responses + np.arange(responses)).reshape(-1).astype(np.int32)


def merge_steps(steps: list[dict[str, Array]]) -> dict[str, float]:
    """Merge the metrics of an iteration's optimizer steps: the mean; the largest of maxima; the sum of counts."""
    steps = jax.device_get(steps)
    out = {}
    for name in steps[0]:
        values = np.array([s[name] for s in steps])
        out[name] = float(
            values.max() if name.endswith("max") else values.sum() if name.startswith("step/") else values.mean()
        )
    # Only the first optimizer step has the sampler's own parameters; later steps differ because they have learned.
    if "mismatch/logp_abs_max" in out:
        out["mismatch/logp_abs_max"] = float(steps[0]["mismatch/logp_abs_max"])
    return out


def loop(session: Session, run: Run, progress: Progress, interrupt: Interrupt, profile_steps: int) -> tuple[Run, int]:
    """Iterate up to the last step; return the run, and the signal that asked it to stop (0 = none)."""
    config, watch, log, checkpoints = session.workspace.config, session.watch, session.log, session.checkpoints
    skipped, drawn, first, told = 0, time.perf_counter(), run.iteration, False
    trace = range(first + PROFILE_AFTER, first + PROFILE_AFTER + profile_steps)
    if asked := interrupt.asked():
        return run, asked
    while run.iteration < config.steps:
        if trace and run.iteration == trace.start:
            jax.profiler.start_trace(f"{log.path}/profile")
        try:
            run, metrics = timed_iteration(session, run)
        except NothingLeft as nothing:
            raise NothingLeft(f"iteration {run.iteration}: {nothing} ({_last_good(checkpoints)})") from None
        if trace and run.iteration == trace.stop:
            jax.profiler.stop_trace()
            progress.print(f"profile of {profile_steps} iterations in {log.path}/profile")
        # A step skipped because it had no tokens is no sign of divergence; a step that was not finite is.
        nonfinite = int(metrics["step/nonfinite"])
        skipped = skipped + nonfinite if nonfinite == session.workspace.resolved.optimizer_steps else 0
        judged = {}
        if run.iteration % config.evaluation.every == 0 and run.iteration < config.steps:
            judged = evaluate_greedy(session, run)
            metrics |= judged
        log.write(run.iteration, metrics)
        progress.update(metrics)
        if not told and (swallowed := swallowed_update(run.iteration, metrics)):
            progress.print(swallowed)
            told = True
        if skipped >= config.nonfinite_patience:
            raise Diverged(
                f"{skipped} optimizer steps in a row had a loss or gradient that was not finite, up to iteration "
                f"{run.iteration}: stopped. {_last_good(checkpoints)}"
            )
        # While steps are skipped, do not save: a state that diverges must not evict the last good checkpoint.
        due = run.iteration % config.checkpoint.every == 0 and not skipped
        asked = interrupt.asked()
        if due or run.iteration == config.steps or asked:
            if config.checkpoint.keep_best and run.iteration == config.steps:  # its full evaluation comes later
                judged = evaluate_greedy(session, run, logged=0)
            with watch.phase("checkpoint"):
                save(session, run, judged)
        if is_first() and time.perf_counter() - drawn > config.logging.plot_seconds:
            with watch.phase("plot"), harmless("curves.png"):
                draw_curves(str(log.path))
            drawn = time.perf_counter()
        if asked:
            return run, asked
    return run, interrupt.asked()


def save(session: Session, run: Run, judged: Mapping[str, float] | None = None) -> None:
    """Save a checkpoint of finite parameters. Others are not saved: at the start that is told, and steps that are not
    finite stop the run.

    Raises:
      Diverged: the parameters hold NaN or infinity after an iteration.
    """
    bad = not_finite({"params": run.state.params})
    if bad and not run.iteration:
        say_once(f"WARNING: {bad[0]} holds NaN or infinite values at the start, which is not saved")
        return
    if bad:
        raise Diverged(
            f"{bad[0]} holds NaN or infinite values after iteration {run.iteration}, which is not saved: stopped. "
            f"{_last_good(session.checkpoints)}; lower config.optimizer.learning_rate and go on with --resume"
        )
    session.checkpoints.save(run.iteration, *checkpoint_of(run, session.workspace.config.seed), judged)


def swallowed_update(iteration: int, metrics: Mapping[str, float]) -> str | None:
    """The warning that most parameters stayed where they were because rounding swallowed their update, if it did."""
    moved = metrics.get("update/moved_frac", 1.0)
    if moved >= MOVED:
        return None
    return (
        f"WARNING: iteration {iteration}: rounding swallowed the update of {1 - moved:.0%} of the parameters that "
        f"should move (update/moved_frac {moved:.3f}): keep them in float32 (config.policy.param_dtype=float32, with "
        "config.policy.dtype=bfloat16 for the computation), train adapters (config.lora.rank), or raise "
        "config.optimizer.learning_rate"
    )


def timed_iteration(session: Session, run: Run) -> tuple[Run, dict[str, float]]:
    """Run `iterate`; add its time by phase and the notes of the protocol to the metrics."""
    config, watch = session.workspace.config, session.watch
    start, spent = time.perf_counter(), dict(watch.seconds)
    key = jax.random.fold_in(session.keys["rollout"], run.iteration)
    order = partial(minibatches, config, jax.random.fold_in(key, 1))
    run, steps = iterate(session.stage, session.gatherer, run, jax.random.fold_in(key, 0), order)
    metrics = merge_steps(steps)
    seconds = time.perf_counter() - start
    phases = ("generate", "reward", "score", "update")
    metrics |= {f"time/{k}": watch.seconds[k] - spent.get(k, 0.0) for k in phases}
    # ``tokens`` is a mean over optimizer steps, each of which saw one minibatch.
    tokens = metrics["tokens"] * config.training.minibatches
    metrics |= {"time/iteration": seconds, "time/tokens_per_s": tokens / seconds, **watch.notes}
    watch.notes.clear()
    return run, metrics


def evaluate_greedy(session: Session, run: Run, logged: int | None = None) -> dict[str, float]:
    """Evaluate during the run and log ``logged`` samples (None = as many as configured); return the metrics."""
    workspace = session.workspace
    logged = workspace.config.logging.samples if logged is None else logged
    with session.watch.phase("evaluate"):
        metrics, samples, _ = evaluated(workspace, run)
    session.log.samples(run.iteration, samples[:logged])
    return metrics


def _last_good(checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    if checkpoints.latest() is None:
        return "no checkpoint was saved before"
    return f"the last good checkpoint is {checkpoints.directory}/{checkpoints.latest()}"


def evaluated(workspace: Workspace, run: Run) -> tuple[dict[str, float], list[dict[str, Any]], dict[str, Any]]:
    """Evaluate a run; return metrics, samples, and the bins of the reliability plot.

    A policy gives greedy answers; a reward model orders held-out pairs. Both are measured on held-out preferences.
    """
    metrics = pairs.held_out(workspace, run)
    if not is_reward_model(workspace.objective):
        greedy, samples = answers.greedy(workspace, run.state.params, workspace.questions.test)
        return {**greedy, **metrics}, samples, {}
    if not pairs.measurable(workspace):
        return metrics, [], {}
    calibrated, bins = rewards.calibration(*rewards.stated(workspace, run.state.params))
    return {**metrics, **calibrated}, [], bins


def draw_curves(workdir: str) -> None:
    """Draw ``curves.png`` anew."""
    plot_curves({str(workdir): read_metrics(workdir, lenient=True)}, f"{workdir}/curves.png")
