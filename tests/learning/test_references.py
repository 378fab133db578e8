"""Every frozen reference by hand: what it holds at the start, and what after each iteration; half steps and stages."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from jax.random import key

from jaxpo.batch import Rollouts
from jaxpo.learning import references
from jaxpo.learning.needs import references_of
from jaxpo.learning.state import Run, TrainState
from jaxpo.objectives import make
from jaxpo.protocols.gatherer import Verdict
from jaxpo.protocols.protocol import Facts, Protocol
from jaxpo.runs.iteration import Stage, learn
from tests.protocols.fake_gatherer import fake


def theta(x):
    return {"w": jnp.full(2, float(x))}


def value(frozen):
    return float(frozen["w"][0])


def trajectory(keeps, needed=(), iterations=6):
    """The references at the start and after each iteration, of one step, of a policy that is theta(i) after
    iteration i."""
    frozen = references.held(list(needed), keeps, theta(0), None)
    out = [frozen]
    for i in range(1, iterations + 1):
        frozen = references.moved(references.moved(frozen, keeps, theta(i)), keeps, theta(i), i)
        out.append(frozen)
    return out


def test_reference_stays_or_is_renewed_once_a_round():
    assert [value(s["ref"]) for s in trajectory({}, ["ref"])] == [0] * 7
    assert [value(s["ref"]) for s in trajectory({"ref": {"every": 3}})] == [0, 0, 0, 3, 3, 3, 6]


def test_previous_iterate():
    assert [value(s["prev"]) for s in trajectory({}, ["prev"])] == [0, 1, 2, 3, 4, 5, 6]
    assert [value(s["prev"]) for s in trajectory({"prev": {"every": 2}})] == [0, 0, 2, 2, 4, 4, 6]


@pytest.mark.parametrize("b", [0.0, 0.5, 1.0])
def test_average_of_weights(b):
    expected = [0.0]
    for i in range(1, 7):
        expected.append((1 - b) * i + b * expected[-1])
    assert [value(s["ema"]) for s in trajectory({"ema": {"b": b}})] == pytest.approx(expected)


def test_of_all_references_the_average_alone_moves_with_each_optimizer_step():
    """Two minibatches in two epochs are four steps (Nash-EMA: "after every step")."""
    keeps, policy = {"ema": {"b": 0.5}, "pool": {"size": 2, "every": 1}}, iter(range(1, 5))
    stage = Stage(
        objective=make("reinforce"),
        protocol=Protocol(None, facts=Facts(references=keeps)),
        steps=4,
        score=None,
        prepare=lambda batch, memory: (batch, memory),
        update=lambda state, batch, rows, fresh: (state.replace(params=theta(next(policy))), {}),
    )
    start = run_at(0, 0, references.held(["ref", "prev"], keeps, theta(0), None))
    run, _, steps = learn(stage, start, Rollouts(mask=np.ones((4, 1))), lambda batch: [np.arange(4)] * 4)
    assert len(steps) == 4 and value(run.state.params) == 4
    assert value(run.references["ema"]) == 4 / 2 + 3 / 4 + 2 / 8 + 1 / 16
    assert value(run.references["ref"]) == value(run.references["prev"]) == value(run.references["pool"]["1"]) == 0
    after = references.moved(run.references, keeps, run.state.params, 1)
    assert after["ema"] is run.references["ema"] and value(after["prev"]) == value(after["pool"]["1"]) == 4


def test_pool_is_a_ring_whose_first_place_stays():
    steps = trajectory({"pool": {"size": 3, "every": 2}}, iterations=8)
    assert [tuple(value(s["pool"][str(i)]) for i in range(3)) for s in steps] == [
        (0, 0, 0), (0, 0, 0), (0, 2, 0), (0, 2, 0), (0, 2, 4), (0, 2, 4), (0, 6, 4), (0, 6, 4), (0, 6, 8)
    ]  # fmt: skip
    assert [references.stored({"pool": {"size": 3, "every": 2}}, i) for i in range(8)] == [1, 1, 2, 2, 3, 3, 3, 3]


def test_references_share_one_copy_at_the_start():
    frozen = trajectory({"ema": {}, "pool": {}}, ["ref", "prev"])[0]
    assert frozen["ref"]["w"] is frozen["prev"]["w"] is frozen["ema"]["w"] is frozen["pool"]["0"]["w"]
    assert references.scored(make("inpo"), frozen).keys() == {"ref", "prev"}


def test_unknown_references_options_and_those_without_effect():
    with pytest.raises(ValueError, match="did you mean 'pool'"):
        references.check(make("dpo"), {"poll": {}})
    with pytest.raises(ValueError, match="did you mean 'every'"):
        references.check(make("inpo"), {"prev": {"evry": 2}})
    with pytest.raises(ValueError, match="prev_every has no effect"):
        references.check(make("dpo"), make("judged", "protocol", prev_every=2).facts.references)
    references.check(make("inpo"), make("judged", "protocol", prev_every=2).facts.references)
    assert references_of(make("inpo"), make("judged", "protocol").facts.provides) == ["prev", "ref"]


# ---- protocols that move the weights


def run_at(iteration, params, frozen, opt_state=7.0):
    return Run(TrainState(theta(params), {"m": jnp.asarray(opt_state)}, None), frozen, iteration=iteration)


@pytest.fixture
def samplers(monkeypatch):
    """Who sampled: the policies by their weight, as the protocols of pairs call them."""
    said = []

    def sampled(run, gather, who, indices, key):
        said.append(value(who.params(run)))
        return types.SimpleNamespace(shared_prompt=2)

    monkeypatch.setattr("jaxpo.protocols.comparisons.sampled", sampled)
    monkeypatch.setattr("jaxpo.protocols.comparisons.arranged", lambda *args: "batch")
    return said


def gatherer(objective):
    verdict = Verdict(np.zeros((1, 4)), np.full((1, 4, 4), 0.5))
    return fake(
        draw=lambda run, n: (run, np.zeros(1, int)),
        judge=lambda *columns: verdict,
        note=lambda *x: None,
        prompts=1,
        responses=2,
        objective=make(objective),
    )


def test_extragradient_samples_with_the_half_step_and_steps_from_where_it_began(samplers):
    protocol = make("egpo", "protocol")
    run, batch = protocol.collect(run_at(0, 1, {}), gatherer("egpo"), key(0))
    assert batch == "batch" and samplers == [1, 1] and value(run.state.params) == 1
    assert value(run.references["center"]["params"]) == 1 and float(run.references["center"]["opt_state"]["m"]) == 7
    assert run.references["center"]["params"]["w"] is not run.state.params["w"]  # which the step donates
    half = run_at(1, 1.5, run.references, opt_state=8.0)
    run, _ = protocol.collect(half, gatherer("egpo"), key(0))
    assert samplers[2:] == [1.5, 1.5]
    assert value(run.state.params) == 1 and float(run.state.opt_state["m"]) == 7


def test_mirror_prox_plays_against_the_center_and_then_against_the_half_step(samplers):
    protocol, frozen, policy, opponents, starts = make("nash_mp", "protocol", stage=2), {}, 1.0, [], []
    for iteration in range(5):
        run, _ = protocol.collect(run_at(iteration, policy, frozen), gatherer("nash_mp"), key(0))
        own, opponent = samplers[-2:]
        assert own == value(run.state.params)
        opponents.append(opponent)
        starts.append(own)
        frozen, policy = run.references, value(run.state.params) + 0.25  # an optimizer step
    assert starts == [1, 1.25, 1, 1.25, 1.5] and opponents == [1, 1, 1.5, 1.5, 1.5]
    logp = types.SimpleNamespace(logp="center's")
    scored = fake(score=lambda params, rollouts: logp if value(params) == 1.5 else None)
    changed = types.SimpleNamespace(replace=lambda **fields: fields)
    assert protocol.before(run, scored, changed)[1] == {"logp_old": "center's"}


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_extrapolation_of_iterates(alpha):
    protocol = make("apo_accelerated", "protocol", alpha=alpha, iterations=2)
    start = {"hat": theta(1), "ref": theta(1)}
    run = protocol.after(run_at(0, 2, start), None, None)
    assert value(run.state.params) == 2 and value(run.references["ref"]) == 1  # the round is not over
    run = protocol.after(run_at(1, 3, start), None, None)
    policy = 3 + alpha * (3 - 1)
    assert value(run.state.params) == policy == value(run.references["ref"]) and value(run.references["hat"]) == 3
    assert run.references["ref"]["w"] is not run.state.params["w"]


@pytest.mark.parametrize(
    "protocol, options, message",
    [
        ("apo_accelerated", dict(alpha=1.0), r"alpha must be a number in \[0, 1\), not 1.0"),
        ("apo_accelerated", dict(source="dta"), "data"),
        ("nash_mp", dict(stage=0), "stage must be"),
        ("egpo", dict(pairs="best"), "best_worst"),
        ("seppo", dict(size=1), "size must be"),
        ("preference_data", dict(rejected="none"), "policy"),
        ("judged", dict(ref_every=0), "ref_every must be"),
        ("nash_ema", dict(b=1.5), r"b must be a number in \[0, 1\], not 1.5"),
        ("ipo_md", dict(beta=-1), r"beta must be a number in \[0, 1\], not -1"),
        ("rso", dict(n=3), "even number"),
        ("rso", dict(beta=0), "beta must be a positive number, not 0"),
    ],
)
def test_options_out_of_range(protocol, options, message):
    with pytest.raises(ValueError, match=message):
        make(protocol, "protocol", **options)


def test_what_the_protocols_ask_of_the_config():
    def check(protocol, **fields):
        config = types.SimpleNamespace(steps=fields.get("steps", 4), rollout=types.SimpleNamespace(responses=2))
        make(protocol, "protocol").facts.check(config)

    check("egpo")
    with pytest.raises(ValueError, match="must be even"):
        check("egpo", steps=3)
    with pytest.raises(ValueError, match="multiple of 8"):
        check("nash_mp")
    with pytest.raises(ValueError, match="candidates"):
        check("rso")
