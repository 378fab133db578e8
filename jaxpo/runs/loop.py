"""The training loop: prompts -> generate -> reward -> score -> prepare -> optimizer steps, with everything a run
leaves behind."""

import json
import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax import Array
from ml_collections import ConfigDict

from jaxpo.batch import Rollouts
from jaxpo.learning import references
from jaxpo.learning.needs import is_reward_model, slots_of
from jaxpo.learning.programs import packed
from jaxpo.learning.state import Run, advance
from jaxpo.objectives.grammar.base import check_rewards
from jaxpo.parallel.distributed import anywhere, check_shared, from_first, is_first, on_first, only_first_prints
from jaxpo.policy.families import tensors
from jaxpo.policy.hf import check_source, open_source, read_config
from jaxpo.policy.transformer import Params, parameter_count
from jaxpo.protocols.protocol import NothingLeft, Protocol, Tools
from jaxpo.runs.evaluation import answers, pairs, rewards
from jaxpo.runs.gatherer import Clock, make_tools, score_companions
from jaxpo.runs.restore import (
    MODEL,
    check_room,
    checkpoint_of,
    checkpoints_of,
    find_checkpoint,
    first_params,
    first_slots,
    restore,
    template,
)
from jaxpo.runs.warm_start import demonstrations, warm_start
from jaxpo.runs.workspace import Workspace, prepare_process, setup, shard_count
from jaxpo.storage.checkpoint import Checkpoints, Restored, finished_steps
from jaxpo.storage.manifest import config_hash, differences
from jaxpo.storage.plots import plot_curves, plot_reliability
from jaxpo.storage.rundir import Elsewhere, Progress, RunDirectory, closing_table, read_metrics

RELIABILITY = "reliability.json"
BEFORE_ALL = -(2**31)  # resuming from here keeps nothing of an earlier attempt's logs


PROFILE_AFTER = 2  # iterations before a profile, which compile


class Diverged(RuntimeError):
    """Too many optimizer steps in a row were not finite."""


@dataclass(frozen=True)
class Result:
    """What a run came to. before, after: evaluation metrics; seconds: wall time by phase; params: the trained
    parameters."""

    params: Params
    before: Mapping[str, float]
    after: Mapping[str, float]
    seconds: Mapping[str, float]
    iteration: int
    workspace: Workspace


class Interrupt:
    """SIGTERM asks for a clean end: the iteration under way is finished, saved, and the run exits."""

    def __init__(self):
        self.here = False

    def asked(self) -> bool:
        """Whether any process was asked; all of them have to call."""
        return anywhere(self.here)

    def __enter__(self) -> "Interrupt":
        def ask(*_: object) -> None:
            self.here = True

        try:
            self._before = signal.signal(signal.SIGTERM, ask)
        except ValueError:  # not in the main thread (a notebook's executor): the caller keeps its own signals
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


# ---- one iteration


@dataclass(frozen=True)
class Session:
    """What one process holds while it runs: surroundings, hooks, keys, and where things are written."""

    workspace: Workspace
    protocol: Protocol
    tools: Tools
    keys: Mapping[str, Array]
    clock: Clock
    notes: dict[str, float]
    log: RunDirectory | Elsewhere
    checkpoints: Checkpoints


def keys_of(seed: int) -> dict[str, Array]:
    """Independent keys of a run; everything random is a function of them and the iteration."""
    return {
        name: jax.random.fold_in(jax.random.key(seed), i)
        for i, name in enumerate(("params", "rollout", "evaluate", "update", "protocol"))
    }


def update(workspace: Workspace, run: Run, batch: Rollouts, key: Array) -> tuple[Run, list[dict[str, Array]]]:
    """All optimizer steps of an iteration; minibatches are made of whole groups."""
    config, state, slots, steps = workspace.config, run.state, run.slots, []
    responses = math.lcm(batch.shared_prompt, max(len(batch.layout), 1))
    groups = batch.rows // responses
    looks = bool(workspace.objective.asks.peeks) and not workspace.protocol.stale
    for epoch in range(config.training.epochs):
        order = np.arange(groups)
        if config.training.minibatches > 1:
            order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), groups))
        for part in order.reshape(config.training.minibatches, -1):
            rows = (part[:, None] * responses + np.arange(responses)).reshape(-1).astype(np.int32)
            plan = packed(config, workspace.mesh, batch, config.training.microbatches, rows)
            state, out = workspace.step(state, batch, rows, fresh=not steps and looks, **plan)
            slots = references.moved(slots, workspace.protocol.keeps, state.params)
            if plan:  # bins, of the rows that would have been computed
                lane = len(rows) // (config.training.microbatches * shard_count(workspace))
                out = out | {"packing/share": plan["bins"] / lane}
            steps.append(out)
    return advance(run, state=state, slots=slots), steps


def merge_steps(steps: list[dict[str, Array]]) -> dict[str, float]:
    """Mean over an iteration's optimizer steps; the largest for maxima, the sum for counts."""
    steps = jax.device_get(steps)
    out = {}
    for name in steps[0]:
        values = np.array([s[name] for s in steps])
        out[name] = float(
            values.max() if name.endswith("max") else values.sum() if name.startswith("step/") else values.mean()
        )
    # Only the first optimizer step has the rollout's own parameters; later ones differ from the sampler because they
    # have learned.
    if "mismatch/logp_abs_max" in out:
        out["mismatch/logp_abs_max"] = float(steps[0]["mismatch/logp_abs_max"])
    return out


def iterate(session: Session, run: Run, key: Array) -> tuple[Run, dict[str, float]]:
    """One iteration: gather, score, prepare, update."""
    workspace, protocol, tools = session.workspace, session.protocol, session.tools
    run, rollouts = protocol.collect(run, tools, jax.random.fold_in(key, 0))
    check_rewards(workspace.objective.asks.rewards, rollouts)
    with session.clock.phase("score"):
        batch = score_companions(workspace, run, workspace.put(rollouts))
    if protocol.before:
        run, batch = protocol.before(run, tools, batch)
        batch = workspace.put(batch)
    with session.clock.phase("score"):
        batch, memory = workspace.prepare(batch, run.state.objective)
        run = advance(run, state=run.state.replace(objective=memory))
        jax.block_until_ready(batch)
    with session.clock.phase("update"):
        run, steps = update(workspace, run, batch, jax.random.fold_in(key, 1))
        jax.block_until_ready(run.state.params)
    if protocol.after:
        run = protocol.after(run, tools, batch)
    slots = references.moved(run.slots, protocol.keeps, run.state.params, run.iteration + 1)
    return advance(run, iteration=run.iteration + 1, slots=slots), merge_steps(steps)


# ---- the run


def train_rl(config: ConfigDict, workdir: str, *, resume: bool = False, profile_steps: int = 0) -> Result:
    """Train a policy by reinforcement learning: the main job.

    Args:
      config: see `jaxpo.config.fields.default`; validated before anything is compiled.
      workdir: receives config, metrics, samples, curves and checkpoints.
      resume: go on from the last checkpoint in ``workdir``, if there is one.
      profile_steps: write a profiler trace of so many iterations (from the third on) to ``workdir/profile``.

    Raises:
      ValueError: a config that cannot run. FileExistsError: ``workdir`` is not empty and ``resume`` is not set.
      Diverged, NothingLeft: the run cannot go on; the last checkpoint is named.
    """
    with only_first_prints():
        return _train(config, workdir, resume, profile_steps)


def _train(config: ConfigDict, workdir: str, resume: bool, profile_steps: int) -> Result:
    prepare_process(config.compilation_cache)
    directory = checkpoints_of(workdir, config)
    done = from_first(lambda: max(finished_steps(directory), default=None))
    if config.checkpoint.directory and done is not None and not resume:
        raise FileExistsError(f"{directory} holds checkpoint {done}; go on with --resume or choose another directory")
    left = config.steps - (done or 0) - PROFILE_AFTER
    if profile_steps < 0 or profile_steps > max(left, 0):
        raise ValueError(
            f"--profile_steps={profile_steps}: this run can trace at most {max(left, 0)} iterations, after "
            f"{PROFILE_AFTER} that compile"
        )
    say = print
    workspace = setup(config, report=lambda text: say(text))
    clock, notes, started = Clock(), {}, time.perf_counter()
    tools = make_tools(workspace, clock, notes, lambda text: say(text))
    tables = workspace.protocol.tables(tools) if workspace.protocol.tables else {}
    tables |= pairs.tables(workspace)
    run, found = (None, None) if done is None or not resume else restore(workspace, tables, directory)
    if found is None:
        check_start(workspace)
    kept = config.checkpoint.keep + bool(config.checkpoint.keep_best)
    from_first(lambda: check_room(directory, template(workspace, tables), kept))
    log = on_first(lambda: open_run(workdir, config, workspace, resume, found)) or Elsewhere(workdir)
    check_shared(epath.Path(directory).absolute())
    checkpoints = Checkpoints(
        directory, config.checkpoint.keep, best=config.checkpoint.keep_best, config=config_hash(config)
    )
    session = Session(workspace, workspace.protocol, tools, keys_of(config.seed), clock, notes, log, checkpoints)
    try:
        with Interrupt() as interrupt:
            if found is not None:
                checkpoints.set_aside(found.passed)
                print(f"resumed at iteration {run.iteration} from {directory}/{found.step}")
            else:
                run = begin(session, tables, lambda text: say(text))
                checkpoints.save(0, *checkpoint_of(run, config.seed))
            before = (found and from_first(lambda: read_evaluation(workdir, 0))) or evaluate_both(session, run)
            with Progress(config.steps, initial=run.iteration) as progress:
                say = progress.print
                run, stopped = loop(session, run, progress, interrupt, profile_steps)
        say = print
        checkpoints.wait()
        if stopped:
            print(f"stopped by SIGTERM after iteration {run.iteration}, saved; go on with --resume")
            return Result(run.state.params, before, {}, clock.seconds, run.iteration, workspace)
        after = {}
        if found and found.step == run.iteration:
            after = from_first(lambda: read_evaluation(workdir, run.iteration))
        if after:
            print(f"this run has finished: all of its {run.iteration} iterations are done")
        elif run.iteration:
            after = evaluate_both(session, run)
        else:
            after = before
        on_first(lambda: draw_curves(workdir))
        summarise(workspace, run, before, after, clock, time.perf_counter() - started)
        return Result(run.state.params, before, after, clock.seconds, run.iteration, workspace)
    finally:
        checkpoints.close()
        log.close()


def open_run(
    workdir: str, config: ConfigDict, workspace: Workspace, resume: bool, found: Restored | None
) -> RunDirectory:
    """The run directory, with config and tokenizer in it; says what is about to run, and in which fields a run that is
    resumed differs from what it was."""
    begun, held = Path(workdir).is_dir() and any(Path(workdir).iterdir()), Path(workdir) / "config.json"
    resume_step = (found.step if found else BEFORE_ALL) if resume and begun else None
    if found and found.manifest["config"] != config_hash(config) and held.is_file():
        for line in differences(json.loads(held.read_text()), json.loads(json.dumps(config.to_dict()))):
            print(f"WARNING: the run goes on with another config: {line}")
    wandb = {"project": config.logging.wandb_project} if config.logging.wandb_project else None
    log = RunDirectory(workdir, tensorboard=config.logging.tensorboard, wandb=wandb, resume_step=resume_step)
    log.save_json("config.json", config.to_dict())
    log.save_json("tokenizer.json", workspace.tokenizer.to_json())
    if config.policy.name == "pretrained":
        (log.path / MODEL).mkdir(exist_ok=True)
        log.save_json(f"{MODEL}/config.json", read_config(config.policy.path))
    trained = parameter_count(jax.eval_shape(workspace.init_params, jax.random.key(0)))
    frozen = "" if workspace.base is None else f" beside {parameter_count(workspace.base):,} frozen ones"
    mesh = " x ".join(f"{k} {v}" for k, v in workspace.mesh.shape.items())
    print(f"{workspace.task.name}: " + ", ".join(f"{k} {v:g}" for k, v in workspace.report.items()))
    print(
        f"policy: {trained:,} parameters{frozen}, {workspace.tokenizer.vocab_size} tokens; objective "
        f"{config.objective.name}; mesh {mesh} "
        f"on {jax.devices()[0].platform}"
    )
    return log


def begin(session: Session, tables: dict[str, Any], report: Callable[[str], None]) -> Run:
    """Parameters (random, loaded, or warm-started), frozen slots and protocol tables of a new run."""
    workspace = session.workspace
    config = workspace.config
    params = first_params(workspace, session.keys["params"])
    if config.warm_start.steps:
        with session.clock.phase("warm start"):
            params = warm_start(workspace, params, session.log, report=report)
    state = workspace.init_state(params)
    run = Run(state, first_slots(workspace, state), pairs.started(workspace, params, tables))
    if session.protocol.init is None:
        return run
    return session.protocol.init(run, session.tools, session.keys["protocol"])


def evaluate_both(session: Session, run: Run) -> dict[str, float]:
    """What `evaluated` says at the current iteration, and pass@k of a policy; logged."""
    workspace, config = session.workspace, session.workspace.config.evaluation
    with session.clock.phase("evaluate"):
        metrics, samples, pictured = evaluated(workspace, run)
        if config.pass_at and workspace.task.score and not is_reward_model(workspace.objective):
            key = jax.random.fold_in(session.keys["evaluate"], run.iteration)
            metrics |= answers.sampled(
                workspace, run.state.params, workspace.test, key, samples=config.samples, ks=config.pass_at
            )
    session.log.write(run.iteration, metrics)
    session.log.samples(run.iteration, samples[: workspace.config.logging.samples])
    if pictured and is_first():
        session.log.save_json(RELIABILITY, {"iteration": run.iteration, **pictured})
        plot_reliability(pictured, session.log.path / f"{Path(RELIABILITY).stem}.png")
    return metrics


def evaluated(workspace: Workspace, run: Run) -> tuple[dict[str, float], list[dict[str, Any]], dict[str, Any]]:
    """Metrics, samples, and the bins of a reliability picture: of a policy its greedy answers, of a reward model how
    well it orders held-out pairs; of both what held-out pairs say."""
    metrics = pairs.held_out(workspace, run)
    if not is_reward_model(workspace.objective):
        greedy, samples = answers.greedy(workspace, run.state.params, workspace.test)
        return {**greedy, **metrics}, samples, {}
    if not pairs.measurable(workspace):
        return metrics, [], {}
    calibrated, bins = rewards.calibration(*rewards.stated(workspace, run.state.params))
    return {**metrics, **calibrated}, [], bins


def loop(session: Session, run: Run, progress: Progress, interrupt: Interrupt, profile_steps: int) -> tuple[Run, bool]:
    """Iterations up to the last; returns the run and whether SIGTERM ended it."""
    config, clock, log, checkpoints = session.workspace.config, session.clock, session.log, session.checkpoints
    skipped, drawn, first = 0, time.perf_counter(), run.iteration
    trace = range(first + PROFILE_AFTER, first + PROFILE_AFTER + profile_steps)
    if interrupt.asked():
        return run, True
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
        # A step that was skipped for want of tokens is no sign of divergence; one that was not finite is.
        nonfinite = int(metrics["step/nonfinite"])
        skipped = skipped + nonfinite if nonfinite == session.workspace.optimizer_steps() else 0
        judged = {}
        if run.iteration % config.evaluation.every == 0 and run.iteration < config.steps:
            judged = evaluate_greedy(session, run)
            metrics |= judged
        log.write(run.iteration, metrics)
        progress.update(metrics)
        if skipped >= config.nonfinite_patience:
            raise Diverged(
                f"{skipped} optimizer steps in a row had a loss or gradient that was not finite, up to iteration "
                f"{run.iteration}: stopped. {_last_good(checkpoints)}"
            )
        # Skipped steps change nothing, but what they could not go on from must not push out the checkpoints before it.
        due = run.iteration % config.checkpoint.every == 0 and not skipped
        asked = interrupt.asked()
        if due or run.iteration == config.steps or asked:
            if config.checkpoint.keep_best and run.iteration == config.steps:  # its full evaluation comes later
                judged = evaluate_greedy(session, run, logged=0)
            with clock.phase("checkpoint"):
                checkpoints.save(run.iteration, *checkpoint_of(run, config.seed), judged)
        if is_first() and time.perf_counter() - drawn > config.logging.plot_seconds:
            with clock.phase("plot"):
                draw_curves(str(log.path))
            drawn = time.perf_counter()
        if asked and run.iteration < config.steps:
            return run, True
    return run, False


def timed_iteration(session: Session, run: Run) -> tuple[Run, dict[str, float]]:
    """`iterate` with its time by phase and what the tools counted."""
    config, clock = session.workspace.config, session.clock
    start, spent = time.perf_counter(), dict(clock.seconds)
    run, metrics = iterate(session, run, jax.random.fold_in(session.keys["rollout"], run.iteration))
    seconds = time.perf_counter() - start
    phases = ("generate", "reward", "score", "update")
    metrics |= {f"time/{k}": clock.seconds[k] - spent.get(k, 0.0) for k in phases}
    # ``tokens`` is a mean over optimizer steps, each of which saw one minibatch.
    tokens = metrics["tokens"] * config.training.minibatches
    metrics |= {"time/iteration": seconds, "time/tokens_per_s": tokens / seconds, **session.notes}
    session.notes.clear()
    return run, metrics


def evaluate_greedy(session: Session, run: Run, logged: int | None = None) -> dict[str, float]:
    """What `evaluated` says during the run; a few samples are logged (None = as many as configured)."""
    workspace = session.workspace
    logged = workspace.config.logging.samples if logged is None else logged
    with session.clock.phase("evaluate"):
        metrics, samples, _ = evaluated(workspace, run)
    session.log.samples(run.iteration, samples[:logged])
    return metrics


def _last_good(checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    return f"the last good checkpoint is {checkpoints.directory}/{checkpoints.latest()}"


def read_evaluation(workdir: str, iteration: int) -> dict[str, float]:
    """The evaluation after an iteration, as an earlier part of a resumed run has logged it; {} if it has not."""
    metrics = read_metrics(workdir)
    rows = np.flatnonzero(metrics["step"] == iteration)
    found = {k: float(v[rows[0]]) for k, v in metrics.items() if k.startswith("eval/")} if len(rows) else {}
    return {k: v for k, v in found.items() if np.isfinite(v)}


def check_start(workspace: Workspace) -> None:
    """What parameters come from is there, before anything is compiled or written."""
    config = workspace.config
    if is_reward_model(workspace.objective) and workspace.preferences is None:
        raise ValueError(
            f"config.data.name is None: {config.objective.name!r} trains a reward model, which learns from answers "
            "that are given; set it to jsonl, datasets or task"
        )
    if config.init_from and find_checkpoint(config.init_from) is None:
        raise ValueError(f"config.init_from {config.init_from!r} is no run directory with a checkpoint")
    if config.policy.name == "pretrained" and not config.init_from and not config.lora.rank:
        check_source(open_source(config.policy.path), tensors(workspace.model.config))
    if config.warm_start.steps:
        demonstrations(workspace, np.arange(len(workspace.train)))
    best = config.checkpoint.keep_best
    known = pairs.measurable(workspace) if best == "eval/accuracy" else workspace.task.score is not None
    if best and not known:
        what = "held-out pairs" if best == "eval/accuracy" else "verifier"
        raise ValueError(f"config.checkpoint.keep_best {best!r}: this run has no {what} to judge checkpoints by")
    for path in config.soup.of:
        if find_checkpoint(path) is None:
            raise ValueError(f"config.soup.of {path!r} is no run directory with a checkpoint")
    if bool(config.soup.of) != ("soup" in slots_of(workspace.objective, workspace.protocol.provides)):
        raise ValueError(
            "config.soup.of names two runs exactly where an objective needs logp_soup, the log-probs of their average"
        )


def draw_curves(workdir: str) -> None:
    """Refresh ``curves.png``."""
    plot_curves({str(workdir): read_metrics(workdir)}, f"{workdir}/curves.png")


def summarise(
    workspace: Workspace,
    run: Run,
    before: Mapping[str, float],
    after: Mapping[str, float],
    clock: Clock,
    seconds: float,
) -> None:
    """The closing tables: accuracy before and after, and where the time went."""

    def shown(metrics: Mapping[str, float], name: str) -> str:
        return (f"{metrics[name]:.3f}" if name in metrics else "") + (
            f" [{metrics[name + '_lo']:.3f}, {metrics[name + '_hi']:.3f}]" if name + "_lo" in metrics else ""
        )

    rewards = is_reward_model(workspace.objective)
    held = pairs.how_many(workspace) if rewards else f"{len(workspace.test)} test prompts"
    names = ["eval/greedy", *[f"eval/pass@{k}" for k in workspace.config.evaluation.pass_at]]
    names = [name for name in (*names, *pairs.SHOWN) if name in {**before, **after}]
    if names:
        closing_table(
            f"{workspace.task.name}, {held}: before and after {run.iteration} iterations (95% intervals)",
            [(n.removeprefix("eval/"), shown(before, n), shown(after, n)) for n in names],
            columns=("", "before", "after"),
        )
    compiling = sum(c.seconds for c in workspace.compiled)
    rest = seconds - sum(clock.seconds.values())
    rows = [*clock.seconds.items(), ("everything else", rest)]
    closing_table(
        f"{seconds:.0f} s in all, of which {compiling:.0f} s compiling",
        [(k, f"{v:.1f} s", f"{v / seconds:.0%}") for k, v in rows],
    )
