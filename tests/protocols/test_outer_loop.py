"""An iteration as one step of an outer optimizer: what is measured, and how it is scaled."""

import jax
import numpy as np
import pytest

from jaxpo.batch import Rollouts, TokenStats, take
from jaxpo.config.resolve import resolve
from jaxpo.learning.programs import policy_of
from jaxpo.learning.state import Run, TrainState
from jaxpo.objectives import evaluate, make
from jaxpo.protocols.gatherer import Watch
from jaxpo.protocols.outer_loop import outer_step
from jaxpo.runs.gatherer import make_gatherer
from jaxpo.runs.workspace import setup
from tests.protocols.fake_gatherer import fake
from tests.runs import tiny

BATCH = Rollouts(
    mask=np.array([[1, 1], [1, 0], [1, 1], [1, 1]], np.float32),
    count=np.array([1, 1, 2, 0], np.float32),
    reward=np.array([1, 0, 0.5, 9], np.float32),
    logp_old=np.array([[-1, -2], [-1, np.nan], [-3, -1], [np.nan, np.nan]], np.float32),
)
NEW = np.array([[-0.5, -2.5], [-2, np.nan], [-2, -1], [-50, 3]], np.float32)


def test_an_outer_step_by_hand():
    """A row that counts twice counts twice, one that does not count may hold anything, and so may padding."""
    out = outer_step(BATCH, NEW, 20.0)

    def k3(x):
        return np.exp(x) - 1 - x

    assert out["kl"] == pytest.approx((k3(0.5) + k3(-0.5) + k3(-1) + 2 * k3(1) + 2 * k3(0)) / 7, rel=1e-6)
    assert out["return"] == pytest.approx((1 + 0 + 2 * 0.5) / 4)
    weight = np.array([1, np.exp(-1), 2 * np.exp(1)])  # of sequences
    assert out["return_new"] == pytest.approx((weight * [1, 0, 0.5]).sum() / weight.sum(), rel=1e-6)
    assert out["effective_rows"] == pytest.approx(weight.sum() ** 2 / (weight**2).sum(), rel=1e-6)


def test_log_ratios_are_bounded():
    out = outer_step(BATCH.replace(count=np.array([1, 0, 0, 0])), NEW + 1000, 2.0)
    assert out["kl"] == pytest.approx(np.exp(2) - 3, rel=1e-6) and out["effective_rows"] == pytest.approx(1)


def test_nothing_moved():
    out = outer_step(BATCH, BATCH.logp_old, 20.0)
    assert out == {"kl": 0, "return": 0.5, "return_new": 0.5, "effective_rows": pytest.approx(16 / 6)}


@pytest.mark.parametrize("plain", (False, True))
def test_the_anchor_as_the_sampler_recorded_it(plain):
    """Where the loop did not score it: that of the plain policy, if what was sampled was another distribution."""
    per_row = {} if plain else {"logp_sampler": BATCH.logp_old}
    batch = BATCH.replace(logp_old=None, logp_beh=BATCH.logp_old - (0 if plain else 3), per_token=per_row)
    assert outer_step(batch, NEW, 20.0) == outer_step(BATCH, NEW, 20.0)


def test_what_is_noted():
    notes, params = {}, object()
    run = Run(type("State", (), {"params": params})())

    def noise(given, rollouts):
        assert given is run and rollouts is BATCH
        return {"noise": np.float32(0.5), "gradient_cosine": np.float32(0.25)}

    def score(given, rollouts):
        assert given is params
        return TokenStats(logp=NEW)

    gatherer = fake(noise=noise, score=score, note=notes.__setitem__)
    protocol = make("ppo_outer_loop", "protocol")
    assert protocol.before(run, gatherer, BATCH) == (run, BATCH) and protocol.after(run, gatherer, BATCH) is run
    expected = {f"outer/{name}": value for name, value in outer_step(BATCH, NEW, 20.0).items()}
    assert notes == expected | {"outer/noise": 0.5, "outer/gradient_cosine": 0.25}
    assert make("ppo_outer_loop", "protocol", gradient_noise=False).before is None


ODD = {"objective": {"name": "ppo_outer_loop"}, "rollout.prompts": 3, "training.minibatches": 3, "warm_start.batch": 8}


def test_a_batch_that_cannot_be_halved():
    with pytest.raises(ValueError, match="config.rollout.prompts 3 cannot be halved.*config.protocol.gradient_noise"):
        resolve(tiny.config(ODD), 1)
    resolve(tiny.config(ODD | {"protocol": {"name": None, "gradient_noise": False}}), 1)


@pytest.mark.parametrize(
    ("objective", "minibatches"), (("ppo_outer_loop", 1), pytest.param("clip_cov", 4, marks=pytest.mark.slow))
)
def test_noise_is_that_of_the_gradients_of_half_batches(objective, minibatches):
    """The same numbers from the plain gradients of the even and of the odd groups, each a batch of its own; in slices
    no larger than a minibatch."""
    with tiny.quick():
        changes = {"objective": {"name": objective}, "training.minibatches": minibatches}
        workspace = setup(tiny.config(changes), report=lambda text: None)
        gatherer = make_gatherer(workspace, Watch())
        params, old = (workspace.init_params(jax.random.key(i)) for i in (0, 1))
        rollouts = gatherer.generate(old, np.arange(8, dtype=np.int32), jax.random.key(2))
        outcome = np.random.default_rng(0).integers(0, 2, rollouts.rows).astype(np.float32)
        rollouts = rollouts.replace(reward=outcome, correct=outcome, logp_old=gatherer.score(old, rollouts).logp)
        run = Run(TrainState(params, None, workspace.objective.init()))
        noise = {name: float(x) for name, x in gatherer.noise(run, rollouts).items()}
        policy = policy_of(workspace.model, workspace.config, workspace.objective)

        def gradient(first):
            groups = np.arange(first, 8, 2)
            rows = (groups[:, None] * 4 + np.arange(4)).reshape(-1)
            half = take(jax.tree.map(np.asarray, rollouts), rows)

            def loss(p):
                return evaluate(workspace.objective, lambda batch: policy(p, batch), half)[0]

            leaves = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
            return np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in leaves])

        g1, g2 = gradient(0), gradient(1)
    assert np.linalg.norm(g1) > 1e-3 and np.linalg.norm(g2) > 1e-3
    variance, square = np.sum((g1 - g2) ** 2) / 4, np.sum((g1 + g2) ** 2) / 4
    assert noise["noise"] == pytest.approx(variance / square, rel=1e-3)
    assert noise["gradient_cosine"] == pytest.approx(
        g1 @ g2 / np.linalg.norm(g1) / np.linalg.norm(g2), rel=1e-3, abs=1e-5
    )


# ---- the recipe -----------------------------------------------------------------------------------------------------


def test_co_scaling():
    plan = make("ppo_outer_loop", "diagnostic", scale=4, prompts=32, minibatches=2, epochs=3, learning_rate=1e-5)
    assert plan == {
        "rollout.prompts": 128,
        "training.minibatches": 8,
        "training.epochs": 3,
        "optimizer.learning_rate": 1e-5,
        "prompts_per_minibatch": 16,
        "optimizer_steps": 24,
    }
    one = make("ppo_outer_loop", "diagnostic", scale=1, prompts=32, minibatches=2, epochs=3, learning_rate=1e-5)
    assert one["prompts_per_minibatch"] == plan["prompts_per_minibatch"] and one["optimizer_steps"] == 6


def test_the_plan_is_config():
    plan = make("ppo_outer_loop", "diagnostic", scale=2, prompts=8, minibatches=2, epochs=2, learning_rate=1e-3)
    resolve(tiny.config({path: value for path, value in plan.items() if "." in path}), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (dict(scale=0), "scale must be a whole number of at least 1, not 0"),
        (dict(scale=1.5), "scale must be a whole number"),
        (dict(scale=2, prompts=10, minibatches=4), "minibatches 4 does not divide prompts 10"),
        (dict(scale=2, learning_rate=0.0), "learning_rate must be a positive number"),
    ),
)
def test_plans_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make("ppo_outer_loop", "diagnostic", **options)


# ---- a whole run ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run(tmp_path):
    changes = {"objective": {"name": "ppo_outer_loop"}, "evaluation.pass_at": (), "evaluation.every": 100}
    with tiny.quick():
        run = tiny.run(tiny.config(changes), tmp_path / "run")
    assert "AGAIN" not in run.printed
    assert {f.name: f.compilations for f in run.result.workspace.programs.compiled}["noise"] == 1
    for line in tiny.trained(run.path):
        assert line["outer/kl"] > 0 and -1 <= line["outer/gradient_cosine"] <= 1 and line["outer/noise"] >= 0
        assert line["outer/return"] == pytest.approx(line["reward/mean"], abs=1e-5)
        assert 1 <= line["outer/effective_rows"] <= 32 and 0 <= line["outer/return_new"] <= 1
