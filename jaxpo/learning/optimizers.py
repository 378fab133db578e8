"""Build optax optimizers from a config: optimizer, schedule and gradient clipping, one optimizer for each label."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import optax
from jax import Array

from jaxpo.arguments import FINITE, Count, Positive, Share, check, checked
from jaxpo.registry import check_arguments, unknown

OPTIMIZERS = tuple(
    n
    for n in (
        "adam",
        "adamw",
        "adafactor",
        "adagrad",
        "lamb",
        "lion",
        "muon",
        "nadamw",
        "novograd",
        "radam",
        "rmsprop",
        "sgd",
        "sophia",
        "yogi",
    )
    if hasattr(optax, n)
)


SHARES = ("b1", "b2", "b3", "decay", "decay_rate", "momentum")  # of optax: how much of a running mean stays


def constant(peak: float, steps: int, warmup_steps: Count = 0) -> optax.Schedule:
    """Linear warm-up from 0 over ``warmup_steps``, then constant."""
    return optax.warmup_constant_schedule(0.0, peak, warmup_steps) if warmup_steps else optax.constant_schedule(peak)


def cosine(peak: float, steps: int, warmup_steps: Count = 0, end_share: Share = 0.1) -> optax.Schedule:
    """Linear warm-up, then half a cosine down to ``end_share * peak`` at the last step."""
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup_steps else peak, peak, warmup_steps, max(steps, warmup_steps + 1), end_share * peak
    )


def linear(peak: float, steps: int, warmup_steps: Count = 0, end_share: Share = 0.0) -> optax.Schedule:
    """Linear warm-up, then a line down to ``end_share * peak`` at the last step."""
    down = optax.linear_schedule(peak, end_share * peak, max(steps - warmup_steps, 1))
    return (
        optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup_steps, 1)), down], [warmup_steps])
        if warmup_steps
        else down
    )


SCHEDULES = {f.__name__: checked(f, f"schedule {f.__name__}") for f in (constant, cosine, linear)}


def optimizer_arguments(name: str) -> Mapping[str, inspect.Parameter]:
    """Arguments of an optax optimizer besides the learning rate; ``ValueError`` for an unknown name."""
    if name not in OPTIMIZERS:
        raise ValueError(unknown("optimizer", name, OPTIMIZERS))
    parameters = inspect.signature(getattr(optax, name)).parameters
    # An argument that no config can hold (adafactor's dtype) keeps optax's default.
    plain = (bool, int, float, str, type(None))
    return {
        k: p
        for k, p in parameters.items()
        if k != "learning_rate" and (p.default is p.empty or isinstance(p.default, plain))
    }


def schedule_arguments(name: str) -> Mapping[str, inspect.Parameter]:
    """Arguments of a schedule besides its peak and length; ``ValueError`` for an unknown name."""
    if name not in SCHEDULES:
        raise ValueError(unknown("schedule", name, SCHEDULES))
    return {k: p for k, p in inspect.signature(SCHEDULES[name]).parameters.items() if k not in ("peak", "steps")}


def make_schedule(config: Mapping[str, Any], peak: float, steps: int) -> optax.Schedule:
    """Build a schedule.

    Args:
      config: ``name`` and arguments of one of ``SCHEDULES``.
      peak: the highest learning rate.
      steps: optimizer steps in the whole run.
    """
    arguments = {k: v for k, v in config.items() if k != "name"}
    check_arguments(f"schedule {config['name']!r}", arguments, schedule_arguments(config["name"]))
    return SCHEDULES[config["name"]](peak, steps, **arguments)


def by_label(rules: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformationExtraArgs:
    """Update each parameter by the rule of its label (`labels`).

    ``update`` takes ``active``, label -> bool: parameters with an inactive label do not change, and neither does the
    state of their rule.

    Args:
      rules: label -> rule. A single rule "policy" is returned as it is: it updates every parameter, and ignores
        ``active``.
    """
    if set(rules) == {"policy"}:
        return optax.with_extra_args_support(rules["policy"])
    idle = optax.transforms.conditionally_mask
    return optax.partition(
        {label: idle(rule, partial(_is_active, label), forward_extra_args=True) for label, rule in rules.items()},
        labels,
    )


def _is_active(label: str, step: Array, active: Mapping[str, Array], **_: Any) -> Array:
    return active[label]


def labels(params: Any) -> Any:
    """The label of each parameter: "critic" in the value head and in a critic of its own, "policy" in all else."""

    def label(path: tuple[Any, ...], _: Any) -> str:
        names = [getattr(key, "key", None) for key in path[:2]]
        return "critic" if names == ["heads", "value"] or names[0] == "critic" else "policy"

    return jax.tree_util.tree_map_with_path(label, params)


def make_optimizer(config: Mapping[str, Any], steps: int, field: str = "optimizer") -> optax.GradientTransformation:
    """Clip by global norm, then the named optimizer under its schedule.

    Args:
      config: ``name``, ``learning_rate``, ``clip_norm`` (None = off), ``schedule`` and any argument of the optax
        optimizer.
      steps: optimizer steps in the whole run.
      field: its field in the run's config, for messages.
    """
    own = {k: v for k, v in config.items() if k not in ("name", "learning_rate", "clip_norm", "schedule")}
    check_arguments(f"{field} {config['name']!r}", own, optimizer_arguments(config["name"]))
    for name, value in own.items():
        if isinstance(value, float) and not (value in FINITE and value >= 0 and (value < 1 or name not in SHARES)):
            share = " below 1" if name in SHARES else ""
            raise ValueError(f"{field}.{name} must be a finite number of at least 0{share}, not {value!r}")
    check(f"{field}.learning_rate", config["learning_rate"], Positive)
    check(f"{field}.clip_norm", config["clip_norm"], Positive | None)
    rule = getattr(optax, config["name"])(make_schedule(config["schedule"], config["learning_rate"], steps), **own)
    return rule if config["clip_norm"] is None else optax.chain(optax.clip_by_global_norm(config["clip_norm"]), rule)
