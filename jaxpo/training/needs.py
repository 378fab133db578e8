"""What an objective asks the loop for: fields of its batches, frozen companions, heads of the policy."""

import jax

from jaxpo.batch import MissingField, Rollouts
from jaxpo.objectives import Objective, Protocol, State
from jaxpo.policy import heads

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
SLOTS = ("ref",)


def slots_of(objective: Objective, protocol: Protocol) -> list[str]:
    """Frozen companions that the objective needs (``ref`` = the policy at the start of the run).

    Raises:
      ValueError: it needs something that neither this loop nor its protocol provides; the message says what they do.
    """
    provided = PROVIDED | {f"logp_{name}" for name in objective.derived} | protocol.provides
    wanted = sorted(n[len("logp_") :] for n in objective.needs - provided if n.startswith("logp_"))
    other = sorted(n for n in objective.needs - provided if not n.startswith("logp_")) + [
        f"logp_{s}" for s in wanted if s not in SLOTS
    ]
    if other:
        raise ValueError(
            f"the objective needs {', '.join(other)}; the training loop provides "
            f"{', '.join(sorted(provided))} and {', '.join(f'logp_{s}' for s in SLOTS)}"
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
