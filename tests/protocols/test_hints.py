"""Hints in the prompt, hints that begin the answer, answers that are repaired: on the tiny run's own policy."""

import jax
import numpy as np
import pytest

from jaxpo.fields import role_id
from jaxpo.learning.state import Run, TrainState
from jaxpo.objectives import make
from jaxpo.protocols.gatherer import Watch
from jaxpo.runs.gatherer import make_gatherer
from jaxpo.runs.workspace import setup
from tests.runs import tiny

KEY = jax.random.key(0)
G, K, T = 8, 4, 3


@pytest.fixture(scope="module")
def world():
    with tiny.quick():
        workspace = setup(tiny.config(), report=lambda text: None)
        params = workspace.init_params(jax.random.key(3))
        run = Run(TrainState(params, None, workspace.objective.init()), {})
        yield workspace, run


def gatherer(world, **changes):
    import dataclasses

    return dataclasses.replace(make_gatherer(world[0], Watch(say=lambda text: None)), **changes)


def collected(world, name, gather=None, key=KEY, **options):
    gather = gather or gatherer(world)
    with tiny.quick():
        run, batch = make(name, "protocol", **options).collect(world[1], gather, key)
    return gather, jax.tree.map(np.asarray, batch)


def judged_by(rule):
    """A verifier: ``rule(rollouts) -> [B]`` rewards of 0 or 1."""

    def verify(rollouts):
        reward = np.asarray(rule(rollouts), np.float32)
        return rollouts.replace(reward=reward, correct=reward)

    return verify


# ---- ghpo


def test_solved_prompts_are_not_asked_again(world):
    def never(*args):
        raise AssertionError("asked again")

    plain = gatherer(world, verify=judged_by(lambda r: np.arange(r.rows) % K == 0))
    gather = gatherer(world, verify=plain.verify, sampler=plain.sampler._replace(complete=never))
    _, batch = collected(world, "ghpo", gather, sentence="")
    _, expected = collected(world, "on_policy", plain, jax.random.fold_in(KEY, 0))
    np.testing.assert_array_equal(batch.completions, expected.completions)
    assert gather.watch.notes == {"hints/hard": 0, "hints/hard_after": 0, "hints/ratio": 0}
    assert batch.prompt_width == expected.prompt_width + T


def test_hard_prompts_get_the_beginning_of_their_solution(world):
    """Prompts 0 and 1 are never solved; prompt 2 is once its prompt is longer than it was."""
    workspace, run = world
    length = np.array(workspace.questions.train.length)

    def rule(rollouts):
        index, grown = np.asarray(rollouts.prompt), np.asarray(rollouts.prompt_length)
        hard = np.isin(index, order[:2]) | (np.isin(index, order[2:3]) & (grown == length[index]))
        return (np.arange(rollouts.rows) % K == 0) & ~hard

    order = gatherer(world).order(0, G, workspace.questions.train.tokens.shape[0])
    gather, batch = collected(world, "ghpo", gatherer(world, verify=judged_by(rule)), ratios=(0.5, 1.0), sentence="")
    notes = gather.watch.notes
    assert notes["hints/hard"] == 3 / G and notes["hints/hard_after"] == 2 / G and notes["hints/too_long"] == 0
    assert notes["hints/ratio"] == pytest.approx((1 + 1 + 0.5) / G)
    p = batch.prompt_width
    for group, share in enumerate((1.0, 1.0, 0.5, 0)):
        rows = slice(group * K, group * K + K)
        question = workspace.questions.train.examples[order[group]]
        solution = question.answer
        shown = question.question + solution[: round(share * len(solution))]
        ids = workspace.questions.tokenizer.encode(workspace.questions.tokenizer.render(shown))
        for row in range(*rows.indices(G * K)):
            assert batch.prompt_length[row] == len(ids)
            assert batch.tokens[row, p - len(ids) : p].tolist() == list(ids)
        assert len(set(batch.prompt[rows])) == 1 and batch.shared_prompt == K
    assert (batch.reward.reshape(G, K).sum(1) == [0, 0, 1, 1, 1, 1, 1, 1]).all()


def test_a_hint_that_does_not_fit_is_counted(world):
    gather, batch = collected(
        world, "ghpo", gatherer(world, verify=judged_by(lambda r: np.zeros(r.rows))), sentence="", room=1
    )
    assert gather.watch.notes["hints/too_long"] > 0 and batch.rows == G * K


def test_hints_begin_at_an_iteration(world):
    gather, _ = collected(
        world, "ghpo", gatherer(world, verify=judged_by(lambda r: np.zeros(r.rows))), start_hint_step=1
    )
    assert gather.watch.notes["hints/ratio"] == 0 and gather.watch.notes["hints/hard"] == 1


def test_what_ghpo_refuses(world, tmp_path):
    with pytest.raises(ValueError, match="ratios must name at least one"):
        make("ghpo", "protocol", ratios=())
    with pytest.raises(ValueError, match="ratios must grow"):
        make("ghpo", "protocol", ratios=(0.5, 0.25))
    with pytest.raises(ValueError, match="config.protocol.sentence.*!"):
        collected(world, "ghpo", gatherer(world, verify=judged_by(lambda r: np.zeros(r.rows))), sentence="!")
    with pytest.raises(ValueError, match="give it a second one"):
        tiny.run(tiny.config({"objective": dict(name="ghpo")}), tmp_path / "run")


# ---- adhint


def test_hinted_rows_begin_with_the_demonstration(world):
    verify = judged_by(lambda r: np.asarray(r.prompt) % 2)  # even prompts are never solved, odd ones always
    gather, batch = collected(world, "adhint", gatherer(world, verify=verify), hinted=2)
    hinted = batch.role == role_id("hinted")
    shown = world[0].questions.demonstrations(batch.prompt)
    hint = batch.per_token["hint_mask"] > 0
    lengths = hint.sum(1)
    whole = np.asarray(shown.mask).sum(1) - 1
    expected = np.round(np.where(batch.prompt % 2, 0.1, 0.9) * whole)
    assert (lengths[~hinted] == 0).all() and (lengths == np.where(np.arange(G * K) % K < 2, 0, expected)).all()
    assert (batch.completions[hint] == np.asarray(shown.completions)[hint]).all() and hint.any()
    assert (batch.mask >= hint).all() and (batch.group == np.repeat(np.arange(G), K)).all()
    assert len(set(batch.seed.tolist())) == G * K
    assert 0.1 < gather.watch.notes["hints/ratio"] < 0.9


def test_adhint_needs_rows_of_both_kinds():
    with pytest.raises(ValueError, match="at least one answer must begin with a hint and one without"):
        tiny.run(
            tiny.config({"objective": dict(name="adhint"), "protocol.name": "adhint", "protocol.hinted": 4}), "never"
        )


# ---- scope


def test_a_wrong_answer_is_repaired_from_the_first_wrong_step(world):
    """By the demonstration, a step a character: one answer of each prompt that had a wrong one."""
    gather, batch = collected(world, "scope", separator="")
    _, plain = collected(world, "on_policy")
    off = batch.per_token["off_mask"] > 0
    repaired = off.any(1)
    had_wrong = (plain.correct.reshape(G, K) == 0).any(1)
    assert (repaired.reshape(G, K).sum(1) == had_wrong).all() and had_wrong.any()
    assert (batch.correct[repaired] == 1).all()
    np.testing.assert_array_equal(batch.completions[~repaired], plain.completions[~repaired])
    own = (batch.mask > 0) & ~off
    np.testing.assert_array_equal(batch.completions[own], plain.completions[own])
    np.testing.assert_array_equal(batch.logp_beh[own], plain.logp_beh[own])
    assert not batch.logp_beh[off].any() and gather.watch.notes["repair/kept"] == had_wrong.mean()


def test_functions_of_the_user_score_and_correct(world):
    gather, batch = collected(
        world, "scope", prm=f"{__name__}:all_wrong", corrector=f"{__name__}:right_by_chance", separator=""
    )
    off = batch.per_token["off_mask"] > 0
    assert all((batch.mask[i] > 0).tolist() == off[i].tolist() for i in np.flatnonzero(off.any(1)))


def all_wrong(question, steps):
    return [0.0] * len(steps)


def right_by_chance(question, beginning):
    assert beginning == ""
    return "1"


def one_score(question, steps):
    return [1.0]


def fails(question, steps):
    raise RuntimeError("no scores today")


@pytest.mark.parametrize(
    ("function", "line"),
    (
        ("one_score", "config.protocol.prm must return a finite score of each of"),
        ("fails", "prm of config.protocol.prm: none of .* calls succeeded"),
    ),
)
def test_functions_that_do_not_do_their_part(world, function, line):
    with pytest.raises(ValueError, match=line):
        collected(world, "scope", prm=f"{__name__}:{function}", separator="")


def test_functions_that_are_not_there():
    with pytest.raises(ValueError, match="config.protocol.prm.*no function 'all_wrog'.*all_wrong"):
        make("scope", "protocol", prm=f"{__name__}:all_wrog")
    with pytest.raises(ValueError, match="config.protocol.corrector is called with"):
        make("scope", "protocol", corrector=f"{__name__}:judged_by")


# ---- fapo


def finds_flaws(question, answer):
    if answer.startswith("1"):
        raise RuntimeError("no answer")
    return 0 if answer.startswith("2") else -1


def test_only_right_answers_are_looked_into(world):
    verify = judged_by(lambda r: np.arange(r.rows) % 2)
    gather, batch = collected(world, "fapo", gatherer(world, verify=verify), genrm=f"{__name__}:finds_flaws")
    texts = gather.texts(batch)
    expected = [right and text.startswith("2") for right, text in zip(batch.correct, texts, strict=True)]
    assert batch.per_row["flawed"].tolist() == expected and 0 < sum(expected) < G * K
    assert gather.watch.notes["genrm/errors"] == sum(t.startswith("1") for t in texts[1::2])


def test_fapo_needs_its_function(tmp_path):
    with pytest.raises(ValueError, match="config.protocol.genrm names no function"):
        tiny.run(tiny.config({"objective": dict(name="fapo"), "protocol.name": "fapo"}), tmp_path / "run")


# ---- critique_grpo


def critic(question, answer, correct, reference):
    if answer.startswith("3"):
        raise RuntimeError("no words")
    return "1" if correct else "2"


def test_one_refinement_of_each_prompt_joins_its_group(world):
    request = "{answer}{critique}"
    verify = judged_by(lambda r: np.asarray(r.completions)[:, 0] % 2 == 0)
    gather, batch = collected(
        world, "critique_grpo", gatherer(world, verify=verify), critique=f"{__name__}:critic", request=request
    )
    plain = collected(world, "on_policy", gatherer(world, verify=verify), jax.random.fold_in(KEY, 0))[1]
    refined = batch.role == role_id("expert")
    assert (np.flatnonzero(refined) % K == 0).all() and refined.sum() == G
    np.testing.assert_array_equal(batch.completions[~refined], plain.completions[~refined])
    np.testing.assert_array_equal(batch.tokens[:, : batch.prompt_width], plain.tokens[:, : plain.prompt_width])
    ends = gather.options.eos_ids
    for i in np.flatnonzero(refined):
        said = batch.completions[i][batch.mask[i] > 0]
        assert said[-1] in ends and not batch.logp_beh[i].any()
    assert 0 < gather.watch.notes["critique/errors"] < G * K


def test_what_critique_grpo_refuses(world):
    with pytest.raises(ValueError, match="request must hold {critique}"):
        make("critique_grpo", "protocol", request="{answer}")
    with pytest.raises(ValueError, match="config.protocol.critique is called with"):
        make("critique_grpo", "protocol", critique=f"{__name__}:one_score")
    with pytest.raises(ValueError, match="config.protocol.critique must return a text"):
        collected(world, "critique_grpo", critique=f"{__name__}:says_nothing", request="{answer}{critique}")


def says_nothing(question, answer, correct, reference):
    return 7


# ---- demonstrations


def test_demonstrations_join_the_group_of_their_prompt(world):
    gather, batch = collected(world, "demonstrations", experts=2, drop_last=1.0)
    expert = batch.role == role_id("expert")
    assert (expert.reshape(G, K) == [False, False, True, True]).all()
    assert (batch.group == np.repeat(np.arange(G), K)).all() and (
        batch.prompt.reshape(G, K) == batch.prompt[::K, None]
    ).all()
    shown = world[0].questions.demonstrations(batch.prompt, 1.0, 0)
    np.testing.assert_array_equal(batch.completions[expert], np.asarray(shown.completions)[expert])
    assert gather.watch.notes["expert/reward"] == batch.reward[expert].mean() == 0


def test_demonstrations_that_are_too_long_are_told_before_anything_is_sampled(world):
    with pytest.raises(ValueError, match="config.sampling.max_new_tokens 1 is too short for demonstrations"):
        tiny.run(
            tiny.config({"objective": dict(name="luffy"), "sampling.max_new_tokens": 1, "warm_start.steps": 0}), "never"
        )
