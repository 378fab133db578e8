"""Tasks of the library itself, with its own verifiers."""

import dataclasses
import pickle

import pytest

from jaxpo.tasks import Score, build
from jaxpo.tasks.plain import is_algebra, is_arithmetic, is_literal
from jaxpo.tasks.reasoning_gym import EVALUATES, HALF, SEEDS, _verify, harmless, reasoning_gym


@pytest.fixture(scope="module")
def spell():
    return reasoning_gym("spell_backward", 400, 50, seed=3, min_word_len=3, max_word_len=6)


def test_items_are_disjoint_by_text_and_reported(spell):
    questions = {e.question for e in spell.train}
    assert questions.isdisjoint(e.question for e in spell.test)
    assert len(spell.test) == 50 and spell.report["test/size"] == 50
    assert len(spell.train) == spell.report["train/size"] == 400 - spell.report["train/removed"]
    assert spell.report["test/unseen_share"] == 1.0
    assert all(spell.train[e.index] is e for e in spell.train)


def test_a_small_task_space_collides_and_is_cleaned():
    # About a hundred different sums exist: training on distant seeds would show nearly every test item.
    task = reasoning_gym("chain_sum", 300, 20, seed=0, min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    assert task.report["train/removed"] > 20
    assert {e.question for e in task.train}.isdisjoint(e.question for e in task.test)
    assert task.report["test/unseen_share"] == 1.0


def test_a_space_that_the_test_set_uses_up_is_an_error():
    with pytest.raises(ValueError, match="nothing to train on: 5 training items"):
        reasoning_gym("coin_flip", 5, 200, seed=0, min_trials=3, max_trials=3)


def test_item_seeds_of_training_testing_and_runs_are_apart(spell):
    from reasoning_gym import create_dataset

    config = {"min_word_len": 3, "max_word_len": 6}
    raw = create_dataset("spell_backward", size=400, seed=6 * HALF + HALF, **config)
    assert [e["question"] for e in create_dataset("spell_backward", size=50, seed=6 * HALF, **config)] == [
        e.question for e in spell.test
    ]
    held_out = {e.question for e in spell.test}
    assert [e.question for e in spell.train] == [e["question"] for e in raw if e["question"] not in held_out]
    again = reasoning_gym("spell_backward", 400, 50, seed=3, **config)
    assert (again.train, again.test) == (spell.train, spell.test)
    assert reasoning_gym("spell_backward", 400, 50, seed=4, **config).test != spell.test


def test_scores_are_exact_by_default(spell):
    example = spell.train[0]
    right = example.answer
    assert right == example.entry["metadata"]["word"][::-1]
    texts = [right, f"  {right}\n", right[:-1], right + " padding", ""]
    assert spell.score([example] * 5, texts) == [Score(1.0, True)] * 2 + [Score(0.0, False)] * 3
    with pytest.raises(ValueError):
        spell.score([example], texts)


def test_partial_credit_is_opt_in():
    arguments = {"dataset": "gcd", "train_size": 20, "test_size": 5, "seed": 0}
    partial = build({"name": "reasoning_gym", **arguments, "partial_credit": True})
    example = partial.test[0]
    padded = f"{example.answer} and more"
    [score] = partial.score([example], [padded])
    assert 0 < score.reward < 1 and not score.correct and score.error is None
    assert reasoning_gym(**arguments).score([example], [padded]) == [Score(0.0, False)]


def test_answers_in_tags():
    task = reasoning_gym("gcd", 20, 5, seed=0, extract="answer_tag")
    example = task.test[0]
    assert task.demonstrate(example) == f"<answer>{example.answer}</answer>"
    assert [s.reward for s in task.score([example] * 2, [task.demonstrate(example), example.answer])] == [1.0, 0.0]


def test_what_is_asked_around_the_question():
    plain = reasoning_gym("spell_backward", 5, 5, seed=0, prompt_field="word")
    asked = reasoning_gym("spell_backward", 5, 5, seed=0, prompt_field="word", prompt="Spell {} backward")
    assert [e.question for e in asked.test] == [f"Spell {e.question} backward" for e in plain.test]
    assert [e.answer for e in asked.test] == [e.answer for e in plain.test]


@pytest.mark.parametrize("dataset", ["spell_backward", "letter_counting", "simple_equations"])
def test_demonstrations_are_correct(dataset):
    task = reasoning_gym(dataset, 20, 4, seed=1)
    scores = task.score(task.train, [task.demonstrate(e) for e in task.train])
    assert scores == [Score(1.0, True)] * len(task.train)


def test_a_verifier_that_raises_is_a_counted_error(spell):
    example = dataclasses.replace(spell.train[0], entry={})
    fine = spell.train[1]
    broken, good = spell.score([example, fine], ["a", fine.answer])
    assert broken == Score(0.0, False, "KeyError: 'answer'") and good == Score(1.0, True)
    task = reasoning_gym("prime_factorization", 10, 2, seed=0)
    [score] = task.score(task.test[:1], ["x × y"])
    assert score.reward == 0 and not score.correct and score.error.startswith("ValueError")


def test_a_verifier_that_hangs_is_killed_and_counted():
    # countdown evaluates the completion with sympy; it runs in workers without being asked to.
    task = reasoning_gym("countdown", 10, 2, seed=0, timeout=2.0, workers=1)
    example = task.train[0]
    scores = task.score([example] * 2, ["9**9**9**9", task.demonstrate(example)])
    assert scores == [Score(0.0, False, "timed out after 2 s"), Score(1.0, True)]


def test_no_answers_no_demonstrations():
    task = reasoning_gym("graph_color", 10, 2, seed=0)
    assert task.train[0].answer is None
    with pytest.raises(ValueError, match="'graph_color' has no answers to demonstrate"):
        task.demonstrate(task.train[0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dataset": "spel_backward"}, "unknown reasoning_gym dataset 'spel_backward': did you mean 'spell_backward'"),
        ({"max_word_length": 6}, "'max_word_length': did you mean 'max_word_len'"),
        ({"extract": "boxd"}, "did you mean 'boxed'"),
        ({"min_word_len": 9, "max_word_len": 3}, "'spell_backward' refuses its config: "),
        ({"dataset": "game_of_life_halting"}, "its verifier gives full credit to any completion"),
        ({"dataset": "puzzle24"}, "its verifier ignores which numbers are used"),
        ({"dataset": "composite"}, "hides the verifiers of its parts"),
        ({"train_size": HALF + 1}, r"train_size must be a whole number in \[1, 1000000\]"),
        ({"train_size": 0}, "train_size must be a whole number"),
        ({"seed": SEEDS}, "seed must be a whole number in"),
        ({"seed": -1}, "seed must be a whole number in"),
        ({"size": 3}, "'size'"),
        ({"workers": 0}, "workers must be a whole number of at least 1 or None"),
        ({"timeout": -1}, "timeout must be a positive number"),
        ({"prompt": "Spell it"}, "task.prompt must hold {} once, where the question goes, not 'Spell it'"),
    ],
)
def test_bad_arguments_fail_before_anything_is_built(change, message):
    # With so many items, building would be noticed.
    arguments = {"dataset": "spell_backward", "train_size": HALF, "test_size": HALF, "seed": 0}
    with pytest.raises(ValueError, match=message):
        reasoning_gym(**{**arguments, **change})


ATTACKS = (
    "__import__('os').system('id > {}')",
    "open('{}', 'w')",
    "[open('{}', 'w') for _ in [0]]",
    "(lambda: open('{}', 'w'))()",
    "sin.__class__.__init__.__globals__['__builtins__']['open']('{}', 'w')",
    "sympify(\"open('{}', 'w')\")",
    "exp(open('{}', 'w'))",
    "f\"{{open('{}', 'w')}}\"",
)


@pytest.mark.parametrize("dataset", sorted(EVALUATES))
def test_a_completion_that_is_a_program_scores_0_and_is_not_run(dataset, tmp_path, capsys):
    task = reasoning_gym(dataset, 8, 2, seed=0, partial_credit=True, workers=1, timeout=20)
    assert capsys.readouterr().out.count("evaluates completions as Python") == 1
    example = task.test[0]
    entry, made = example.entry, tmp_path / "made"
    for attack in ATTACKS:
        assert not harmless(dataset, attack.format(made), entry), attack
        assert _verify(dataset, pickle.dumps({}), "text", entry, attack.format(made)) == 0.0
    assert not made.exists()
    assert _verify(dataset, pickle.dumps({}), "text", entry, task.demonstrate(example)) == 1.0
    if dataset == "countdown":  # one is enough to see that the workers ask the same question
        good, bad = task.score([example] * 2, [task.demonstrate(example), ATTACKS[0].format(made)])
        assert good == Score(1.0, True) and bad == Score(0.0, False) and not made.exists()


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    (
        (is_literal, ("[[0, 1], [1, 0]]", "-3", "'a'", " [1] "), ("x", "1 if 1 else 2", "[" * 10**4, "f(1)", "")),
        (is_arithmetic, ("(1 + 2) * 3 / -4", "2**3"), ("x", "f(1)", "1 if 1 else 2", "'a'", "True", "1;2")),
        (is_algebra, ("sin(x)**2 + C", "2*x + pi"), ("x.y", "open(1)", "sin(x=1)", "__x", "[x]", "sin('a')", "x!")),
    ),
)
def test_plain_texts(check, good, bad):
    assert all(map(check, good)) and not any(map(check, bad))
