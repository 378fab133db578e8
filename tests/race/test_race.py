"""A race of objectives over seeds: tiny ones, on the toy task and with a verifier on the host."""

import functools
import json

import numpy as np
import pytest

from experiments.race import folder, main
from jaxpo.calls import parse_calls
from jaxpo.objectives import make, policy_gradient
from jaxpo.objectives.grammar.base import Gathering
from jaxpo.objectives.parts import advantages, critics, ratios, surrogates
from jaxpo.primitives.aggregation import token_mean
from jaxpo.race import race as racing
from jaxpo.race.contenders import fill, select
from jaxpo.race.race import race
from jaxpo.race.results import interval
from jaxpo.race.rules import Rules, check_fit, resolved_by
from jaxpo.race.seeds import only_samples
from jaxpo.race.setup import draws

TINY = dict(
    seeds=2,
    steps=2,
    prompts=4,
    responses=4,
    minibatches=2,
    evaluations=2,
    warm_start=3,
    warm_batch=8,
    width=8,
    layers=1,
)
FLAGS = [f"--{name}={value}" for name, value in TINY.items()]


@pytest.fixture(autouse=True, scope="module")
def one_setup():
    """Sampler and warm start are compiled once for the tests that race by the same rules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(racing, "set_up", functools.cache(racing.set_up))
        yield


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A race from the command line: folder, results."""
    out = tmp_path_factory.mktemp("race")
    return out, main(["--objectives=grpo,grpo(eps_high=0.3)", f"--out={out}", *FLAGS])


@pytest.mark.slow
def test_the_folder_holds_what_was_returned(first):
    out, results = first
    held = json.loads((out / "results.json").read_text())
    assert list(held["objectives"]) == ["grpo", "grpo(eps_high=0.3)"] and held["points"] == [0, 1, 2]
    assert held["objectives"] == results.objectives and held["rules"]["width"] == 8
    for result in held["objectives"].values():
        assert np.shape(result["curve"]) == (3, 2) and result["curve"][-1] == result["final"]
        np.testing.assert_allclose(
            result["area"], np.mean(np.stack([result["curve"][:-1], result["curve"][1:]]), (0, 1))
        )
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_objective_starts_alike_and_seeds_differ(first):
    grpo, other = first[1].objectives.values()
    assert grpo["curve"][0] == other["curve"][0]
    a, b = (draws(Rules(**TINY), 100, i) for i in (0, 1))
    assert not np.array_equal(a.prompt[0], a.prompt[1]) and not np.array_equal(a.prompt, b.prompt)


@pytest.mark.slow
def test_a_second_call_runs_only_what_is_missing(first, monkeypatch):
    out, results = first
    ran = []
    canned = results.objectives["grpo"]
    monkeypatch.setattr(racing, "run", lambda contender, *_: ran.append(contender.label) or canned)
    again = race("grpo,reinforce", out=out, **TINY)
    assert ran == ["reinforce"] and set(again.objectives) == {*results.objectives, "reinforce"}
    with pytest.raises(ValueError, match="is of a race with steps=2, and this one has steps=3"):
        race("grpo", out=out, **{**TINY, "steps": 3})


@pytest.mark.slow
def test_an_objective_of_the_users_own_and_the_same_numbers_again(first):
    results = race({"mine": make("grpo")}, **TINY)
    assert results.objectives["mine"]["curve"] == first[1].objectives["grpo"]["curve"]


def test_an_objective_that_trains_a_value_head_races():
    critic = policy_gradient(
        advantage=advantages.gae(),
        ratio=ratios.token(),
        surrogate=surrogates.clipped(0.2, 0.2),
        aggregate=token_mean,
        terms=[critics.clipped_value()],
    )
    results = race({"critic": critic}, **TINY | {"minibatches": 1})  # so the stage asks whether it must score at all
    assert np.isfinite(results.objectives["critic"]["curve"]).all()


@pytest.mark.slow
def test_the_seeds_of_a_race_are_what_one_seed_gives(first):
    """``vmap`` over seeds changes nothing: seed 0 of two is the only seed of one."""
    alone = race("grpo", **{**TINY, "seeds": 1})
    together = np.asarray(first[1].objectives["grpo"]["curve"])[:, :1]
    np.testing.assert_allclose(alone.objectives["grpo"]["curve"], together, atol=0.02)


@pytest.mark.slow
def test_rewards_by_a_verifier_on_the_host(capsys):
    words = "dataset='spell_backward', min_word_len=3, max_word_len=3, train_size=40, test_size=10, prompt_field='word'"
    rules = {**TINY, "seeds": 1, "steps": 1, "evaluations": 1, "warm_start": 0, "minibatches": 1, "drop_last": 0.0}
    results = race("grpo", task=f"reasoning_gym({words})", **rules)
    assert np.shape(results.objectives["grpo"]["curve"]) == (2, 1)
    results.show()
    assert "grpo" in capsys.readouterr().out


def test_as_many_completions_in_the_shape_that_a_protocol_accepts():

    def run(name, **changes):
        return resolved_by(Rules(**TINY), name, make(name)._replace(**changes), 4)

    def shape(name):
        rollout = run(name).config.rollout
        return rollout.prompts, rollout.responses

    assert shape("spo_single_stream") == (16, 1) and shape("dapo") == (4, 4)
    assert only_samples(run("grpo")) and only_samples(run("ppo_outer_loop")) and not only_samples(run("dapo"))
    with pytest.raises(ValueError, match="'replay' trains on earlier batches"):
        check_fit(run("r2vpo", protocol=Gathering("replay")))


PROTOCOLS = ("dapo", *[pytest.param(n, marks=pytest.mark.slow) for n in ("hapo", "spo_single_stream", "spo_segment")])


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocols_gather_for_each_seed(name):
    results = race(name, **TINY, learning_rate=1e-3)
    result = results.objectives[name]
    assert np.shape(result["curve"]) == (3, 2) and result["sampled"] > 16  # refills, offline samples, cutpoints


@pytest.mark.slow
def test_a_seed_without_mixed_groups_trains_on_nothing():
    """A policy that is always wrong: the protocol gives up, nothing is trained on, and the table says so."""
    nothing = {**TINY, "seeds": 1, "warm_start": 0, "drop_last": 0.0}
    result = race("dapo", **nothing).objectives["dapo"]
    assert result["idle"] == 2 and result["skipped"] == 0


def test_all_says_who_does_not_race_and_why():
    racing_, left_out = select("all", Rules(), 8)
    labels = {c.label for c in racing_}
    assert {"grpo", "gtpo", "r2vpo", "canon"} <= labels and "sft" in left_out
    assert all(left_out.values()) and not labels & set(left_out)


def test_hyperparameters_that_are_a_share_of_the_budget():
    assert fill("dapo", {}, 100, 32)["max_len"] == 32
    assert fill("dapo", {"max_len": 5}, 100, 32)["max_len"] == 5
    assert fill("d3s", {}, 100, 32) != fill("d3s", {}, 50, 32)


def test_intervals():
    mean, low, high = interval([0.4, 0.5, 0.6])
    assert mean == pytest.approx(0.5) and high - mean == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-5)
    assert np.isnan(interval([0.5])[1]) and interval([0.0, 1.0])[1:] == (0.0, 1.0) and low < mean


@pytest.mark.parametrize(
    "arguments,message",
    (
        (["--objectives=grop"], "did you mean 'grpo'"),
        (["--objectives=grpo,grpo"], "'grpo' is given twice"),
        (["--objectives=grpo(eps_hi=0.3)"], "eps_high"),
        (["--objectives=grpo(0.3)"], "with every option named"),
        (["--objectives=import os"], "is no list like"),
        (["--objectives=sft"], "none can race"),
        (["--sedes=3"], "did you mean '--seeds'"),
        (["--seeds=0"], "seeds must be a whole number of at least 1, not 0"),
        (["--minibatches=5"], "minibatches 5 does not divide prompts 16"),
        (["--task=toy(digit=3)"], "digits"),
        (["--task=toi"], "toy"),
        (["--max_new_tokens=1"], "too short"),
    ),
)
def test_errors_are_one_line_and_name_the_nearest(arguments, message):
    with pytest.raises(SystemExit, match="error: ") as error:
        main(arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_rules_are_named():
    with pytest.raises(ValueError, match="did you mean 'steps'"):
        race("grpo", step=3)


def test_parse_calls():
    assert parse_calls("grpo, grpo(eps_high=0.3)") == [
        ("grpo", "grpo", {}),
        ("grpo(eps_high=0.3)", "grpo", {"eps_high": 0.3}),
    ]


def test_the_default_folder_is_of_the_rules():
    assert folder(Rules()) == folder(Rules()) != folder(Rules(steps=61)) and folder(Rules()).startswith(
        "races/toy_5x60_"
    )
