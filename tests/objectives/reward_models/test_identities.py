"""The objectives that train reward models keep the identities that their cards claim, in float64."""

from dataclasses import replace

import numpy as np
import pytest

from jaxpo import make
from jaxpo.batch import TokenStats
from tests.oracles.preference_cases import GROUPS, LOG2, PAIRS, N, close, evaluate, loss, swapped, with_extra


@pytest.mark.parametrize("c", (0.0, 0.1))
def test_bradley_terry_rm_shift(c):
    moved = with_extra(PAIRS, score=PAIRS.extra["score"] + 3)
    a, b = (loss("bradley_terry_rm", x, ("score",), c=c) for x in (PAIRS, moved))
    assert (abs(a - b) < 1e-12) == (c == 0)


def test_bradley_terry_rm_of_equal_scores():
    close(loss("bradley_terry_rm", with_extra(PAIRS, score=0.7), ("score",)), LOG2)


def test_bradley_terry_rm_of_implicit_rewards_is_dpo():
    implicit = 0.1 * PAIRS.sums(PAIRS.logp - PAIRS.ref)
    close(loss("bradley_terry_rm", with_extra(PAIRS, score=implicit), ("score",)), loss("dpo", PAIRS))


HEADS = ("embed", "gate")


def test_gpm_rm_is_antisymmetric():
    even = replace(PAIRS, extra={**PAIRS.extra, "gate": np.repeat(PAIRS.extra["gate"][::2], 2, 0)})
    s = {}
    for name, batch in (("given", even), ("swapped", swapped(even))):
        s[name] = loss("gpm_rm", batch, HEADS, tau=1e6)  # log 2 - mean(s) / (2 tau)
    close(s["given"] - LOG2, LOG2 - s["swapped"], rtol=1e-5, atol=1e-14)
    alike = replace(even, extra={**even.extra, "embed": np.repeat(even.extra["embed"][::2], 2, 0)})
    close(loss("gpm_rm", alike, HEADS), LOG2)


def test_gpm_rm_of_flat_embeddings_is_bradley_terry():
    flat = np.stack([PAIRS.extra["score"], np.ones(2 * N)], 1)
    batch = replace(PAIRS, extra={**PAIRS.extra, "embed": flat})
    close(
        loss("gpm_rm", batch, ("embed",), tau=1.0, gate=False, normalize=False),
        loss("bradley_terry_rm", PAIRS, ("score",)),
    )


def test_gpm_rm_ranks_in_circles():
    angle = 2 * np.pi / 3 * np.arange(3)
    points = np.stack([np.cos(angle), -np.sin(angle)], 1)
    circle = np.concatenate([[points[(i + 1) % 3], points[i]] for i in range(3)])  # each beats the one before
    circle = np.concatenate([circle, np.tile(circle[:2], (N - 3, 1))])
    batch = replace(PAIRS, extra={**PAIRS.extra, "embed": circle})
    only = [replace(batch, count=np.repeat(np.arange(N) == i, 2).astype(float)) for i in range(3)]
    assert max(loss("gpm_rm", pair, ("embed",), gate=False) for pair in only) < 0.01  # no scalar score can do that


@pytest.mark.parametrize("options", (dict(), dict(tau=0.7, gate=False), dict(normalize=False)), ids=str)
def test_gpm_rm_wins_are_what_its_loss_says_of_a_pair(options):
    embed, gate = PAIRS.extra["embed"], np.repeat(PAIRS.extra["gate"][:1], 2 * N, 0)  # of one prompt
    odds = np.asarray(make("gpm_rm", **options).log_odds(TokenStats(embed=embed, gate=gate)))
    close(odds + odds.T, 0, atol=1e-4)
    batch = replace(PAIRS, extra={**PAIRS.extra, "embed": embed, "gate": gate})
    heads = HEADS if options.get("gate", True) else ("embed",)
    close(loss("gpm_rm", batch, heads, **options), np.logaddexp(0, -np.diag(odds, 1)[::2]).mean(), rtol=1e-5)


def test_themis_without_trace_is_half_bradley_terry():
    bare = replace(PAIRS, extra={**PAIRS.extra, "segment": 0 * PAIRS.extra["segment"]})
    close(loss("themis", bare, ("logp", "score")), 0.5 * loss("bradley_terry_rm", PAIRS, ("score",)))


def test_themis_without_ranking_is_a_token_mean():
    on = PAIRS.mask & (PAIRS.extra["segment"] > 0)
    close(loss("themis", PAIRS, ("logp", "score"), rm_coef=0.0), -PAIRS.logp[on].mean())


def test_rluf_gradient():
    s, y = GROUPS.extra["score"], GROUPS.extra["label"]
    close(evaluate("rluf", GROUPS, ("score",))[1]["score"], (1 / (1 + np.exp(-s)) - y) / len(s))


def test_preference_orchestrator_of_the_right_weights():
    right = replace(GROUPS, extra={**GROUPS.extra, "gate": GROUPS.extra["rm_scores"] / 0.5})
    close(loss("preference_orchestrator", right, ("gate",), T=0.5, normalize=False), 0, atol=1e-12)


def test_preference_orchestrator_is_blind_to_a_constant():
    moved = replace(GROUPS, extra={**GROUPS.extra, "rm_scores": GROUPS.extra["rm_scores"] + 7})
    a, b = (loss("preference_orchestrator", x, ("gate",), normalize=False) for x in (GROUPS, moved))
    close(a, b)


def test_preference_orchestrator_of_a_high_temperature_is_uniform():
    even = replace(GROUPS, extra={**GROUPS.extra, "gate": np.zeros((len(GROUPS.mask), 3))})
    close(loss("preference_orchestrator", even, ("gate",), T=1e9), 0, atol=1e-12)
