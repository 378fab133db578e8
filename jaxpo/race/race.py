"""A race: many objectives under one budget, from one warm start, over several seeds at once.

All seeds of an objective train in one compiled update (``vmap``); sampler, scorer and warm start are compiled once for
all objectives (`jaxpo.race.setup`). Seed i gives every objective the same start, prompts and uniforms, so that
differences are differences of the objectives. Those with a protocol of their own gather by it, seed after seed
(`jaxpo.race.seeds`); what they sample beyond the others is in the table. Those of preferences train on as many
rows of right and wrong answers (`jaxpo.race.pairs`), and most of them sample nothing; or, with
``protocol='judged'``, on the policy's own answers, which the task's verifier compares.

>>> race({"mine": my_objective, "grpo": make("grpo", beta=0.0)}, seeds=3).show()
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.special import stdtrit

from jaxpo import registry
from jaxpo.batch import Rollouts, logps, take
from jaxpo.fields import LOOP
from jaxpo.learning.needs import derived_needs
from jaxpo.learning.optimizers import make_optimizer
from jaxpo.learning.state import TrainState
from jaxpo.learning.step import optimizer_step, score
from jaxpo.objectives import Objective, make
from jaxpo.objectives.grammar.base import Gathering, check_rewards
from jaxpo.policy import heads, stats
from jaxpo.policy.transformer import Params
from jaxpo.race.pairs import race_form
from jaxpo.race.seeds import ByProtocol, Together, protocol_of, reads_data, shape
from jaxpo.race.setup import QUICK, Arena, Rules, build_arena, draws, parse_calls, survey
from jaxpo.storage.plots import COLORS, INK, PALE
from jaxpo.storage.rundir import Progress, closing_table, write_atomically

RESULTS, CURVES = "results.json", "curves.png"


# ---- who races


class Contender(NamedTuple):
    """An objective under its label. named: the label says all about it."""

    label: str
    objective: Objective
    named: bool = False


def fill(name: str, given: Mapping[str, Any], steps: int, max_new_tokens: int) -> dict[str, Any]:
    """``given``, and the hyperparameters that are a share of a run's budget."""
    return {**registry.entry(name).of_run(max_new_tokens, steps), **given}


def unfit(objective: Objective, rules: Rules) -> str:
    """Why a race cannot run the objective; "" if it can."""
    if asked := sorted(objective.asks.wants.intersection(heads.NAMES)):
        return f"trains a {asked[0]} head, which the policies of a race have not"
    try:
        protocol = protocol_of(objective)
        if reads_data(protocol):
            race_form(objective, rules)
        shape(objective, protocol, rules)
    except ValueError as error:
        return str(error)
    if protocol is None and not objective.asks.needs & {"reward", "correct"}:
        return "does not ask for rewards: it would imitate its own completions"
    given = LOOP - {"value_old"} | {f"logp_{name}" for name in (*objective.asks.derived, "ref")}
    if protocol:
        given |= protocol.provides | {"logp_prev", "logp_ema"}
    if lacking := sorted(objective.asks.needs - given):
        return (
            f"needs {', '.join(lacking)}, which neither the race nor its protocol {objective.protocol.name!r} provides"
        )
    return ""


def everybody(rules: Rules, max_new_tokens: int) -> tuple[list[Contender], dict[str, str]]:
    """All registered objectives that can be made without hyperparameters, and the others with the reason."""
    racing, left_out = [], {}
    for name in registry.names():
        try:
            objective = make(name, **fill(name, {}, rules.steps, max_new_tokens))
        except ValueError as error:
            left_out[name] = str(error)
            continue
        racing.append(Contender(name, objective, named=True))
    return racing, left_out


def by(protocol: str | None, objective: Objective) -> Objective:
    """The objective with another protocol, named as in ``judged`` or ``judged(pairs='random')``; None = its own.

    Raises:
      ValueError: no such protocol, an argument that it does not have, or one that the objective's hyperparameters set.
    """
    if protocol is None:
        return objective
    calls = parse_calls(protocol)
    if len(calls) != 1:
        raise ValueError(f"protocol: an objective has one, not {protocol!r}")
    _, name, options = calls[0]
    registry.check_arguments(f"protocol {name!r}", options, registry.entry(name, "protocol").parameters)
    taken = objective.protocol.options if name == objective.protocol.name else {}
    if both := sorted(set(options) & set(taken)):
        raise ValueError(f"protocol {name!r}: {both[0]} is set by the objective's own {both[0]}")
    return objective._replace(protocol=Gathering(name, {**options, **taken}))


def select(
    contenders: str | Mapping[str, Objective], rules: Rules, max_new_tokens: int
) -> tuple[list[Contender], dict[str, str]]:
    """Who races, and who does not with the reason.

    Args:
      contenders: objectives by label, or registered ones as `parse_calls` reads them, with the protocol among the
        arguments: ``dpo(protocol="judged(pairs='random')")``; ``all`` stands for every one.

    Raises:
      ValueError: an unknown name or hyperparameter, the same twice, or nobody left.
    """
    racing, left_out = [], {}
    if not isinstance(contenders, str):
        racing = [Contender(label, objective) for label, objective in contenders.items()]
    for label, name, given in parse_calls(contenders) if isinstance(contenders, str) else ():
        if label == "all":
            more, left_out = everybody(rules, max_new_tokens)
            racing += more
        else:
            protocol = given.pop("protocol", None)
            objective = make(name, **fill(name, given, rules.steps, max_new_tokens))
            racing.append(Contender(label, by(protocol, objective), named=True))
    labels = [c.label for c in racing]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"objectives: {twice[0]!r} is given twice")
    reasons = {c.label: unfit(c.objective, rules) for c in racing}
    left_out |= {label: why for label, why in reasons.items() if why}
    racing = [c for c in racing if not reasons[c.label]]
    if not racing:
        raise ValueError("objectives: none can race; " + "; ".join(f"{k}: {v}" for k, v in left_out.items()))
    return racing, left_out


# ---- one contender


def start_state(objective: Objective, arena: Arena, rules: Rules) -> TrainState:
    """The state of all seeds at the start."""
    memory = jax.tree.map(lambda x: jnp.broadcast_to(x, (rules.seeds, *jnp.shape(x))), objective.init())
    return TrainState(arena.start, jax.vmap(optimizer_of(rules).init)(arena.start), memory)


def optimizer_of(rules: Rules) -> optax.GradientTransformation:
    """The optimizer of every contender."""
    adam = dict(name="adam", learning_rate=rules.learning_rate, clip_norm=1.0, schedule=dict(name="constant"))
    return make_optimizer(adam, rules.steps * rules.epochs * rules.minibatches)


def make_update(objective: Objective, arena: Arena, rules: Rules, watchful: bool) -> Callable[..., Any]:
    """``(state, batch, rows) -> (state, steps skipped, path)``: the optimizer steps of an iteration, of all seeds.
    path: parameters after each step [S, steps, ...]; None if nobody is ``watchful``."""
    model, derived = arena.where.model, objective.asks.derived
    apply = stats.policy_of(model, wants=objective.asks.wants | {"entropy"}, derived=derived)
    look = stats.policy_of(model, wants=objective.asks.peeks | {"logp", "entropy"}, derived=derived)
    recalled = derived_needs(objective)
    recall = stats.policy_of(model, wants=recalled | {"logp"}, derived=derived)
    optimizer = optimizer_of(rules)

    def iteration(state: TrainState, batch: Rollouts, rows: Array) -> tuple[TrainState, Array, Params | None]:
        if recalled:
            batch = batch.with_token(**logps(score(recall, state.params, batch).derived))
        batch, memory = objective.prepare(batch, state.objective)

        def step(state: TrainState, rows: Array) -> tuple[TrainState, tuple[Array, Params | None]]:
            part = take(batch, rows, shared_prompt=rules.responses)
            before = state.params, state.opt_state, state.objective
            *new, out = optimizer_step(objective, apply, optimizer, *before, part, look=look)
            return TrainState(*new), (out["step/nonfinite"], new[0] if watchful else None)

        state, (skipped, path) = lax.scan(step, state.replace(objective=memory), rows)
        return state, skipped.sum(), path

    return jax.jit(jax.vmap(iteration), compiler_options=QUICK)


def run(contender: Contender, arena: Arena, rules: Rules, progress: Callable[[dict[str, float]], None]) -> dict:
    """Train all seeds of one contender; what `Results.objectives` holds of it."""
    objective, began = contender.objective, time.perf_counter()
    protocol = protocol_of(objective)
    rules = shape(objective, protocol, rules)
    # What is trained on: of a judge's prompts perhaps fewer rows than were sampled.
    rows = replace(rules, responses=protocol.rows(objective, rules.responses)) if protocol and protocol.rows else rules
    state = start_state(objective, arena, rows)
    gather = ByProtocol(objective, protocol, arena, rules, state) if protocol else Together(arena, rules)
    update = make_update(objective, arena, rows, gather.watchful)
    curve, compiling, skipped = [], 0.0, jnp.zeros(rules.seeds)
    for i in range(rules.steps + 1):
        if i in rules.points:
            curve.append(arena.accuracy(state.params).tolist())
        if i == rules.steps:
            break
        random = draws(rows, len(arena.where.train), i)
        state, batch = gather.collect(state, random)
        check_rewards(objective.asks.rewards, batch)
        if i == 0:
            compile_began = time.perf_counter()
            update = update.lower(state, batch, random.rows).compile()
            compiling = time.perf_counter() - compile_began
        state, nonfinite, path = update(state, batch, random.rows)
        state = gather.after(state, batch, path)
        skipped += nonfinite
        rewarded = {} if batch.reward is None else {"reward": float(batch.reward.mean())}
        progress({"accuracy": float(np.mean(curve[-1])), **rewarded})
    points = np.asarray(rules.points)
    area = np.trapezoid(curve, points, axis=0) / points[-1]
    return dict(
        final=curve[-1],
        area=area.tolist(),
        curve=curve,
        seconds=time.perf_counter() - began,
        compiling=compiling,
        sampled=gather.sampled / (rules.seeds * rules.steps),
        skipped=int(skipped.sum()),
        idle=gather.idle,
    )


# ---- what comes of it


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean over seeds and its 95% interval by Student's t, inside [0, 1]; NaN bounds for one seed."""
    x, n = np.asarray(values, np.float64), len(values)
    half = stdtrit(n - 1, 0.975) * x.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    low, high = (float(np.clip(x.mean() + sign * half, 0, 1)) for sign in (-1, 1))
    return float(x.mean()), low, high


@dataclass(frozen=True)
class Results:
    """What a race came to, as ``results.json`` holds it.

    rules: its `Rules`. points: iterations at which accuracy was measured. warm_start_seconds: shared by all.
    objectives: label -> final, area: greedy accuracy at the end and its mean over the course (area under the learning
      curve), one number a seed; curve [points][seeds]; seconds, compiling (part of seconds); sampled: completions of a
      seed in an iteration; skipped: optimizer steps that were not finite; idle: iterations of a seed in which its
      protocol found nothing to train on.
    left_out: label -> why it did not race.
    """

    rules: dict[str, Any]
    points: list[int]
    warm_start_seconds: float = 0.0
    objectives: dict[str, dict[str, Any]] = None
    left_out: dict[str, str] = None

    def ranking(self) -> list[str]:
        """Labels, the best mean final accuracy first, then the larger area."""
        means = {k: (np.mean(r["final"]), np.mean(r["area"])) for k, r in self.objectives.items()}
        return sorted(means, key=lambda label: means[label], reverse=True)

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table."""
        out = []
        for label in self.ranking():
            result = self.objectives[label]
            cells = []
            for mean, low, high in (interval(result["final"]), interval(result["area"])):
                cells += [f"{mean:.3f}", "–" if math.isnan(low) else f"{low:.2f}–{high:.2f}"]
            more = f"{result['sampled']:.0f}", f"{result['seconds']:.0f}"
            out.append((label, *cells, *more))
        return out

    def show(self) -> None:
        """Print the table, what was lost, and who did not race. samples: completions of a seed in an iteration."""
        rules, start = self.rules, interval(next(iter(self.objectives.values()))["curve"][0])[0]
        closing_table(
            f"{rules['task']}: greedy accuracy after {rules['steps']} iterations, {rules['seeds']} seeds, "
            f"from {start:.3f} (95% intervals over seeds)",
            self.rows(),
            columns=("objective", "final", "95%", "area", "95%", "samples", "s"),
        )
        for label, result in self.objectives.items():
            if result["skipped"]:
                print(f"{label}: {result['skipped']} optimizer steps were not finite and were skipped")
            if result["idle"]:
                print(f"{label}: its protocol found nothing to train on in {result['idle']} iterations (of all seeds)")
        for label, why in self.left_out.items():
            print(f"{label} did not race: {why}")

    def figure(self) -> Figure:
        """Small multiples in the order of the ranking: each objective's mean and range over seeds, all others grey."""
        labels = self.ranking()
        columns = min(6, math.ceil(math.sqrt(len(labels))))
        rows = -(-len(labels) // columns)
        figure = Figure(
            figsize=(2.3 * columns + 0.6, 1.9 * rows + 0.5), dpi=110, facecolor="white", layout="constrained"
        )
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        means = {label: np.mean(self.objectives[label]["curve"], axis=1) for label in labels}
        for axes, label in zip(grid, labels, strict=False):
            self._panel(axes, label, means)
        for axes in grid[len(labels) :]:
            axes.set_visible(False)
        for axes in grid[max(len(labels) - columns, 0) : len(labels)]:  # the lowest of each column
            axes.tick_params(labelbottom=True)
        figure.supxlabel("iteration", fontsize=8.5, color=PALE)
        figure.supylabel("greedy accuracy", fontsize=8.5, color=PALE)
        return figure

    def _panel(self, axes: Axes, label: str, means: Mapping[str, np.ndarray]) -> None:
        for mean in means.values():
            axes.plot(self.points, mean, color="#d9d9d9", linewidth=0.7)
        curve, color = np.asarray(self.objectives[label]["curve"]), COLORS[0]
        axes.fill_between(self.points, curve.min(1), curve.max(1), color=color, alpha=0.18, linewidth=0)
        axes.plot(self.points, means[label], color=color, linewidth=1.8)
        title = label if len(label) <= 30 else label[:29] + "…"
        axes.set_title(f"{title}  {means[label][-1]:.2f}", loc="left", fontsize=8, color=INK)
        axes.set_ylim(0, 1)
        axes.margins(x=0.02)
        axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#bdbdbd")
        axes.tick_params(which="both", colors=PALE, labelcolor="#5c5c5c", labelsize=7, length=0)

    def save(self, folder: str | os.PathLike) -> None:
        """Write ``results.json`` and ``curves.png``; readers see the old files or the new ones."""
        text = json.dumps(asdict(self), indent=1)
        write_atomically(Path(folder) / RESULTS, lambda file: file.write(text.encode()))
        write_atomically(Path(folder) / CURVES, lambda file: self.figure().savefig(file, format="png"))


def earlier(folder: Path, rules: Rules) -> Results | None:
    """The results in ``folder``, None if there are none.

    Raises:
      ValueError: they are of a race with other rules; the first that differs is named.
    """
    if not (folder / RESULTS).is_file():
        return None
    found = Results(**json.loads((folder / RESULTS).read_text()))
    for name, value in asdict(rules).items():
        if found.rules.get(name) != value:
            raise ValueError(
                f"{folder / RESULTS} is of a race with {name}={found.rules.get(name)}, and this one has "
                f"{name}={value}: take the same or another folder"
            )
    return found


def race(
    contenders: str | Mapping[str, Objective],
    rules: Rules | None = None,
    *,
    out: str | os.PathLike | None = None,
    **changes: Any,
) -> Results:
    """Race objectives and return the `Results`.

    Args:
      contenders: label -> objective; or registered ones by name, ``"grpo,grpo(eps_high=0.3)"``, ``"all"``.
        Hyperparameters that are a share of a run's budget are filled in for those given by name.
      rules: what all get alike. changes: fields of it, as in ``race(..., seeds=3)``.
      out: folder for ``results.json`` and ``curves.png``, written after each objective. What it already holds of a race
        with the same rules is kept, and contenders given by name that it holds are not run again.

    Raises:
      ValueError: unknown names (with the nearest), rules that cannot be, or a folder with a race by other rules.
    """
    known = [f.name for f in fields(Rules)]
    if odd := sorted(set(changes) - set(known)):
        raise ValueError(registry.unknown("rule of a race", odd[0], known))
    rules = replace(rules or Rules(), **changes)
    racing, left_out = select(contenders, rules, survey(rules).max_new_tokens)
    held = earlier(Path(out), rules) if out else None
    results = held or Results(asdict(rules), rules.points, objectives={}, left_out={})
    results.left_out.update(left_out)
    todo = [c for c in racing if not (c.named and c.label in results.objectives)]
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
    if not todo:
        return results
    with Progress(
        len(todo) * rules.steps, metrics={"accuracy": "accuracy", "reward": "reward"}, every=rules.steps
    ) as bar:
        arena = build_arena(rules)
        results = replace(results, warm_start_seconds=arena.seconds)
        for contender in todo:
            result = run(contender, arena, rules, bar.update)
            results.objectives[contender.label] = result
            bar.print(f"{contender.label}: {interval(result['final'])[0]:.3f} in {result['seconds']:.1f} s")
            if out:
                results.save(out)
    return results
