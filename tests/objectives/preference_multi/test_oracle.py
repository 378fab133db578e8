"""The objectives of more answers than a pair equal their float64 oracles in value and gradient."""

import pytest

from tests.oracles import preference_multi
from tests.oracles.families import label, registered
from tests.oracles.preference_cases import assert_equals_oracle

PLAIN = [
    ("srpo", {}),
    ("srpo", dict(beta=0.3, alpha=0.8, soft=True)),
    ("seppo", {}),
    ("seppo", dict(beta=0.5, flip=False)),
    ("rationale_dpo", {}),
    ("rationale_dpo", dict(beta=0.4, gamma=0.3)),
    ("rationale_dpo", dict(gamma=0.2, term="nll")),
    ("rationale_orpo", {}),
    ("rationale_orpo", dict(lam=0.5, gamma=0.3)),
    ("opa_dpo", {}),
    ("opa_dpo", dict(beta=0.4, c_g=0.7, c_v=0.6, c_ctx=0.5, c_a=0.8, a=0.3, rev_anchor_sign=-1)),
    ("opa_dpo", dict(beta=0.4, c_g=0.7, a=0.3, granularity="position", rev_anchor_sign=-1)),
    ("copg", {}),
    ("copg", dict(beta=0.02)),
    ("hypo", {}),
    ("hypo", dict(beta=0.4, lam=0.2, k=3)),
    ("hypo", dict(lam=0.2, k=1)),
    ("hypo", dict(lam=0.2, rloo=False)),
    ("mapl", {}, "score"),
    ("mapl", dict(a=0.3, b=0.6), "score"),
    ("mapl", dict(a=0.3, form="dpo", beta=0.5)),
]


@pytest.mark.parametrize("configuration", PLAIN, ids=label)
def test_loss_and_gradient_equal_the_oracle(configuration):
    assert_equals_oracle(preference_multi, configuration)


def test_every_objective_of_the_family_is_compared():
    assert {name for name, *_ in PLAIN} == registered("preference_multi")
