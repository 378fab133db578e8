"""Every registered objective in float32 is as near to float64 as it says, also on long answers and offset rewards."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxpo
from jaxpo.objectives import Term, from_terms
from jaxpo.objectives.precision import LOOSER, bound_of
from jaxpo.testing.float32 import apart, build_of, errors, inputs

FAST = ("grpo", "dpo", "bnpo")
PAGE = Path(__file__).parents[2] / "docs" / "float32.md"


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.contracts) for n in jaxpo.names()]
)
def test_an_objective_keeps_the_bound_that_it_states(name):
    found, bound = errors(build_of(name)), bound_of(name).error
    assert max(found.values()) <= bound, found


def test_inputs_are_of_the_magnitudes_that_runs_have():
    given = {what: batch for what, _, _, batch in inputs(build_of("grpo"))}
    assert [*given] == ["wild", "long", "binary", "offset"]
    assert given["long"].lengths.max() > 500 and set(np.unique(given["binary"].reward)) == {0.0, 1.0}
    assert abs(given["offset"].reward.mean() - 30) < 1
    drift = np.where(given["long"].mask > 0, given["long"].logp_old - given["long"].get("logp_ref"), 0)
    assert 0.05 < drift[drift != 0].std() < 0.5
    assert [what for what, *_ in inputs(build_of("bnpo"))] == ["wild", "long", "binary"], "no offset within a range"
    assert [what for what, *_ in inputs(build_of("dpo"))] == ["wild", "long"]


def test_a_sum_that_cancels_is_found():
    """``(x + 1e7) - 1e7`` of sums over long rows, which float64 keeps."""

    def value(stats, batch, state):
        return (stats.logp.sum(-1) + 1e7) - 1e7

    term = Term("sums", value, jaxpo.primitives.aggregation.seq_mean, per="row")
    assert max(errors(lambda width: from_terms([term])).values()) > bound_of("sft").error


def test_what_is_not_finite_is_infinitely_far():
    one = np.ones((), np.float64)
    assert apart((jnp.nan, [one]), (one, [one])) == np.inf and apart((one, [one * np.nan]), (one, [one])) == np.inf
    with pytest.raises(AssertionError, match="the loss of float64 inputs is float32"):
        apart((one, [one]), (np.ones((), np.float32), [one]))


def test_every_looser_bound_is_of_an_objective_and_has_a_reason():
    assert set(LOOSER) <= set(jaxpo.names())
    assert all(bound.why and bound.error > bound_of("grpo").error for bound in LOOSER.values())


def test_the_page_states_the_bound_of_every_objective_and_figures_within_it():
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert [name for name, *_ in rows] == [
        n for n in jaxpo.names() if "test" not in jaxpo.registry.entry(n).factory.__module__
    ]
    for name, bound, figures in rows:
        assert float(bound) == bound_of(name).error
        assert max(float(x) for x in figures.split(" | ") if x != "–") <= float(bound), name
