"""The off-policy objectives equal their float64 oracles on batches that hurt."""

import pytest

from tests.oracles import off_policy
from tests.oracles.cases import CASES, NO_COUNTS, assert_equals_oracle, assert_same, evaluate, priorities
from tests.oracles.families import label, registered

PLAIN = [
    ("asymre", {}),
    ("asymre", dict(shift=0.2, tau=1.0, singleton="raw")),
    ("rec", {}),
    ("rec", dict(weight="importance_sampling", normalize=True, log_ratio_clip=5.0)),
    ("rec", dict(clip_mode="two-side", weight="advantage", temp=0.7, eps_low=0.1, eps_high=0.4)),
    ("rec", dict(clip_mode="ring", ring_low=0.3, ring_high=0.5, regularizer="k2", coef=0.3)),
    ("rec", dict(clip_mode="none", regularizer="forward-kl", coef=0.3, singleton="raw")),
    ("rec", dict(clip_mode="gspo-one-side", weight="importance_sampling", regularizer="k2")),
    ("opmd", {}),
    ("opmd", dict(tau=0.3, baseline="logavgexp", singleton="raw")),
    ("opmd", dict(form="kimi", tau=0.7)),
    ("opmd", dict(form="kimi", baseline="logavgexp")),
    ("opmd", dict(form="pairwise")),
    ("opmd", dict(form="pairwise", tau=0.3)),
    ("opmd", dict(form="surrogate", coef=0.4)),
]


@pytest.mark.parametrize("configuration", PLAIN, ids=label)
def test_loss_and_gradient_equal_the_oracle(configuration):
    assert_equals_oracle(off_policy, configuration)


@pytest.mark.parametrize("label", NO_COUNTS)
@pytest.mark.parametrize("normalize", (False, True))
def test_rec_with_drop_equals_its_oracle(label, normalize):
    case, hyperparameters = CASES[label], dict(drop="balance", clip_mode="none", normalize=normalize)
    expected = off_policy.rec(case, **hyperparameters, row_priority=priorities(case, 1))
    assert_same(evaluate("rec", case, **hyperparameters), expected)


def test_every_objective_of_the_family_is_compared():
    assert {name for name, _ in PLAIN} == registered("off_policy")
