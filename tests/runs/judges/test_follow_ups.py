"""What a user would say next, as a judge: the numbers of a policy, and what is refused."""

import json

import jax
import numpy as np
import pytest

from jaxpo.registry import make
from jaxpo.runs.judges import follow_ups
from jaxpo.runs.workspace import setup
from tests.runs import tiny

FILE = {"clarity": {"positive": ["00", "3"], "negative": ["1"]}, "tone": {"positive": ["2"], "negative": ["213"]}}
SWAPPED = {c: {"positive": signs["negative"], "negative": signs["positive"]} for c, signs in FILE.items()}


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A scorer, and its policy's log-prob of a token of one text after another."""
    with tiny.quick(), pytest.MonkeyPatch.context() as patch:
        workspace = setup(tiny.config({"training.minibatches": 1}))  # as `open_finished` has it
        params = workspace.init_params(jax.random.key(0))
        patch.setattr(follow_ups, "open_finished", lambda path, **_: (workspace, params, 0))

        def scorer(content):
            file = tmp_path_factory.mktemp("follow_ups") / "f.json"
            file.write_text(json.dumps(content))
            return follow_ups.scorer("somewhere", str(file), "=")

        def mean_logp(head, text):
            rows = follow_ups.rows_of([workspace.tokenizer.encode(head)], [workspace.tokenizer.encode(text)], 0)
            return (np.asarray(workspace.score(params, rows).logp) * rows.mask).sum() / rows.mask.sum()

        yield workspace, scorer, mean_logp


def test_the_reward_is_a_mean_of_means(scored):
    workspace, scorer, mean_logp = scored
    examples, answers = workspace.task.test[:2], [["12", "3"], ["", "0123"]]
    said = scorer(FILE)(examples, answers)
    assert said.shape == (2, 2) and len(np.unique(said)) == 4
    head = f"{examples[1].question}=0123="
    clarity = (mean_logp(head, "00") + mean_logp(head, "3")) / 2 - mean_logp(head, "1")
    tone = mean_logp(head, "2") - mean_logp(head, "213")
    assert said[1, 1] == pytest.approx((clarity + tone) / 2, abs=1e-6)
    np.testing.assert_allclose(scorer(SWAPPED)(examples, answers), -said, atol=1e-6)


def test_it_is_a_judge(scored, tmp_path):
    workspace, scorer, _ = scored
    (tmp_path / "f.json").write_text(json.dumps(FILE))
    own = {"path": "somewhere", "file": str(tmp_path / "f.json"), "between": "="}
    changes = {"objective": {"name": "kto"}, "evaluation.pass_at": (), "judge": {"name": "follow_ups", **own}}
    of_run = setup(tiny.config(changes))
    examples, answers = workspace.task.test[:1], [["12", "3", "0"]]
    verdict = make("follow_ups", "judge", **own)(of_run)(examples, answers)
    np.testing.assert_allclose(verdict.scores, scorer(FILE)(examples, answers), atol=1e-6)
    assert verdict.wins[0, 0, 1] == (verdict.scores[0, 0] > verdict.scores[0, 1])


BAD = [
    ("{", "is no JSON"),
    ("[]", "categories with positive and negative"),
    ('{"tone": {"positive": ["a"]}}', "category 'tone' has no list of negative texts"),
    ('{"tone": {"positive": ["a"], "negative": [""]}}', "no list of negative texts"),
]


@pytest.mark.parametrize("content, message", BAD)
def test_files_that_hold_none(tmp_path, content, message):
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        follow_ups.read(str(tmp_path / "f.json"))
