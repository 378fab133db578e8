"""Who is compared with whom: rules of pairs, what a judge's word becomes, rejection sampling, judges."""

import types

import jax
import numpy as np
import pytest

from jaxpo.batch import Rollouts
from jaxpo.fields import role_id
from jaxpo.objectives import make
from jaxpo.protocols.comparisons import answer_fields, arranged, labels, ordered, pairs_of, pick, with_labels
from jaxpo.protocols.judged import judged, nash_md, rso, rso_sampler
from jaxpo.protocols.preference_data import with_samples, without_equal_pairs
from jaxpo.runs import questions
from jaxpo.runs.judges import judge
from jaxpo.runs.questions import Questions
from jaxpo.tasks import Example, Score
from tests.protocols.fake_gatherer import fake

SCORES = np.array([[0.0, 2.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
VERDICT = judge.verdict_of_scores(SCORES, None)


def answers(k=4, prompts=2):
    b = k * prompts
    return Rollouts(
        tokens=np.arange(b * 3).reshape(b, 3),
        mask=np.ones((b, 2), np.float32),
        prompt_length=np.ones(b, np.int32),
        count=np.ones(b, np.float32),
        role=np.zeros(b, np.int32),
        shared_prompt=k,
    )


# ---- verdicts


def test_scores_as_win_probabilities():
    assert VERDICT.wins[0, 1].tolist() == [1, 0.5, 1, 1] and VERDICT.wins[0, 2, 3] == 0.5
    soft = judge.verdict_of_scores(SCORES, 2.0).wins
    assert soft[0, 1, 0] == pytest.approx(1 / (1 + np.exp(-4))) and np.allclose(soft + soft.swapaxes(1, 2), 1)
    by_wins = judge.verdict_of_wins(VERDICT.wins)
    assert by_wins.scores[0].tolist() == pytest.approx([1 / 8, 7 / 8, 1 / 2, 1 / 2])
    with pytest.raises(ValueError, match="not finite"):
        judge.verdict_of_scores(np.array([[np.nan, 1]]), None)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        judge.verdict_of_wins(np.full((1, 2, 2), 1.5))


def longest(questions, texts):
    return [[len(t) for t in row] for row in texts]


def cyclic(questions, texts):
    wins = np.full((len(texts), 3, 3), 0.5)
    wins[:, [0, 1, 2], [1, 2, 0]], wins[:, [1, 2, 0], [0, 1, 2]] = 1, 0
    return wins


def wrong_shape(questions, texts):
    return [0.0]


def score(examples, texts):
    return [Score(float(e.answer == t), e.answer == t) for e, t in zip(examples, texts, strict=True)]


def opinion(name, score=score, **options):
    """The registered judge's opinion in a run whose task is verified by ``score``."""
    return make(name, "judge", **options)(types.SimpleNamespace(task=types.SimpleNamespace(score=score)))


EXAMPLES = [Example(0, "q", "ab", {})]


def test_judges_by_verifier_and_by_a_function_of_the_users():
    verified = opinion("verifier")(EXAMPLES, [["ab", "a"]])
    assert verified.scores.tolist() == [[1, 0]] and verified.wins[0, 0, 1] == 1
    soft = opinion("function", path=f"{__name__}:longest", scale=1.0)(EXAMPLES, [["a", "abc"]])
    assert soft.wins[0, 1, 0] == pytest.approx(1 / (1 + np.exp(-2)))
    cycle = opinion("function", path=f"{__name__}:cyclic")
    assert cycle(EXAMPLES, [["a", "b", "c"]]).scores.tolist() == [[0.5, 0.5, 0.5]]  # no answer is the best
    with pytest.raises(ValueError, match=r"an array \(1,\)"):
        opinion("function", path=f"{__name__}:wrong_shape")(EXAMPLES, [["a", "b"]])
    with pytest.raises(ValueError, match="nothing verifies"):
        opinion("verifier", score=None)(EXAMPLES, [["a", "b"]])


class Worded(Questions):
    """Completions that are as long as their first token says."""

    def texts(self, rollouts):
        return ["x" * int(row[0] % 5) for row in rollouts.tokens]


def test_each_process_judges_the_answers_to_its_own_prompts(monkeypatch):
    """Two processes, one after the other: what they decode and ask adds up to the verdict of one."""
    columns = [answers(2, 4).replace(prompt=np.repeat([7, 5, 6, 4], 2)), answers(1, 4)]
    examples, asked = [Example(i, str(i), None, {}) for i in range(8)], []

    def opinion(examples, texts):
        asked.append([e.question for e in examples])
        return judge.verdict_of_scores(np.array([[len(t) for t in row] for row in texts]), 1.0)

    compare = Worded(None, None, None, None, 2).compare
    whole = compare(opinion, examples, *columns)
    assert whole.scores.tolist() == [[0, 3, 0], [1, 4, 3], [2, 0, 1], [3, 1, 4]]
    parts = []
    monkeypatch.setattr(
        questions, "from_rows", lambda values, rows, total: parts.append((rows.tolist(), values)) or values
    )
    for own in ([0, 1], [2, 3], []):  # more processes than prompts: one has none
        monkeypatch.setattr(questions, "own_rows", lambda x, own=own: np.array(own, int))
        compare(opinion, examples, *columns)
    assert asked == [["7", "5", "6", "4"], ["7", "5"], ["6", "4"]]
    assert [rows for rows, _ in parts[::3]] == [[0, 1], [2, 3], []] and parts[7][1].shape == (0, 3, 3)
    for i, known in enumerate((whole.scores, whole.wins, whole.preference)):
        np.testing.assert_array_equal(np.concatenate([x for _, x in parts[i::3]]), known)
    whole = compare(opinion, examples, *columns, whole=True)  # a judge on the mesh gets all, whoever calls
    assert asked[-1] == asked[0] and len(whole.scores) == 4


# ---- pairs


def test_rules():
    i, j = pick("best_worst", VERDICT, 4, jax.random.key(0))
    assert (i[0, 0], j[0, 0]) == (1, 0)
    assert [x.tolist() for x in pick("adjacent", VERDICT, 4, None)] == [[[0, 2]] * 2, [[1, 3]] * 2]
    drawn = [pick("random", VERDICT, 4, jax.random.key(s)) for s in range(8)]
    assert all((i != j).all() for i, j in drawn) and len({tuple(i[0]) for i, _ in drawn}) > 1
    i, j = pick("best_worst", VERDICT, 2, None)  # of the first two alone
    assert (i[0, 0], j[0, 0]) == (1, 0)


def test_the_better_answer_comes_first_and_even_ones_do_not_count():
    i, j = np.array([[0, 2], [0, 2]]), np.array([[1, 3], [1, 3]])
    chosen, rejected, counts = ordered(VERDICT, i, j, 0.0)
    assert (chosen[0].tolist(), rejected[0].tolist()) == ([1, 2], [0, 3])
    assert counts.tolist() == [[True, False], [False, False]]
    assert not ordered(VERDICT, i, j, 2.0)[2].any()  # the gap of 2 is not above the margin


@pytest.mark.parametrize(
    "protocol, name, message",
    [
        (judged(pairs="random"), "nash_md", "config.protocol.pairs has no effect"),
        (judged(margin=0.5), "nash_md", "config.protocol.margin has no effect"),
        (nash_md(), "dpo", "the objective reads nothing of that"),
    ],
)
def test_what_has_no_effect_is_refused(protocol, name, message):
    with pytest.raises(ValueError, match=message):
        protocol.facts.rows(make(name), 4)


def test_pairs_side_by_side():
    chosen = ordered(VERDICT, *pick("best_worst", VERDICT, 4, None), 0.0)
    batch = arranged(make("dpo"), answers(), VERDICT, chosen)
    assert batch.layout == ("chosen", "rejected") and batch.shared_prompt == 2 and batch.per_row == {}
    assert batch.tokens[:2].tolist() == [[3, 4, 5], [0, 1, 2]] and batch.count.tolist() == [1, 1, 0, 0]
    assert batch.role.tolist() == [role_id("chosen"), role_id("rejected")] * 2 and batch.reward[:2].tolist() == [2, 0]
    soft = arranged(
        make("online_ipo"), answers(), VERDICT, (np.array([[0], [0]]), np.array([[1], [1]]), np.ones((2, 1)))
    )
    assert soft.per_row["pref_prob"].tolist() == [0, 0, 0.5, 0.5]


def test_what_is_said_of_an_answer():
    alone = answer_fields(VERDICT, 4)
    assert alone["win"][0].tolist() == [1 / 8, 7 / 8, 1 / 2, 1 / 2]  # itself at 1/2: SPPO's row means
    assert alone["pref_opp"][0].tolist() == pytest.approx([0, 1, 1 / 2, 1 / 2])
    game = answer_fields(VERDICT, 2)  # the last two are the opponent's
    assert game["pref_opp"][0].tolist() == game["win"][0].tolist() == [0, 1] and game["rm"].shape == (2, 2)
    soft = answer_fields(judge.verdict_of_scores(SCORES, 1.0), 2)
    assert soft["pref_score"][0].tolist() == pytest.approx([-1, 1], abs=1e-5)  # GPO: mean score over the samples
    odds = np.array([[[0.0, 40.0, -10.0], [-40.0, 0.0, 30.0], [10.0, -30.0, 0.0]]])  # a cycle, beyond any clip
    said = judge.verdict_of_log_odds(odds)
    assert answer_fields(said, 3)["pref_score"].tolist() == [[10, -10 / 3, -20 / 3]] == said.scores.tolist()
    assert (said.wins + said.wins.swapaxes(1, 2) == 1).all() and said.wins[0, 1, 2] > 0.999
    with pytest.raises(ValueError, match="not finite"):
        judge.verdict_of_log_odds(np.full((1, 2, 2), np.inf))
    sure = answer_fields(judge.verdict_of_wins(VERDICT.wins), 4)["pref_score"]
    assert sure[0, 1] == pytest.approx(3 / 4 * np.log((1 - 1e-6) / 1e-6), rel=1e-3)  # probabilities alone: clipped
    single = arranged(make("nash_md"), answers(2), VERDICT, None)
    assert single.per_row["pref_opp"].tolist() == [0, 1, 0.5, 0.5] and single.layout == () and single.shared_prompt == 2


def test_labels_of_the_policys_own_answers():
    good, known = labels(VERDICT, 4)
    assert good.tolist() == [[False, True, False, False], [False] * 4]
    assert known.tolist() == [[True, True, False, False], [False] * 4]  # 1/2: as good as the others
    good, known = labels(VERDICT, 4, threshold=0.5)
    assert good.tolist() == [[False, True, True, True], [True] * 4] and known.all()


def test_labelled_answers_beside_those_of_another_prompt():
    own = answers().replace(
        group=np.repeat(np.arange(2, dtype=np.int32), 4),
        prompt=np.repeat(np.array([7, 9], np.int32), 4),
        seed=np.arange(8, dtype=np.uint32),
    )
    good, known = labels(VERDICT, 4)
    batch = with_labels(own, good, known, mismatched=True)
    assert batch.rows == 16 and batch.shared_prompt == 8 and batch.role.tolist() == [0, role_id("kl")] * 8
    assert batch.prompt.tolist() == [7] * 8 + [9] * 8 and (batch.count[1::2] == 1).all()
    assert batch.per_row["label"][::2].tolist() == good.reshape(-1).tolist() and not batch.per_row["label"][1::2].any()
    assert batch.count[::2].tolist() == known.reshape(-1).tolist()
    assert batch.tokens[::2].tolist() == own.tokens.tolist()
    mismatched = batch.tokens[1::2]
    assert mismatched[:, 0].tolist() == own.tokens[:, 0].tolist()  # this prompt ...
    assert mismatched[:4, 1:].tolist() == own.tokens[4:, 1:].tolist()  # ... the other prompt's answer
    assert with_labels(own, good, known, mismatched=False).rows == 8


def test_who_gets_pairs_and_labels_of_a_judge():
    assert judged().facts.rows(make("kto"), 4) == 8 and judged().facts.rows(make("dpo"), 4) == 2
    with pytest.raises(ValueError, match="label_threshold has no effect"):
        judged(label_threshold=0.5).facts.rows(make("dpo"), 4)
    with pytest.raises(ValueError, match="a judge does not make"):
        judged().facts.rows(make("rationale_dpo"), 4)
    with pytest.raises(ValueError, match="makes pairs"):
        rso().facts.rows(make("kto"), 4)


def test_rejection_sampling_of_the_best_and_of_the_first():
    scores = np.array([[0.0, 3.0, 1.0, 2.0]])
    places, there = rso_sampler(beta=1e-6, n=3)(scores, jax.random.key(0))
    assert places.tolist() == [[1, 3, 2]] and there.all()
    places, _ = rso_sampler(beta=1e9, n=3)(scores, jax.random.key(0))
    assert places.tolist() == [[0, 1, 2]]
    assert rso_sampler(n=6)(scores, jax.random.key(0))[1].tolist() == [[True] * 4 + [False] * 2]


def test_rso_pairs_what_it_accepted_at_random_and_disjoint():
    scores = np.tile(np.repeat([1.0, 0.0], 4), (64, 1))  # in the order of acceptance, neighbors are ties
    verdict = judge.verdict_of_scores(scores, None)

    def drawn(seed):
        chosen = rso(beta=1e9, n=8).collect.args[0].choose(verdict, 8, jax.random.key(seed))
        return np.stack(chosen[:2], -1), chosen[2]

    pairs, there = drawn(0)
    assert (np.sort(pairs.reshape(64, 8), -1) == np.arange(8)).all() and there.all()  # each answer once
    differ = verdict.scores[0][pairs[..., 0]] != verdict.scores[0][pairs[..., 1]]
    assert differ.mean() == pytest.approx(4 / 7, abs=0.08)  # a random partner is one of the 4 others among 7
    assert len({p.tobytes() for p in pairs}) > 60
    np.testing.assert_array_equal(drawn(0)[0], pairs)
    assert (drawn(1)[0] != pairs).any()


def test_rso_pairs_only_what_was_accepted():
    choose = rso(beta=1e9, n=8).collect.args[0].choose
    pairs = choose(judge.verdict_of_scores(np.arange(10.0).reshape(2, 5), None), 5, jax.random.key(0))
    assert pairs[2].tolist() == [[True, True, False, False]] * 2  # 5 candidates make two pairs, and one is left
    for i, j, there in zip(*pairs, strict=True):
        assert len({*i[there], *j[there]}) == 4


def test_rso_asks_the_reference_unless_told_otherwise():
    run = types.SimpleNamespace(references={"ref": "start"}, state=types.SimpleNamespace(params="now"))
    assert rso().collect.args[0].own.params(run) == "start" and rso().facts.references == {"ref": {}}
    own = rso(candidates="policy")
    assert own.collect.args[0].own.params(run) == "now" and own.facts.references == {}


def test_gpo_takes_the_best_and_the_worst_by_mean_score():
    wins = np.array([[[0.5, 0.6, 0.6], [0.4, 0.5, 0.999999], [0.4, 0.000001, 0.5]]])
    verdict = judge.verdict_of_wins(wins)  # 1 has the most wins ...
    assert verdict.scores[0].argmax() == 1
    odds = np.log(wins / (1 - wins)).mean(-1)[0]
    c = judged().collect.args[0]
    i, j, counts = pairs_of(c, verdict, 3, jax.random.key(0), needs=make("gpo").asks.needs)
    assert (i[0, 0], j[0, 0], counts[0, 0]) == (odds.argmax(), odds.argmin(), True)
    odds = np.array([[[0.0, 8.0, -1.0], [-8.0, 0.0, 1.0], [1.0, -1.0, 0.0]]])
    verdict = judge.verdict_of_log_odds(odds)  # 0 is the best by its mean, though it loses against 2
    i, j, counts = pairs_of(c, verdict, 3, jax.random.key(0), needs=make("gpo").asks.needs)
    assert (i[0, 0], j[0, 0], counts[0, 0]) == (0, 1, True)


# ---- data and samples side by side


def units():
    batch = answers(2, 3)
    roles = np.tile([role_id("chosen"), role_id("rejected")], 3).astype(np.int32)
    index = np.repeat(np.arange(3, dtype=np.int32), 2)
    return batch.replace(
        role=roles, layout=("chosen", "rejected"), group=index, prompt=index, seed=np.zeros(6, np.uint32)
    )


def sampling_gatherer(token):
    def complete(params, tokens, length, budget, key, options, responses):
        n = len(tokens) * responses
        assert tokens.shape == (3, 1) and budget.tolist() == [2] * 3
        rows = np.concatenate([np.repeat(tokens, responses, 0), np.full((n, 2), token) + np.arange(n)[:, None]], 1)
        return Rollouts(tokens=rows, mask=np.ones((n, 2), np.float32))

    return fake(complete=complete, sampling=lambda run: None)


def test_samples_in_the_place_of_an_answer_or_after_the_others():
    pairs, key = units(), jax.random.key(0)
    swapped = with_samples(pairs, None, sampling_gatherer(100), None, key, ["rejected"])
    assert swapped.layout == pairs.layout and swapped.role.tolist() == pairs.role.tolist()
    assert swapped.tokens[::2].tolist() == pairs.tokens[::2].tolist()
    assert swapped.tokens[1::2].tolist() == [[0, 100, 100], [6, 101, 101], [12, 102, 102]]  # the unit's own prompt
    longer = with_samples(pairs, None, sampling_gatherer(100), None, key, ["own", "own"])
    assert longer.layout == ("chosen", "rejected", "own", "own") and longer.rows == 12 and longer.shared_prompt == 4
    assert (
        longer.tokens[4:8, 1].tolist() == [7, 10, 102, 103]
        and longer.group.tolist() == np.repeat([0, 1, 2], 4).tolist()
    )


def test_equal_answers_do_not_count():
    pairs = units()
    same = pairs.replace(tokens=np.repeat(pairs.tokens[::2], 2, 0))
    assert without_equal_pairs(pairs).count.tolist() == [1] * 6
    assert without_equal_pairs(same).count.tolist() == [0] * 6
