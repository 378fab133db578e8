"""Resolve a config once at the start: fill it, build what it names, and check it."""

from ml_collections import ConfigDict

from jaxpo.config.blocks import arguments_of
from jaxpo.config.checks import check_fields, check_resolved
from jaxpo.config.fill import fill_blocks, fill_lora, fill_protocol, objective_of, protocol_name, tie_temperature
from jaxpo.config.pins import pin
from jaxpo.config.resolved import Resolved
from jaxpo.fields import given_by
from jaxpo.learning import references
from jaxpo.learning.needs import form_of, heads_of, references_of
from jaxpo.objectives import Objective
from jaxpo.protocols.protocol import Protocol
from jaxpo.registry import check_arguments, entry, make


def resolve(config: ConfigDict, devices: int, *, objective: Objective | None = None) -> Resolved:
    """Fill a config, build what it names, and check everything that can be wrong before anything is compiled.

    Args:
      config: the config, which is filled in place.
      devices: number of devices of the mesh.
      objective: an objective that is built already; the name in the config then serves for messages only.

    Raises:
      ValueError: names the field, its value, and valid values.
    """
    check_fields(config)
    fill_lora(config)
    tie_temperature(config)
    fill_blocks(config, but=() if objective is None else ("objective",))
    pin(config)
    objective = objective_of(config) if objective is None else objective
    name = protocol_name(config, objective)
    fill_protocol(config, objective)
    protocol, responses = protocol_of(config, objective, name), config.rollout.responses
    references.check(objective, protocol.facts.references)
    resolved = Resolved(
        config=config,
        objective=objective,
        protocol_name=name,
        protocol=protocol,
        references=tuple(references_of(objective, {*protocol.facts.provides, *given_by_task(config)})),
        heads=policy_heads(objective, config),
        form=form_of(objective, responses),
        rows_per_prompt=protocol.facts.rows(objective, responses) if protocol.facts.rows else responses,
    )
    if protocol.facts.check:
        protocol.facts.check(config)
    resolved.sampling()
    check_resolved(resolved, resolved.transformer(), devices)
    return resolved


def policy_heads(objective: Objective, config: ConfigDict) -> dict[str, tuple[int, ...]]:
    """The shapes of the heads on the policy, besides that of the vocabulary; a critic of its own has the value head."""
    wanted = heads_of(objective, config.heads)
    if config.critic.path is None:
        return wanted
    if "value" not in wanted:
        raise ValueError(f"config.critic.path has no effect: objective {config.objective.name!r} asks for no values")
    return {name: shape for name, shape in wanted.items() if name != "value"}


def given_by_task(config: ConfigDict) -> frozenset[str]:
    """The fields that rewards of answers give: those of the task, or the judge's."""
    return given_by("task") if config.task.name or config.judge.name != "verifier" else frozenset()


def protocol_of(config: ConfigDict, objective: Objective, name: str) -> Protocol:
    """Build the protocol of a filled config from the config's options and the options that the objective sets."""
    parameters = entry(name, "protocol").parameters
    taken = dict(objective.protocol.options) if name == objective.protocol.name else {}
    given = arguments_of(config.protocol, parameters)
    check_arguments(f"protocol {name!r}", given, parameters)
    protocol = make(name, "protocol", **{**given, **taken})
    return protocol.where(references={**objective.protocol.references, **protocol.facts.references})
