"""A race: many objectives under one budget, from one warm start, over several seeds at once.

All seeds of an objective take their optimizer steps in one compiled function (``vmap``); samplers, scorers and warm
start are compiled once for all objectives (`jaxpo.race.setup`). Seed i gives every objective the same start, prompts
and random numbers, so results differ only because the objectives do. An objective with its own protocol gathers rows
by it, one seed after the other (`jaxpo.race.seeds`); the table shows how much it samples. Preference objectives train
on the same number of rows, of right and wrong answers, and most of them sample nothing; with ``protocol='judged'`` they
train on the policy's own answers, which the task's verifier compares.

>>> race({"mine": my_objective, "grpo": make("grpo", beta=0.0)}, seeds=3).show()
"""

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np

from jaxpo import registry
from jaxpo.objectives import Objective
from jaxpo.parallel.host import open_devices
from jaxpo.race.contenders import Contender, select
from jaxpo.race.results import Results, earlier, interval
from jaxpo.race.rules import Rules
from jaxpo.race.seeds import contest
from jaxpo.race.setup import Setup, check_seeds, draws, make_course, set_up
from jaxpo.storage import lock
from jaxpo.storage.paths import local
from jaxpo.storage.rundir import Progress


def run(contender: Contender, setup: Setup, rules: Rules, progress: Callable[[dict[str, float]], None]) -> dict:
    """Train all seeds of one contender; return its entry in `Results.objectives`."""
    resolved, began = contender.resolved, time.perf_counter()
    rollout = resolved.config.rollout
    rules = replace(rules, prompts=rollout.prompts, responses=rollout.responses)
    # The rows to train on: with a judge, perhaps fewer for each prompt than were sampled.
    rows = replace(rules, responses=resolved.rows_per_prompt)
    seeds = contest(resolved, setup, rules)
    curve, compiling, skipped = [], 0.0, 0
    for i in range(rules.steps + 1):
        if i in rules.points:
            curve.append(setup.accuracy(seeds.params).tolist())
        if i == rules.steps:
            break
        first = time.perf_counter()
        nonfinite, reward = seeds.iterate(draws(rows, len(setup.course.questions.train), i))
        compiling = time.perf_counter() - first if i == 0 else compiling
        skipped += nonfinite
        rewarded = {} if reward is None else {"reward": reward}
        progress({"accuracy": float(np.mean(curve[-1])), **rewarded})
    points = np.asarray(rules.points)
    area = np.trapezoid(curve, points, axis=0) / points[-1]
    return dict(
        final=curve[-1],
        area=area.tolist(),
        curve=curve,
        seconds=time.perf_counter() - began,
        compiling=compiling,
        sampled=seeds.sampled / (rules.seeds * rules.steps),
        skipped=skipped,
        idle=seeds.idle,
    )


def race(
    contenders: str | Mapping[str, Objective],
    rules: Rules | None = None,
    *,
    out: str | os.PathLike | None = None,
    **changes: Any,
) -> Results:
    """Race objectives and return the `Results`.

    Args:
      contenders: label -> objective; or a text that names registered ones, ``"grpo,grpo(eps_high=0.3)"``, ``"all"``.
        For those given by name, hyperparameters that are a share of a run's budget are filled in.
      rules: the same for all contenders.
      out: folder for ``results.json`` and ``curves.png``, written after each objective. Results that it already holds
        from a race with the same rules are kept; contenders given by name that it holds are not run again.
      **changes: fields of ``rules`` to change, as in ``race(..., seeds=3)``.

    Raises:
      ValueError: unknown names (with the nearest), rules that are not possible or need more memory than there is, or a
        folder with a race by other rules.
      OSError: another race writes to the folder, or it is a file.
    """
    known = [f.name for f in fields(Rules)]
    if odd := sorted(set(changes) - set(known)):
        raise ValueError(registry.unknown("rule of a race", odd[0], known))
    rules = replace(rules or Rules(), **changes)
    open_devices()
    out = local(out, "out") if out else None
    if out and out.exists() and not out.is_dir():
        raise FileExistsError(f"out: {out} is a file")
    if out and out.is_dir():
        lock.check_free(out)
    course = make_course(rules)
    check_seeds(course, rules)
    racing, left_out = select(contenders, rules, course.questions.width)
    held = earlier(out, rules) if out else None
    results = held or Results(asdict(rules), rules.points, objectives={}, left_out={})
    results.left_out.update(left_out)
    todo = [c for c in racing if not (c.named and c.label in results.objectives)]
    if out:
        out.mkdir(parents=True, exist_ok=True)
    if not todo:
        return results
    with (
        lock.held(out) if out else contextlib.nullcontext(),
        Progress(
            len(todo) * rules.steps, metrics={"accuracy": "accuracy", "reward": "reward"}, every=rules.steps
        ) as bar,
    ):
        setup = set_up(rules)
        results = replace(results, warm_start_seconds=setup.seconds)
        for contender in todo:
            result = run(contender, setup, rules, bar.update)
            results.objectives[contender.label] = result
            bar.print(f"{contender.label}: {interval(result['final'])[0]:.3f} in {result['seconds']:.1f} s")
            if out:
                results.save(out)
    return results
