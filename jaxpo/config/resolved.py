"""What a config says, resolved once: its objective and protocol as they were built, and all that follows from them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from jaxpo.config.blocks import arguments_of
from jaxpo.learning.needs import Form, models_of
from jaxpo.objectives import Objective
from jaxpo.policy.config import TransformerConfig
from jaxpo.protocols.protocol import Protocol
from jaxpo.registry import check_arguments, entry, make
from jaxpo.rollout.sampling import SamplingOptions
from jaxpo.rollout.sampling import validate as validate_sampling
from jaxpo.text.tokenizers import Tokenizer


@dataclass(frozen=True)
class Resolved:
    """A config, and what it names: made once by `resolve` and handed down.

    config: every field, filled.
    objective: what is minimized.
    protocol_name: id of the protocol.
    protocol: how data is gathered.
    references: frozen models that the objective needs to score a batch.
    heads: shapes of the heads that the objective asks for, besides that of the vocabulary.
    form: in which form the objective takes preferences; None = it takes none.
    rows_per_prompt: rows that an iteration trains on for each of its prompts (or units of data).
    """

    config: ConfigDict
    objective: Objective
    protocol_name: str
    protocol: Protocol
    references: tuple[str, ...]
    heads: dict[str, tuple[int, ...]]
    form: Form | None
    rows_per_prompt: int

    @property
    def models(self) -> list[str]:
        """Models beside the policy that the objective needs; none of them is a copy of it."""
        return models_of(self.objective, self.references)

    @property
    def rows(self) -> int:
        """Rows that an iteration trains on."""
        return self.config.rollout.prompts * self.rows_per_prompt

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of an iteration."""
        return self.config.training.epochs * self.config.training.minibatches

    @property
    def microbatch_rows(self) -> int:
        """Rows of a microbatch."""
        return self.rows // (self.config.training.minibatches * self.config.training.microbatches)

    @property
    def samples(self) -> bool:
        """Whether an iteration generates: all do, but those that take every answer from preference data."""
        config = self.config
        if config.data.name is None or self.protocol_name != "preference_data":
            return True
        return config.protocol.get("rejected") == "policy" or "own" in self.objective.unit.layout

    def transformer(self, vocab_size: int = 1) -> TransformerConfig:
        """The policy's shape; ``vocab_size`` is that of one made here, a pretrained one has its own."""
        return made(self.config.policy, "policy")(vocab_size)

    def tokenizer(self, texts: Callable[[], Iterable[str]]) -> Tokenizer:
        """The tokenizer that the config names; ``texts`` of the run are asked for if it depends on them."""
        return made(self.config.tokenizer, "tokenizer")(texts)

    def sampling(self, eos_ids: Sequence[int] = (), stop_table: Any = None) -> SamplingOptions:
        """The sampling options of the run."""
        return sampling_of(self.config, eos_ids, stop_table)


def made(block: ConfigDict, kind: str) -> Any:
    """What a filled block names, made with its arguments."""
    parameters = entry(block.name, kind).parameters
    fields = arguments_of(block, parameters)
    check_arguments(f"{kind} {block.name!r}", fields, parameters)
    return make(block.name, kind, **fields)


def sampling_of(config: ConfigDict, eos_ids: Sequence[int] = (), stop_table: Any = None) -> SamplingOptions:
    """The validated `SamplingOptions` of a filled config."""
    fields = {k: v for k, v in config.sampling.items() if k != "stop"}
    return validate_sampling(SamplingOptions(**fields, eos_ids=tuple(eos_ids), stop_table=stop_table))
