"""What an objective asks the loop for: fields of its batches, frozen companions, heads of the policy, preferences."""

from typing import NamedTuple

import jax

from jaxpo.batch import MissingField, Rollouts
from jaxpo.objectives import Objective, Protocol, State
from jaxpo.policy import heads
from jaxpo.tasks.preferences import NUMBERS, PAIR
from jaxpo.training.companions import COMPANIONS

PROVIDED = frozenset(
    {
        "reward",
        "correct",
        "truncated",
        "group",
        "role",
        "prompt",
        "seed",
        "count",
        "mask",
        "tokens",
        "logp_old",
        "logp_beh",
        "entropy_old",
        "value_old",
    }
)
# Fields that come from data, or from a judge of the policy's own answers.
JUDGED = frozenset({*NUMBERS, "label", "pref_opp"})


class Form(NamedTuple):
    """In which form an objective takes preferences.

    kind: of rows (`jaxpo.tasks.preferences.KINDS`). layout: roles of a unit; () = answers as they are. numbers: that
    each answer must have. size: rows of a unit. mismatched: half of them are other prompts' answers (KTO).
    """

    kind: str
    layout: tuple[str, ...]
    numbers: tuple[str, ...]
    size: int
    mismatched: bool = False

    @property
    def given(self) -> tuple[str, ...]:
        """The roles of a unit that data have; the policy samples the others."""
        return tuple(role for role in self.layout if role != "own")


def form_of(objective: Objective, responses: int) -> Form | None:
    """The form in which the objective takes preferences; None if it takes none. ``responses``: scored answers a
    prompt."""
    numbers = tuple(sorted(objective.needs & {*NUMBERS, "label", "reward"}))
    if objective.layout:
        known = set(PAIR) <= set(objective.layout)
        return Form("pair", objective.layout, numbers, len(objective.layout)) if known else None
    if "label" in objective.needs:
        mismatched = "role" in objective.needs
        return Form("label", (), numbers, 1 + mismatched, mismatched)
    if {"reward", "group"} <= objective.needs:
        return Form("scored", (), numbers, responses)
    return None


def slots_of(objective: Objective, protocol: Protocol) -> list[str]:
    """Frozen companions whose log-probs the objective needs (``ref`` = the policy at the start of the run).

    Raises:
      ValueError: it needs something that neither this loop nor its protocol provides; the message says what they do.
    """
    provided = PROVIDED | {f"logp_{name}" for name in objective.derived} | protocol.provides
    wanted = sorted(n[len("logp_") :] for n in objective.needs - provided if n.startswith("logp_"))
    other = sorted(n for n in objective.needs - provided if not n.startswith("logp_")) + [
        f"logp_{s}" for s in wanted if s not in COMPANIONS
    ]
    if other:
        raise ValueError(
            f"the objective needs {', '.join(other)}; the training loop provides "
            f"{', '.join(sorted(provided))} and {', '.join(f'logp_{s}' for s in COMPANIONS)}"
        )
    return wanted


def must_score(objective: Objective, batch: Rollouts, state: State) -> bool:
    """Whether ``prepare`` or ``weigh`` read what only a scoring pass gives. If they do not, the first optimizer step
    is its own old policy."""
    if objective.peeks:
        return True
    try:
        jax.eval_shape(lambda b, s: objective.weigh(*objective.prepare(b, s), None), batch, state)
    except MissingField as missing:
        if missing.field not in (
            "logp_old",
            "entropy_old",
            "value_old",
            *(f"logp_{name}" for name in objective.derived),
        ):
            raise
        return True
    return False


def derived_needs(objective: Objective) -> frozenset[str]:
    """Derived statistics that the objective needs of the old policy, as ``logp_<name>``; "value", as ``value_old``."""
    derived = frozenset(name for name in objective.derived if f"logp_{name}" in objective.needs)
    return derived | ({"value"} if "value_old" in objective.needs else set())


def heads_of(objective: Objective) -> tuple[str, ...]:
    """The heads besides that of the vocabulary that the objective asks for."""
    asked = objective.wants | objective.peeks | derived_needs(objective)
    return tuple(name for name in heads.NAMES if name in asked)
