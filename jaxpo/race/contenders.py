"""Choose who races: objectives given by name or as values, and why the others cannot."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxpo import registry
from jaxpo.calls import parse_calls
from jaxpo.config.resolved import Resolved
from jaxpo.objectives import Objective, make
from jaxpo.race.rules import Rules, check_fit, resolved_by


class Contender(NamedTuple):
    """A contestant.

    label: what the table calls it.
    resolved: its run under the rules of the race.
    named: built from its label alone, so an earlier result under this label can be reused.
    """

    label: str
    resolved: Resolved
    named: bool = False


def fill(name: str, given: Mapping[str, Any], steps: int, max_new_tokens: int) -> dict[str, Any]:
    """Add to ``given`` the hyperparameters that are a share of a run's budget."""
    return {**registry.entry(name).of_run(max_new_tokens, steps, given), **given}


def with_protocol(protocol: str | None, objective: Objective) -> Objective:
    """Give the objective another protocol, such as ``judged`` or ``judged(pairs='random')``; None = keep its own.

    Raises:
      ValueError: no such protocol or argument, or an argument that the objective's hyperparameters set.
    """
    if protocol is None:
        return objective
    calls = parse_calls(protocol)
    if len(calls) != 1:
        raise ValueError(f"protocol: an objective has exactly one, found {protocol!r}")
    _, name, options = calls[0]
    registry.check_arguments(f"protocol {name!r}", options, registry.entry(name, "protocol").parameters)
    taken = objective.protocol.options if name == objective.protocol.name else {}
    if both := sorted(set(options) & set(taken)):
        raise ValueError(f"protocol {name!r}: {both[0]} is set by the objective's own {both[0]}")
    return objective._replace(protocol=objective.protocol._replace(name=name, options={**options, **taken}))


def named(text: str, rules: Rules, max_new_tokens: int) -> tuple[dict[str, Objective], dict[str, str]]:
    """Build the objectives that ``text`` names (`parse_calls`; ``all`` names every registered one).

    Returns the objectives by label; and those of ``all`` that cannot be built, with the reason.
    """
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
    """Select the contenders that can race; return them, and the others with the reason.

    Args:
      contenders: objectives by label; or a text that names registered ones, with the protocol among the arguments:
        ``dpo(protocol="judged(pairs='random')")``. ``all`` names every registered objective.

    Raises:
      ValueError: an unknown name or hyperparameter, a label given twice, or no contender left.
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
