"""The objectives that train reward models equal their float64 oracles in value and gradient."""

import pytest

from tests.oracles import reward_models
from tests.oracles.families import label, registered
from tests.oracles.preference_cases import assert_equals_oracle

PLAIN = [
    ("bradley_terry_rm", {}, "score"),
    ("bradley_terry_rm", dict(margin=0.5, c=0.1, margins=True), "score"),
    ("gpm_rm", {}, "embed", "gate"),
    ("gpm_rm", dict(tau=1.0, gate=False, normalize=False), "embed"),
    ("themis", {}, "logp", "score"),
    ("themis", dict(rm_coef=2.0, observation=False), "logp", "score"),
    ("themis", dict(rationale=False), "logp", "score"),
    ("themis", dict(form="paper", alpha=0.5, beta=0.3, omega=0.7), "logp", "score"),
    ("rluf", {}, "score"),
    ("preference_orchestrator", {}, "gate"),
    ("preference_orchestrator", dict(T=0.5, normalize=False), "gate"),
]


@pytest.mark.parametrize("configuration", PLAIN, ids=label)
def test_loss_and_gradient_equal_the_oracle(configuration):
    assert_equals_oracle(reward_models, configuration)


def test_every_objective_of_the_family_is_compared():
    assert {name for name, *_ in PLAIN} == registered("reward_models")
