"""The objectives of Nash learning equal their float64 oracles in value and gradient."""

import pytest

from tests.oracles import nash
from tests.oracles.families import label, registered
from tests.oracles.preference_cases import assert_equals_oracle

PLAIN = [
    ("online_ipo", {}),
    ("online_ipo", dict(tau=0.3, form="expanded")),
    ("ipo_md", dict(tau=0.7)),
    ("nash_md", {}),
    ("nash_md", dict(tau=0.3, kl="token")),
    ("nash_ema", dict(tau=0.3)),
    ("nash_ema", dict(kl="token")),
    ("nash_mp", {}),
    ("nash_mp", dict(beta=0.3, eta=0.2)),
    ("egpo", {}),
    ("egpo", dict(beta=0.5, normalize=False)),
    ("inpo", {}),
    ("inpo", dict(eta=0.5, tau=0.4)),
    ("dno", {}),
    ("dno", dict(eta=0.3, scale=4.0)),
    ("dno", dict(eta=0.3, variant="prct")),
    ("gpo", {}),
    ("gpo", dict(beta=0.3)),
]


@pytest.mark.parametrize("configuration", PLAIN, ids=label)
def test_loss_and_gradient_equal_the_oracle(configuration):
    assert_equals_oracle(nash, configuration)


def test_every_objective_of_the_family_is_compared():
    assert {name for name, *_ in PLAIN} == registered("nash")
