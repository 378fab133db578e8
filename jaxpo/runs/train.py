"""The main job: start or resume a run, iterate, evaluate, and leave everything behind that a run leaves."""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxpo.config.fill import fill, tie_temperature
from jaxpo.config.paths import expand_paths
from jaxpo.config.pins import keep_pins
from jaxpo.config.resolved import Resolved
from jaxpo.files import read_object
from jaxpo.learning.needs import is_reward_model
from jaxpo.learning.state import Run
from jaxpo.parallel.distributed import check_shared, from_first, is_first, on_first, only_first_prints
from jaxpo.parallel.host import open_devices
from jaxpo.policy.families import tensors
from jaxpo.policy.hf import check_source, open_source
from jaxpo.policy.transformer import Params, parameter_count
from jaxpo.protocols.gatherer import Watch
from jaxpo.runs import kept, memory, trust
from jaxpo.runs.evaluation import answers, pairs
from jaxpo.runs.gatherer import make_gatherer, make_stage
from jaxpo.runs.interrupt import Interrupt
from jaxpo.runs.loop import PROFILE_AFTER, Session, draw_curves, evaluated, keys_of, loop, save
from jaxpo.runs.memory import out_of_memory_explained
from jaxpo.runs.models import load_models
from jaxpo.runs.restore import (
    begins_again,
    check_room,
    checkpoints_of,
    find_checkpoint,
    first_params,
    first_references,
    restore,
    template,
)
from jaxpo.runs.warm_start import warm_start
from jaxpo.runs.workspace import Workspace, far_longer, prepare_process, setup, shard_count
from jaxpo.storage import lock
from jaxpo.storage.checkpoint import Checkpoints, Restored, finished_steps, saved_origin
from jaxpo.storage.manifest import config_hash
from jaxpo.storage.paths import local, located
from jaxpo.storage.plots import plot_reliability
from jaxpo.storage.rundir import Elsewhere, Progress, RunDirectory, closing_table, harmless, read_metrics

RELIABILITY = "reliability.json"
BEFORE_ALL = -(2**31)  # resuming from here keeps nothing of an earlier attempt's logs


@dataclass(frozen=True)
class Result:
    """What a run came to.

    params: the trained parameters.
    before, after: evaluation metrics.
    seconds: wall time by phase.
    iteration: finished ones.
    workspace: of the run.
    stopped: number of the signal that ended it before its end; 0 = it has finished.
    """

    params: Params
    before: Mapping[str, float]
    after: Mapping[str, float]
    seconds: Mapping[str, float]
    iteration: int
    workspace: Workspace
    stopped: int = 0


def train_rl(
    config: ConfigDict,
    workdir: str,
    *,
    resume: bool = False,
    profile_steps: int = 0,
    other_data: bool = False,
    check: Callable[[Resolved], None] | None = None,
) -> Result:
    """Train a policy by reinforcement learning: the main job.

    Args:
      config: see `jaxpo.config.fields.default`; checked before anything is compiled.
      workdir: receives config, metrics, samples, curves and checkpoints.
      resume: go on from the last checkpoint in ``workdir``, if there is one.
      check: raises ``ValueError`` for a run that another program is for.
      profile_steps: write a profiler trace of so many iterations (from the third on) to ``workdir/profile``.
      other_data: go on even if the data are not those that the run was trained on.

    Raises:
      ValueError: a config that cannot run, one that is not of the run that is resumed, or more memory than there is.
      FileExistsError: ``workdir`` is not empty and ``resume`` is not set.
      Locked: another process trains there.
      Diverged, NothingLeft: the run cannot go on; the last checkpoint is named.
      MemoryError: it ran out of memory; the step and the fields that help are named.
      KeyboardInterrupt: a second signal, or one before and after the iterations; its arguments are the number of the
        signal and what is saved.
    """
    folder = local(workdir, "workdir")
    open_devices()
    with only_first_prints(), out_of_memory_explained(config):
        return _train(expand_paths(config), str(folder), resume, profile_steps, other_data, check)


class Voice:
    """Prints messages; while there is a progress bar, above it."""

    def __init__(self) -> None:
        self.say: Callable[[str], None] = print

    def __call__(self, text: str) -> None:
        self.say(text)


def _train(
    config: ConfigDict,
    workdir: str,
    resume: bool,
    profile_steps: int,
    other_data: bool,
    check: Callable[[Resolved], None] | None,
) -> Result:
    prepare_process(config.compilation_cache)
    directory = checkpoints_of(workdir, config)
    on_first(lambda: check_writable(workdir, directory))
    done = from_first(lambda: max(finished_steps(directory), default=None))
    again = from_first(lambda: begins_again(workdir, config) and not (resume and same_config(workdir, config)))
    done = None if again else done
    if config.checkpoint.directory and done is not None and not resume:
        raise FileExistsError(f"{directory} holds checkpoint {done}; go on with --resume or choose another directory")
    check_profile(profile_steps, config.steps - (done or 0) - PROFILE_AFTER)
    if resume and (held := Path(workdir) / "config.json").is_file():
        keep_pins(config, read_object(held))
    voice, started = Voice(), time.perf_counter()
    goes_on = resume and done is not None
    given = kept.use_kept(config, workdir, finished=False) if goes_on else {}
    was = saved_origin(directory) if goes_on else {}
    workspace = setup(
        config,
        tokenizer=kept.tokenizer_of(workdir) if goes_on else None,
        check=check,
        check_data=partial(kept.check_data, was.get("data"), workdir=workdir, other_data=other_data),
        load_models=load_models,
        report=voice,
    )
    if goes_on:
        kept.check_origin(was, workspace.origin, workdir)
    check_memory(workspace, template(workspace, {}))
    watch = Watch(say=voice)
    gatherer = make_gatherer(workspace, watch)
    tables = workspace.protocol.tables(gatherer) if workspace.protocol.tables else {}
    tables |= pairs.tables(workspace)
    run, found = resumed(workspace, tables, directory, workdir) if goes_on else (None, None)
    if found is None:
        check_start(workspace)
    else:
        kept.tell_without_effect(config, workdir, given, workspace.tokenizer)
    held = config.checkpoint.keep + bool(config.checkpoint.keep_best)
    from_first(lambda: check_room(directory, template(workspace, tables), held))
    opened = on_first(lambda: open_run(workdir, workspace, resume or again, found, given, other_data))
    log = opened or Elsewhere(workdir)
    failures = workspace.questions.failures
    failures.say, failures.folder = voice, log.path if is_first() else None
    check_shared(located(directory).absolute())
    best = config.checkpoint.keep_best
    of_run = dict(config=config_hash(config), origin=workspace.origin)
    checkpoints = Checkpoints(directory, config.checkpoint.keep, best=best, **of_run)
    stage = make_stage(workspace, watch)
    session = Session(workspace, gatherer, stage, keys_of(config.seed), log, checkpoints)
    waits = True
    try:
        with Interrupt() as interrupt:
            if found is not None:
                checkpoints.set_aside(found.passed)
                print(f"resumed at iteration {run.iteration} from {directory}/{found.step}")
            else:
                if again:
                    print(f"{workdir} holds a run that has not finished an iteration: it begins again")
                run = begin(session, tables)
                save(session, run)
            before = found and from_first(lambda: read_evaluation(workdir, 0))
            before = before or ({} if interrupt.asked() else evaluate_both(session, run))
            with Progress(config.steps, initial=run.iteration) as progress:
                voice.say = progress.print
                run, stopped = loop(session, run, progress, interrupt, profile_steps)
            voice.say = print
        checkpoints.wait()
        if stopped:
            name = signal.Signals(stopped).name
            print(f"stopped by {name} after iteration {run.iteration}, saved; go on with --resume")
            return Result(run.state.params, before, {}, watch.seconds, run.iteration, workspace, stopped)
        after = last_evaluation(session, run, before, found, workdir)
        with harmless("curves.png"):
            on_first(lambda: draw_curves(workdir))
        summarize(workspace, run, before, after, watch, time.perf_counter() - started)
        return Result(run.state.params, before, after, watch.seconds, run.iteration, workspace)
    except KeyboardInterrupt as stop:
        waits = False
        last = max(finished_steps(directory), default=None)
        said = "nothing is saved yet" if last is None else f"the last checkpoint is {directory}/{last}"
        raise KeyboardInterrupt(stop.args[0] if stop.args else signal.SIGINT, f"{said}; go on with --resume") from None
    finally:
        checkpoints.close(wait=waits)
        log.close()


def resumed(workspace: Workspace, tables: dict[str, Any], directory: str, workdir: str) -> tuple[Run, Restored]:
    """The latest whole checkpoint in ``directory`` (`restore`); ``ValueError`` for a config of another run."""
    other = from_first(lambda: kept.other_run(workspace.config, workdir))
    try:
        found = restore(workspace, tables, directory)
    except ValueError as error:
        if other:
            raise ValueError(f"{other}; {error}") from error
        raise
    if other:
        raise ValueError(other)
    return found


def check_writable(workdir: str, directory: str) -> None:
    """That no other process writes to the run directory, and that files can be made there.

    Raises:
      Locked, OSError: they cannot; the folder is named.
    """
    folder = Path(workdir)
    lock.check_free(folder)
    for where in (folder, *([] if "://" in directory else [Path(directory)])):
        there = next(part for part in (where.absolute(), *where.absolute().parents) if part.exists())
        if where.exists() and not where.is_dir():
            raise FileExistsError(f"{where} is a file, where a folder is to be")
        if not there.is_dir():
            raise NotADirectoryError(f"{where}: {there} is a file, where a folder is to be")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(
                f"{where}: {there} cannot be written to: choose another --workdir, or see to its rights"
            )


def same_config(workdir: str, config: ConfigDict) -> bool:
    """Whether the config that a run directory holds is this one, but for where it computes and what it reports."""
    held = read_object(Path(workdir) / "config.json")
    filled = ConfigDict(fill(config).to_dict())
    tie_temperature(filled)
    now = json.loads(json.dumps(filled.to_dict(), default=str))
    return config_hash(ConfigDict(held)) == config_hash(ConfigDict(now))


def check_memory(workspace: Workspace, shapes: dict[str, Any]) -> None:
    """That parameters, optimizer, references and the rollouts of a run fit, as far as shapes tell.

    Raises:
      ValueError: they do not; names sizes and fields.
    """
    memory.check_state(shapes)
    if not workspace.resolved.samples:
        return
    config, train = workspace.config, workspace.questions.train
    memory.check_rollout(
        workspace.model.config,
        *(config.rollout.prompts, train.tokens.shape[1], config.rollout.responses, config.sampling.max_new_tokens),
        shards=shard_count(workspace),
        beside=memory.bytes_of(shapes["params"]),
        note=(far := far_longer(workspace)) and f"; {far}",
    )


def check_profile(steps: int, left: int) -> None:
    """``ValueError`` for a profile of more iterations than are left after those that compile."""
    if steps < 0 or steps > max(left, 0):
        raise ValueError(
            f"--profile_steps={steps}: this run can trace at most {max(left, 0)} iterations, after {PROFILE_AFTER} "
            "that compile"
        )


def last_evaluation(
    session: Session, run: Run, before: Mapping[str, float], found: Restored | None, workdir: str
) -> Mapping[str, float]:
    """The evaluation at the end: read from the log if a resumed run had finished, that of the start if nothing was
    trained, measured otherwise."""
    if found and found.step == run.iteration:
        if after := from_first(lambda: read_evaluation(workdir, run.iteration)):
            print(f"this run has finished: all of its {run.iteration} iterations are done")
            return after
    return evaluate_both(session, run) if run.iteration else before


def open_run(
    workdir: str, workspace: Workspace, resume: bool, found: Restored | None, given: Mapping[str, Any], other_data: bool
) -> RunDirectory:
    """The run directory, with what it keeps (`jaxpo.runs.kept`); says what is about to run, and in which fields a run
    that is resumed differs from what it was. given: fields that name copies now, as they were given."""
    config = workspace.config
    begun, held = Path(workdir).is_dir() and any(Path(workdir).iterdir()), kept.held_config(workdir)
    resume_step = (found.step if found else BEFORE_ALL) if resume and begun else None
    for line in kept.told_differences(workdir, config) if found else ():
        print(f"WARNING: the run goes on with another config: {line}")
    wandb = {"project": config.logging.wandb_project} if config.logging.wandb_project else None
    log = RunDirectory(workdir, tensorboard=config.logging.tensorboard, wandb=wandb, resume_step=resume_step)
    saved = ConfigDict(config.to_dict())
    saved.update_from_flattened_dict(given)
    log.save_json("config.json", saved.to_dict())
    if (signed := trust.signature(saved.to_dict())) is not None:
        log.save_json(trust.SIGNATURE, signed)
    if found is None or held is None:
        kept.keep(log.path, config, workspace.tokenizer)
    if found is None or held is None or other_data:
        kept.keep_data(log.path, config)
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


def begin(session: Session, tables: dict[str, Any]) -> Run:
    """Parameters (random, loaded, or warm-started), references and protocol tables of a new run."""
    workspace, gatherer = session.workspace, session.gatherer
    params = first_params(workspace, session.keys["params"])
    if workspace.config.warm_start.steps:
        with session.watch.phase("warm start"):
            params = warm_start(workspace, params, session.log, report=session.watch.say)
    state = workspace.init_state(params)
    run = Run(state, first_references(workspace, state), pairs.started(workspace, params, tables))
    init = workspace.protocol.init
    return init(run, gatherer, session.keys["protocol"]) if init else run


def evaluate_both(session: Session, run: Run) -> dict[str, float]:
    """What `evaluated` says at the current iteration, and pass@k of a policy; logged."""
    workspace, config = session.workspace, session.workspace.config.evaluation
    with session.watch.phase("evaluate"):
        metrics, samples, pictured = evaluated(workspace, run)
        if config.pass_at and workspace.task.score and not is_reward_model(workspace.objective):
            key = jax.random.fold_in(session.keys["evaluate"], run.iteration)
            metrics |= answers.sampled(
                workspace, run.state.params, workspace.questions.test, key, samples=config.samples, ks=config.pass_at
            )
    session.log.write(run.iteration, metrics)
    session.log.samples(run.iteration, samples[: workspace.config.logging.samples])
    if pictured and is_first():
        session.log.save_json(RELIABILITY, {"iteration": run.iteration, **pictured})
        with harmless("reliability.png"):
            plot_reliability(pictured, session.log.path / f"{Path(RELIABILITY).stem}.png")
    return metrics


def read_evaluation(workdir: str, iteration: int) -> dict[str, float]:
    """The evaluation after an iteration, as an earlier part of a resumed run has logged it; {} if it has not."""
    metrics = read_metrics(workdir, lenient=True)
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
        workspace.questions.demonstrations(np.arange(len(workspace.questions.train)))
    best = config.checkpoint.keep_best
    known = pairs.measurable(workspace) if best == "eval/accuracy" else workspace.task.score is not None
    if best and not known:
        what = "held-out pairs" if best == "eval/accuracy" else "verifier"
        raise ValueError(f"config.checkpoint.keep_best {best!r}: this run has no {what} to judge checkpoints by")
    for path in config.soup.of:
        if find_checkpoint(path) is None:
            raise ValueError(f"config.soup.of {path!r} is no run directory with a checkpoint")
    if bool(config.soup.of) != ("soup" in workspace.resolved.references):
        raise ValueError(
            "config.soup.of names two runs exactly where an objective needs logp_soup, the log-probs of their average"
        )


def summarize(
    workspace: Workspace,
    run: Run,
    before: Mapping[str, float],
    after: Mapping[str, float],
    watch: Watch,
    seconds: float,
) -> None:
    """The closing tables: accuracy before and after, and where the time went."""

    def shown(metrics: Mapping[str, float], name: str) -> str:
        return (f"{metrics[name]:.3f}" if name in metrics else "") + (
            f" [{metrics[name + '_lo']:.3f}, {metrics[name + '_hi']:.3f}]" if name + "_lo" in metrics else ""
        )

    rewards = is_reward_model(workspace.objective)
    held = pairs.how_many(workspace) if rewards else f"{len(workspace.questions.test)} test prompts"
    names = ["eval/greedy", *[f"eval/pass@{k}" for k in workspace.config.evaluation.pass_at]]
    names = [name for name in (*names, *pairs.SHOWN) if name in {**before, **after}]
    if names:
        closing_table(
            f"{workspace.task.name}, {held}: before and after {run.iteration} iterations (95% intervals)",
            [(n.removeprefix("eval/"), shown(before, n), shown(after, n)) for n in names],
            columns=("", "before", "after"),
        )
    compiling = sum(c.seconds for c in workspace.programs.compiled)
    rest = seconds - sum(watch.seconds.values())
    rows = [*watch.seconds.items(), ("everything else", rest)]
    closing_table(
        f"{seconds:.0f} s in all, of which {compiling:.0f} s compiling",
        [(k, f"{v:.1f} s", f"{v / seconds:.0%}") for k, v in rows],
    )
