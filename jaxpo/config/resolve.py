"""What a filled config names: its objective, protocol, policy and sampling options."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxpo import protocols, registry  # noqa: F401 (protocols: for its registrations)
from jaxpo.config.blocks import arguments_of, policy_arguments
from jaxpo.fields import JUDGED
from jaxpo.objectives import Objective, make
from jaxpo.policy.config import TransformerConfig
from jaxpo.policy.families import config_from_hf
from jaxpo.policy.hf import read_config
from jaxpo.protocols.protocol import Protocol
from jaxpo.rollout.sampling import SamplingOptions
from jaxpo.rollout.sampling import validate as validate_sampling


def protocol_name(config: ConfigDict, objective: Objective) -> str:
    """The protocol that the config names, or the objective; otherwise preferences come from ``config.data``, or from
    a judge if the objective cannot do without."""
    if config.protocol.name or objective.protocol.name != "on_policy":
        return config.protocol.name or objective.protocol.name
    if config.data.name:
        return "preference_data"
    return "judged" if objective.unit.layout or objective.asks.needs & JUDGED else "on_policy"


def protocol_of(config: ConfigDict) -> Protocol:
    """The protocol of a filled config: its own options, and those that the objective sets."""
    objective = objective_of(config)
    name = protocol_name(config, objective)
    parameters = registry.entry(name, "protocol").parameters
    taken = dict(objective.protocol.options) if name == objective.protocol.name else {}
    given = arguments_of(config.protocol, parameters)
    registry.check_arguments(f"protocol {name!r}", given, parameters)
    return make(name, "protocol", **{**given, **taken})


def objective_of(config: ConfigDict) -> Objective:
    """The objective that the config names."""
    return make(
        config.objective.name, **arguments_of(config.objective, registry.entry(config.objective.name).parameters)
    )


def transformer_of(config: ConfigDict, vocab_size: int = 1) -> TransformerConfig:
    """The policy of a filled config; ``vocab_size`` is that of one made here, a pretrained one has its own."""
    parameters = policy_arguments(config.policy.name)
    fields = arguments_of(config.policy, parameters)
    registry.check_arguments(f"policy {config.policy.name!r}", fields, parameters)
    if config.policy.name == "pretrained":
        return config_from_hf(read_config(fields.pop("path")), **fields)
    return TransformerConfig(vocab_size=vocab_size, **fields)


def sampling_of(config: ConfigDict, eos_ids: Sequence[int] = (), stop_table: Any = None) -> SamplingOptions:
    """The validated `SamplingOptions` of a run."""
    fields = {k: v for k, v in config.sampling.items() if k != "stop"}
    return validate_sampling(SamplingOptions(**fields, eos_ids=tuple(eos_ids), stop_table=stop_table))


def rows_per_prompt(config: ConfigDict, objective: Objective) -> int:
    """Rows that an iteration trains on for each of its prompts (or units of data)."""
    responses, protocol = config.rollout.responses, protocol_of(config)
    return protocol.rows(objective, responses) if protocol.rows else responses


def microbatch_rows(config: ConfigDict) -> int:
    """Rows of a microbatch."""
    training, of_prompt = config.training, rows_per_prompt(config, objective_of(config))
    return config.rollout.prompts * of_prompt // (training.minibatches * training.microbatches)
