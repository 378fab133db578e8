"""The contracts that every objective must keep, one function each; `check` runs them all.

>>> jaxpo.testing.check("grpo", eps_high=0.28)     # a registered objective
>>> jaxpo.testing.check(my_objective)              # an `Objective`, or a function that builds one

A contract takes a `Case` (an objective with a small example batch). It raises ``AssertionError`` with the numbers if it
is broken, and returns one line about what it compared. ``padding_invariance(case("grpo"))`` runs a single one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxpo.batch import Rollouts
from jaxpo.testing.cases import Case, NotChecked, Outcome, Subject, case, direct, same, train
from jaxpo.testing.contracts import (
    CONTRACTS,
    bad_numbers_are_refused,
    count_is_multiplicity,
    documented,
    evaluate_agrees_with_training,
    finite_on_hostile_input,
    float32_accumulation,
    float32_agrees_with_float64,
    gradient_only_into_the_policy,
    independent_replicas,
    jit_equals_eager,
    masked_positions_get_no_gradient,
    mesh_invariance,
    microbatch_invariance,
    needs_is_exact,
    padding_invariance,
    permutation_equivariance,
    state_survives_a_checkpoint,
    vmap_over_hyperparameters,
)
from jaxpo.testing.examples import bigram, example, parameters

__all__ = [
    "CONTRACTS",
    "Case",
    "NotChecked",
    "Outcome",
    "Report",
    "Subject",
    "bad_numbers_are_refused",
    "bigram",
    "case",
    "check",
    "count_is_multiplicity",
    "direct",
    "documented",
    "evaluate_agrees_with_training",
    "example",
    "finite_on_hostile_input",
    "float32_accumulation",
    "float32_agrees_with_float64",
    "gradient_only_into_the_policy",
    "independent_replicas",
    "jit_equals_eager",
    "masked_positions_get_no_gradient",
    "mesh_invariance",
    "microbatch_invariance",
    "needs_is_exact",
    "padding_invariance",
    "parameters",
    "permutation_equivariance",
    "same",
    "state_survives_a_checkpoint",
    "train",
    "vmap_over_hyperparameters",
]


class Report(NamedTuple):
    """The result of `check`.

    objective: its name.
    checked: contract -> what was compared.
    skipped: contract -> why it does not apply.
    """

    objective: str
    checked: dict[str, str]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.objective}: {len(self.checked)} contracts kept"]
        lines += [f"  {name}: {note}" for name, note in self.checked.items()]
        return "\n".join(lines + [f"  {name}: not checked, {why}" for name, why in self.skipped.items()])


def check(
    objective: Subject,
    batch: Rollouts | None = None,
    /,
    *,
    contracts: Sequence[Callable[[Case], str]] | None = None,
    **hyperparameters: Any,
) -> Report:
    """Run all contracts (or those in ``contracts``) on a registered objective or your own.

    The other arguments are those of `case`. With 8 devices (``jax_num_cpu_devices``) it also checks the mesh.

    Raises:
      AssertionError: lists every broken contract, with the numbers.
    """
    subject = case(objective, batch, **hyperparameters)
    checked, skipped, broken = {}, {}, {}
    contracts = CONTRACTS if contracts is None else contracts
    for contract in contracts:
        try:
            checked[contract.__name__] = contract(subject)
        except NotChecked as reason:
            skipped[contract.__name__] = str(reason)
        except Exception as error:  # an objective that raises any error breaks the contract
            line = str(error).strip().split("\n")[0]
            broken[contract.__name__] = line if isinstance(error, AssertionError) else f"{type(error).__name__}: {line}"
    if broken:
        lines = "".join(f"\n  {name}: {why}" for name, why in broken.items())
        raise AssertionError(f"{subject.name} breaks {len(broken)} of {len(contracts)} contracts:{lines}")
    return Report(subject.name, checked, skipped)
