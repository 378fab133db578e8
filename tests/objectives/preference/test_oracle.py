"""The objectives of pairs and of labelled answers equal their float64 oracles in value and gradient."""

import pytest

from tests.oracles import preference
from tests.oracles.families import label, registered
from tests.oracles.preference_cases import assert_equals_oracle

PLAIN = [
    ("dpo", {}),
    ("dpo", dict(beta=0.5, eps=0.2)),
    ("dpo", dict(eps=0.1, reference_free=True)),
    ("ipo", {}),
    ("ipo", dict(tau=0.5, normalize=False)),
    ("slic_hinge", {}),
    ("slic_hinge", dict(delta=3.0, lam=0.2, target="expert")),
    ("slic_hinge", dict(lam=0.0)),
    ("kto", {}),
    ("kto", dict(beta=0.7, lam_D=1.5, lam_U=0.5)),
    ("orpo", {}),
    ("orpo", dict(lam=0.7, include_prompt=True)),
    ("simpo", {}),
    ("simpo", dict(beta=2.5, gamma=1.375, eps=0.1)),
    ("cpo", {}),
    ("cpo", dict(beta=0.3, alpha=0.4, eps=0.2)),
    ("sppo", {}),
    ("sppo", dict(beta=0.1, half=False)),
    ("sppo", dict(beta=0.3, hard=True)),
    ("rso", {}),
    ("rso", dict(gamma=0.5, form="hinge-norm")),
    ("rso", dict(gamma=0.5, form="hinge")),
    ("rdpo", {}),
    ("rdpo", dict(beta=0.5, eps=0.3)),
    ("rpo", {}),
    ("rpo", dict(beta=0.3, eta=0.2, nll="token_mean")),
    *[("dpa_logic", dict(program=p)) for p in preference.RHO],
    ("dpa_logic", dict(program="uncpo", beta=0.5, link="square", use_ref=True)),
    ("dpa_logic", dict(program="orpo", beta=2.0, link="hinge")),
    ("dpa_logic", dict(link="log", length_norm=False, use_ref=True)),
    ("mpo_mixed", {}),
    ("mpo_mixed", dict(gap=0.3, beta=0.5)),
]


@pytest.mark.parametrize("configuration", PLAIN, ids=label)
def test_loss_and_gradient_equal_the_oracle(configuration):
    assert_equals_oracle(preference, configuration)


def test_every_objective_of_the_family_is_compared():
    assert {name for name, *_ in PLAIN} == registered("preference")
