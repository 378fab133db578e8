"""Objectives with hints and repaired rows equal their float64 oracles on batches that hurt."""

import numpy as np
import pytest

from jaxpo.fields import role_id
from tests.oracles import Case, guidance
from tests.oracles.cases import CASES, EXPERT_CASES, assert_equals_oracle
from tests.oracles.families import label, registered


def with_hints(case: Case, seed: int = 0, share: float = 0.5) -> Case:
    """Some rows began with a hint of some of their tokens; rewards in [0, 1]."""
    rng = np.random.default_rng(seed)
    hinted = rng.random(len(case.reward)) < share
    length = rng.integers(0, case.mask.shape[1] + 1, len(case.reward))
    hint = (np.arange(case.mask.shape[1]) < length[:, None]) & hinted[:, None] & case.mask
    entropy = np.where(rng.random(hint.shape) < 0.1, 0, case.entropy_old)
    role = np.where(hinted, role_id("hinted"), role_id("own"))
    extra = dict(hinted=hinted.astype(float), hint_mask=np.where(case.mask, hint, np.nan), role=role)
    return case.replace(entropy_old=entropy, extra={**case.extra, **extra}, reward=1 / (1 + np.exp(-case.reward)))


def with_repairs(case: Case, seed: int = 0, share: float = 0.4) -> Case:
    """Some rows end with tokens of a corrector, whose ``logp_old`` nobody may read."""
    rng = np.random.default_rng(seed)
    start = np.where(rng.random(len(case.reward)) < share, rng.integers(0, case.mask.shape[1], len(case.reward)), 99)
    off = (np.arange(case.mask.shape[1]) >= start[:, None]) & case.mask
    return case.replace(
        logp_old=np.where(off, np.nan, case.logp_old),
        extra={**case.extra, "off_mask": np.where(case.mask, off, np.nan)},
    )


def made(change, **more) -> dict[str, Case]:
    """The cases with some, with no and with only such rows."""
    cases = {name: change(case, seed, **more) for seed, (name, case) in enumerate(CASES.items())}
    base = CASES["unequal groups"]
    return {**cases, "none": change(base, share=0.0), "only": change(base, share=1.1)}


CONFIGURATIONS = [
    ("critique_grpo", {}, EXPERT_CASES),
    ("critique_grpo", dict(gamma=0.5, clip=True, eps=0.1, adv_eps=1e-2, entropy_coef=0.0), EXPERT_CASES),
    ("ghpo", {}, CASES),
    ("ghpo", dict(w_acc=0.7, w_fmt=0, beta_kl=0.1), CASES),
    ("ghpo", dict(eps_low=0.1, eps_high=0.3, adv_eps=1e-2, singleton="raw"), CASES),
    ("adhint", {}, made(with_hints)),
    ("adhint", dict(eps_low=0.1, eps_high=0.3, adv_eps=1e-2, singleton="raw"), made(with_hints)),
    ("scope", {}, made(with_repairs)),
    ("scope", dict(gamma=0.5, eps_low=0.1, eps_high=0.3, use_std=False, singleton="raw"), made(with_repairs)),
]


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=label)
def test_equals_its_oracle(configuration):
    name, hyperparameters, cases = configuration
    assert_equals_oracle(guidance, (name, hyperparameters), cases)


def test_every_objective_of_the_family_is_compared():
    assert registered("guidance") == {name for name, *_ in CONFIGURATIONS}
