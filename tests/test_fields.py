"""The table of fields: what it says of each, and what is asked of it."""

import numpy as np
import pytest

from jaxpo import fields
from jaxpo.batch import Rollouts
from jaxpo.fields import FIELDS, GIVEN, GIVERS, JUDGED, LOOP, NUMBERS, SHARES, VECTORS, WEIGHTS
from jaxpo.learning.references import GIVEN_BY
from jaxpo.objectives import make
from jaxpo.registry import entry, names


def test_what_the_loop_gives():
    assert LOOP == {
        *("tokens", "mask", "count", "group", "role", "prompt", "seed", "reward", "correct", "truncated"),
        *("logp_old", "logp_beh", "entropy_old", "value_old"),
    }


def test_what_a_judge_may_say_and_what_data_may_give():
    assert JUDGED == {"pref_prob", "win", "pref_opp", "label", "margin", "rm", "pref_score"}
    assert GIVEN == {"reward", "pref_prob", "win", "label", "margin", "rm", "pref_score", "rm_scores"}
    assert set(NUMBERS) < GIVEN and set(VECTORS) < GIVEN and not set(WEIGHTS) & GIVEN


def test_which_are_probabilities_and_which_are_lists():
    assert SHARES == {"pref_prob", "win", "pref_opp", "label"} and VECTORS == ("rm_scores",)
    for name in SHARES:
        example = np.asarray(FIELDS[name].example(np.random.default_rng(0), 64, 3))
        assert ((example >= 0) & (example <= 1)).all()


def test_givers_are_known_and_every_reference_has_its_field():
    assert {giver for field in FIELDS.values() for giver in field.givers} == {*GIVERS}
    assert set(GIVEN_BY) == fields.given_by("reference")


@pytest.mark.parametrize("name", sorted(set(FIELDS) - set(LOOP) - {"prompt_length", "adv", "logp_sampler"}))
def test_an_example_has_the_shape_that_the_table_says(name):
    field, example = FIELDS[name], np.asarray(FIELDS[name].example(np.random.default_rng(0), 6, 3))
    assert example.shape[0] == 6 and example.ndim == {"row": 1, "token": 2, "vector": 2, "token vector": 3}[field.axes]
    assert example.shape[1:2] == (3,) or field.home != "per_token"
    batch = Rollouts(mask=np.ones((6, 3)), **{name: example})
    assert getattr(batch, fields.home_of(name))[name] is example is batch.get(name)


@pytest.mark.parametrize("name", names())
def test_every_need_of_every_objective_is_in_the_table(name):
    objective = make(name, **entry(name).of_run(8, 100))
    unknown = {need for need in objective.asks.needs if need not in FIELDS and not need.startswith("logp_")}
    assert not unknown, f"give these a line in FIELDS: {unknown}"


@pytest.mark.parametrize(
    ("name", "parts"),
    (
        ("logp_ref", (r"Rollouts(logp_ref=...) [B, T] (log-probs under the reference policy)", "frozen reference")),
        ("logp_tutor", ("Rollouts(logp_tutor=...) [B, T]; in a run", "frozen reference")),
        ("rm_scores", ("Rollouts(rm_scores=...) [B, M]", GIVERS["data"])),
        ("pref_prob", ("[B]", GIVERS["data"], GIVERS["judge"])),
        ("rel_query", (GIVERS["user"],)),
        ("height", ("per_token=dict(height=...) [B, T] or per_row=dict(height=...) [B]", "a field of your own")),
    ),
)
def test_where_a_missing_field_goes_and_who_would_give_it(name, parts):
    said = fields.missing(name)
    assert all(part in said for part in parts), said


def test_homes():
    assert (fields.home_of("mc_value"), fields.home_of("logp_tutor")) == ("per_token", "per_token")
    assert (fields.home_of("margin"), fields.home_of("rewards_multi")) == ("per_row", "per_row")
    with pytest.raises(ValueError, match="'mc_valeu': did you mean 'mc_value'.*per_token=dict"):
        fields.home_of("mc_valeu")
