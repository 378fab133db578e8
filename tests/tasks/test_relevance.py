"""The reward of R^3: the numbers of its card from texts."""

import numpy as np
import pytest

from jaxpo.batch import Rollouts
from jaxpo.objectives import make
from jaxpo.tasks.base import Example
from jaxpo.tasks.rewards import make_reward
from jaxpo.tasks.scoring import choices, make_judge, make_score

HERE = f"{__name__}:"
TEXTS = ["one two three four", "one one one one one", "two words", ""]
CLOSED = ["three", None, "words", None]


def letters(texts):
    """Counts of letters, a poor retriever."""
    return [[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]


def flat(texts):
    return [1.0] * len(texts)


def by_the_card(questions, answers, texts, scale, shift):
    """The registered shaping, of fields that are counted here."""

    def dot(a, b):
        return [np.dot(*letters([x or "", y])) for x, y in zip(a, b, strict=True)]

    words = [t.split() for t in texts]
    trigrams = [[tuple(w[i : i + 3]) for i in range(len(w) - 2)] for w in words]
    fields = dict(
        rel_query=dot(questions, texts),
        rel_answer=dot(answers, texts),
        open_ended=[a is None for a in answers],
        num_words=[len(w) for w in words],
        num_tri=[len(t) for t in trigrams],
        uniq_tri=[len(set(t)) for t in trigrams],
    )
    batch = Rollouts(mask=np.ones((len(texts), 1)), **{k: np.array(v, np.float64) for k, v in fields.items()})
    return np.asarray(make("relevance_reward_r3", "reward", scale=scale, shift=shift).fn(batch, None))


def test_texts_give_what_the_card_says_of_numbers():
    questions = ["what comes after two?"] * 4
    said = make_reward("relevance", embed=HERE + "letters", scale=0.5, shift=0.25)(TEXTS, questions, CLOSED)
    np.testing.assert_allclose(said, by_the_card(questions, CLOSED, TEXTS, 0.5, 0.25), rtol=1e-6)
    assert said[1] < said[0] and said[3] == 0


def test_a_column_says_which_questions_are_open():
    reward = make_reward("relevance", embed=HERE + "letters")
    assert reward(["abc"], ["a"], ["b"], [True]) == [0.01] and reward(["abc"], ["a"], ["b"], [False]) == [1.0]
    with pytest.raises(ValueError, match="'a' is not open-ended and has no answer"):
        reward(["abc"], ["a"], [None], [False])


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "needs embed"),
        ({"embed": HERE + "letter"}, "has no function 'letter'"),
        ({"embed": HERE + "letters", "shfit": 1.0}, "shift"),
    ],
)
def test_wrong_options_are_told_before_any_text(options, message):
    with pytest.raises(ValueError, match=message):
        make_reward("relevance", **options)


def test_embeddings_of_another_shape():
    with pytest.raises(ValueError, match=r"must give finite numbers \[2, D\]; it gave an array \(2,\)"):
        make_reward("relevance", embed=HERE + "flat")(["a"], ["a"], ["b"])


def test_a_task_is_rewarded_by_it_in_a_worker():
    chosen = choices("relevance", options={"embed": HERE + "letters"})
    rows = [Example(0, "a", "b", {}), Example(1, "c", "d", {})]
    score = make_score(chosen, [make_judge(chosen[0], [rows], timeout=60, workers=1)])
    assert [s.reward for s in score(rows, ["abba", "dd"])] == [2.0, 2.0]
