"""Who races: objectives by name or as built, and why the others do not."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxpo import registry
from jaxpo.calls import parse_calls
from jaxpo.config.resolved import Resolved
from jaxpo.objectives import Objective, make
from jaxpo.objectives.grammar.base import Gathering
from jaxpo.race.rules import Rules, check_fit, resolved_by


class Contender(NamedTuple):
    """A contestant.

    label: what the table calls it.
    resolved: its run by the rules of the race.
    named: built from its label alone, so an earlier result under this label can be reused.
    """

    label: str
    resolved: Resolved
    named: bool = False


def fill(name: str, given: Mapping[str, Any], steps: int, max_new_tokens: int) -> dict[str, Any]:
    """``given``, and the hyperparameters that are a share of a run's budget."""
    return {**registry.entry(name).of_run(max_new_tokens, steps, given), **given}


def with_protocol(protocol: str | None, objective: Objective) -> Objective:
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


def named(text: str, rules: Rules, max_new_tokens: int) -> tuple[dict[str, Objective], dict[str, str]]:
    """Registered objectives by label, as `parse_calls` reads them, ``all`` for every one; and those that cannot be
    made, with the reason."""
    found: dict[str, Objective] = {}
    left_out: dict[str, str] = {}
    for label, name, given in parse_calls(text):
        if label == "all":
            for every in registry.names():
                try:
                    found[every] = make(every, **fill(every, {}, rules.steps, max_new_tokens))
                except ValueError as error:
                    left_out[every] = str(error)
            continue
        if label in found:
            raise ValueError(f"objectives: {label!r} is given twice")
        protocol = given.pop("protocol", None)
        objective = make(name, **fill(name, given, rules.steps, max_new_tokens))
        found[label] = with_protocol(protocol, objective)
    return found, left_out


def select(
    contenders: str | Mapping[str, Objective], rules: Rules, max_new_tokens: int
) -> tuple[list[Contender], dict[str, str]]:
    """Who races, and who does not with the reason.

    Args:
      contenders: objectives by label, or registered ones by name, with the protocol among the arguments:
        ``dpo(protocol="judged(pairs='random')")``; ``all`` stands for every one.

    Raises:
      ValueError: an unknown name or hyperparameter, the same twice, or nobody left.
    """
    by_name = isinstance(contenders, str)
    objectives, left_out = named(contenders, rules, max_new_tokens) if by_name else (dict(contenders), {})
    racing = []
    for label, objective in objectives.items():
        try:
            resolved = resolved_by(rules, label, objective, max_new_tokens)
            check_fit(resolved)
        except ValueError as error:
            left_out[label] = str(error)
            continue
        racing.append(Contender(label, resolved, named=by_name))
    if not racing:
        raise ValueError("objectives: none can race; " + "; ".join(f"{k}: {v}" for k, v in left_out.items()))
    return racing, left_out
