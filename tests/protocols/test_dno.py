"""DNO-Prct: which graded answers become pairs, and what comes back of earlier rounds."""

import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxpo.batch import Rollouts
from jaxpo.learning.state import Run
from jaxpo.objectives import make
from jaxpo.protocols.dno import best_first, blank, dno_prct, drawn, graded, repetitive
from jaxpo.protocols.gatherer import Verdict
from tests.protocols.fake_gatherer import fake
from tests.runs import tiny

PAPER = dict(positive=5.0, teacher_gap=2.0, own_gap=1.0)


def test_the_widest_gaps_first():
    scores, fine = np.array([[5.0, 4.0, 3.0, 6.0], [4.0, 3.0, 1.0, 4.0]]), np.zeros((2, 4), bool)
    i, j, there = graded(scores, fine, 4, PAPER)
    # The teacher's 6 over 3 and 4 (5 is too near), the policy's 5 over 3 and 4; nobody has 5 in the second.
    assert list(zip(i[0].tolist(), j[0].tolist(), strict=True)) == [(3, 2), (0, 2), (3, 1), (0, 1)]
    assert there.tolist() == [[True] * 4, [False] * 4]
    assert graded(scores, fine, 1, PAPER)[0].tolist()[0] == [3]


def test_who_repeats_himself_is_rejected():
    assert repetitive(np.array([1, 2, 1, 2, 1, 2]), 2, 3) and not repetitive(np.array([1, 2, 1, 2, 1, 3]), 2, 3)
    assert not repetitive(np.array([1]), 2, 2)
    i, j, there = graded(np.array([[6.0, 5.0]]), np.array([[True, False]]), 2, PAPER)
    assert (i[0, 0], j[0, 0]) == (1, 0) and there.tolist() == [[True, False]]


def test_every_prompts_best_pair_before_anybodys_second():
    there = np.array([[True, True], [True, False], [False, False]])
    i, j, prompt, left = best_first(np.arange(6).reshape(3, 2), np.arange(6).reshape(3, 2), there)
    assert prompt[:3].tolist() == [0, 1, 0] and left.tolist() == [True] * 3 + [False] * 3 and i[2] == 1


def test_old_pairs_that_are_not_there_do_not_count():
    past = blank((2, 3, 4), 1, 2)  # two rounds of three iterations of two pairs
    past.count[1, 0, :2] = past.count[1, 2, 2:] = 1
    past.prompt[1, 0, :2], past.prompt[1, 2, 2:] = 5, 6
    three = drawn(past, 1, 3, np.random.default_rng(0))
    assert three.rows == 6 and three.count.tolist() == [1] * 4 + [0] * 2 and set(three.prompt[:4].tolist()) == {5, 6}
    assert not drawn(past, 0, 2, np.random.default_rng(0)).count.any()


REFUSED = [
    (dict(old=0.5), "old must be"),
    (dict(old=0.0), "contradict"),
    (dict(own_gap=0.0), "own_gap must be a positive number, not 0.0"),
    (dict(repeats=1), "repeats must be a whole number of at least 2"),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        dno_prct(**options)


def test_what_it_cannot_run_with():
    with pytest.raises(ValueError, match="makes pairs"):
        dno_prct().facts.rows(make("kto"), 4)
    by = ConfigDict({"rollout": {"responses": 3}, "judge": {"name": "verifier"}})
    with pytest.raises(ValueError, match=r"a verifier's rewards lie in \[0, 1\]"):
        dno_prct().facts.check(by)
    dno_prct(positive=1).facts.check(by)
    with pytest.raises(ValueError, match="4 answers make at most 6 pairs"):
        dno_prct(positive=1, pairs=7).facts.check(by)


def test_pairs_of_a_round_come_back_in_the_next():
    """Two answers of a token, the iteration's number and 9, and the teacher's, 3; the judge likes small ones."""
    protocol = dno_prct(positive=5, own_gap=1, pairs=2, old=0.25, memory=1, ngram=9, repeats=2)
    said = {}

    def column(tokens):
        n = len(tokens)
        rows = np.array([[7, t] for t in tokens])
        ones = np.ones(n, np.float32)
        return Rollouts(
            tokens=rows,
            mask=ones[:, None],
            prompt_length=np.ones(n, np.int32),
            count=ones,
            prompt=np.arange(n) * 2 // n,
        )

    def generate(params, indices, key, options):
        return column([said["now"], 9] * 2).replace(shared_prompt=2)

    gatherer = fake(
        prompts=2, responses=2, prompt_width=1, width=1, objective=make("dno", variant="prct"),
        draw=lambda run, n: (run, np.arange(n)),
        sampling=lambda run: None,
        generate=generate,
        demonstrations=lambda indices: column([3, 3]),
        judge=lambda own, teacher: Verdict(np.array([[6.0, 1.0, 3.0]] * 2), None),
        note=said.__setitem__,
    )  # fmt: skip
    run, batches = Run(types.SimpleNamespace(params=None), tables=protocol.tables(gatherer)), []
    for iteration in range(3):
        said["now"] = iteration
        run, batch = protocol.collect(
            Run(run.state, tables=run.tables, iteration=iteration), gatherer, jax.random.key(1)
        )
        batches.append(batch)
    assert all(b.rows == 8 and b.layout == ("chosen", "rejected") and b.shared_prompt == 2 for b in batches)
    assert [b.count.tolist() for b in batches] == [[1] * 6 + [0] * 2, [1] * 8, [1] * 8]
    # Each prompt's widest pair, then the second of the first; after them one of the iteration before.
    assert batches[0].tokens[:6, 1].tolist() == [0, 9, 0, 9, 0, 3]
    assert [b.tokens[6, 1] for b in batches[1:]] == [0, 1] and said["dno/old"] == 0.25


@pytest.mark.slow
def test_a_run_that_is_resumed_goes_on_with_the_same_old_pairs(tmp_path):
    changes = {
        **{"objective": {"name": "dno", "variant": "prct"}, "training.epochs": 1, "evaluation.pass_at": ()},
        "protocol": dict(name="dno_prct", positive=1.0, teacher_gap=0.5, own_gap=0.5, pairs=2, prev_every=2),
        **{"warm_start.steps": 0, "sampling.max_new_tokens": 4, "checkpoint.every": 3, "task.partial_credit": True},
    }
    with tiny.quick():
        whole = tiny.run(tiny.config(changes), tmp_path / "whole")
        tiny.run(tiny.config({**changes, "steps": 3}), tmp_path / "part")
        resumed = tiny.run(tiny.config(changes), tmp_path / "part", resume=True)
    tiny.assert_same_params(resumed.result.params, whole.result.params)
    lines = tiny.trained(whole.path)
    assert "AGAIN" not in whole.printed and all(np.isfinite(line["loss"]) for line in lines)
    assert [line["dno/old"] > 0 for line in lines] == [False, False, True, True] and lines[0]["dno/fresh"] > 0
