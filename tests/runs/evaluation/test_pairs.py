"""How a policy ranks held-out pairs: the bound is stated only where the objective has a beta."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxpo import make
from jaxpo.fields import PAIR
from jaxpo.runs.evaluation import pairs

W = np.array([-10.0, -10.0, -10.0, -10.0])  # log-probs of the chosen answers at the start
L = np.array([-8.0, -7.0, -5.0, -11.0])


def ranked(monkeypatch, objective, pref_prob=0.75):
    """`pairs.ranked` of a run that has just begun."""
    answer = SimpleNamespace(numbers={} if pref_prob is None else {"pref_prob": pref_prob})
    data = SimpleNamespace(form=SimpleNamespace(layout=PAIR), test=[[answer, answer]] * len(W))
    start = np.stack([W, L], 1)
    monkeypatch.setattr(pairs, "sums", lambda workspace, params: start)
    workspace = SimpleNamespace(objective=objective, preferences=data)
    run = SimpleNamespace(state=SimpleNamespace(params=None), tables={pairs.START: start})
    return pairs.ranked(workspace, run)


@pytest.mark.parametrize(
    ("objective", "share"),
    (  # right where W - L + log(3)/beta > 0, log(3) = 1.099; W - L = -2, -3, -5, 1
        (make("dpo", beta=0.3), 0.75),  # 3.66
        (make("dpo", beta=0.5), 0.5),  # 2.20
        (make("dpo", beta=0.2), 1.0),  # 5.49
        (make("ipo", tau=0.5, normalize=False), 0.5),
        (make("rso", gamma=0.3), 0.75),
        (make("online_ipo", tau=0.3), 0.75),
    ),
)
def test_idealized_accuracy_is_of_the_objectives_beta(monkeypatch, objective, share):
    assert ranked(monkeypatch, objective)["eval/idealized_accuracy"] == share
    assert ranked(monkeypatch, objective, None)["eval/idealized_accuracy"] == share  # a label alone: 0.75


@pytest.mark.parametrize(
    "objective",
    (
        make("simpo", beta=2.0),  # no reference
        make("dpo", beta=0.3, reference_free=True),
        make("ipo", tau=0.3),  # log-ratios averaged over tokens
        make("dno", eta=0.3),  # against the previous iterate
        make("inpo"),  # against a blend
        make("slic_hinge"),
    ),
    ids=("simpo", "dpo", "ipo", "dno", "inpo", "slic_hinge"),
)
def test_no_idealized_accuracy_without_a_beta(monkeypatch, objective):
    assert objective.beta is None
    values = ranked(monkeypatch, objective)
    assert "eval/idealized_accuracy" not in values and values["eval/ranking_accuracy"] == 0.25
