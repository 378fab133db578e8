"""A policy and its critic, a head on the trunk or a model of its own, through a run that stops and goes on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo import registry
from jaxpo.config.resolve import resolve
from jaxpo.learning.trainable import policy_alone, random_critic
from jaxpo.objectives import policy_gradient
from jaxpo.objectives.parts import advantages, critics, ratios, regularizers, surrogates
from jaxpo.parallel import make_mesh
from jaxpo.plan import trace
from jaxpo.policy import heads, hf
from jaxpo.policy.stats import completion_hidden
from jaxpo.primitives.aggregation import token_mean
from jaxpo.protocols.rows import as_scored
from jaxpo.runs.models import load_models
from jaxpo.runs.restore import first_params, open_finished
from jaxpo.runs.workspace import setup
from jaxpo.storage.checkpoint import restore_params
from tests.runs import tiny
from tests.runs.test_other_models import FOREIGN, QUICK, REWARD, save_folder, save_run, scored

OPTIMIZER = {"name": "adam", "learning_rate": 0.5, "clip_norm": None, "schedule": {"name": "constant"}}
CRITIC = {
    "objective": {"name": "actor_critic"},
    "optimizers.critic": OPTIMIZER,
    "evaluation.pass_at": (),
    "steps": 2,
    "checkpoint.every": 1,
}


def actor_critic(beta=0.0):
    """PPO with a critic, of the parts that `jaxpo` has."""
    return policy_gradient(
        advantage=advantages.gae(),
        ratio=ratios.token(),
        surrogate=surrogates.clipped(0.2, 0.2),
        aggregate=token_mean,
        terms=[critics.clipped_value(coef=0.1)],
        regularizers=[(beta, regularizers.kl_to_reference())],
    )


@pytest.fixture(autouse=True, scope="module")
def registered():
    entry = registry.Entry("objective", "actor_critic", actor_critic, "", {})
    with tiny.quick(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._TABLE, ("objective", "actor_critic"), entry)
        yield


def test_the_critic_moves_by_its_own_rate_and_a_resumed_run_is_the_same(tmp_path):
    whole = tiny.run(tiny.config(CRITIC), tmp_path / "whole")
    start = whole.result.workspace.init_params(jax.random.key(0))["heads"]["value"]["bias"]
    params = whole.result.params
    assert abs(float(params["heads"]["value"]["bias"] - start)) > 0.02  # more than the policy's rate allows in 8 steps
    tiny.run(tiny.config(CRITIC | {"steps": 1}), tmp_path / "parts")
    again = tiny.run(tiny.config(CRITIC), tmp_path / "parts", resume=True)
    tiny.assert_same_params(again.result.params, params)
    moments = [restore_params(path / "checkpoints", name="opt_state")[0] for path in (again.path, whole.path)]
    tiny.assert_same_params(*moments)
    assert np.isfinite(float(params["heads"]["value"]["bias"]))


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Models that a critic of its own may start from, wider than the policy: a reward model and a plain folder."""
    root = tmp_path_factory.mktemp("starts")
    save_run(root / "reward", REWARD)
    save_folder(root / "folder")
    return root


@pytest.mark.parametrize("kind", ["reward", "folder"])
@pytest.mark.parametrize("packing", [False, True])
def test_values_are_those_of_the_model_that_the_critic_starts_from(starts, kind, packing):
    changes = {"critic.path": str(starts / kind), "training.packing": packing, "policy_temperature": 1.0}
    workspace, batch = scored(tiny.config(QUICK | CRITIC | changes))
    assert set(workspace.resolved.heads) == set() and workspace.critic.model.config.width == 24
    rows = jax.tree.map(jnp.asarray, as_scored(batch).replace(per_token={}))
    params = first_params(workspace, jax.random.key(0))
    inside = np.asarray(batch.mask) > 0
    if kind == "folder":
        assert not np.asarray(batch.value_old)[inside].any()  # a new head gives 0
        model, expected = hf.open_source(starts / kind), params["critic"]
        tiny.assert_same_params({k: v for k, v in expected.items() if k != "heads"}, hf.load(model, FOREIGN))
        return
    model, theirs, _ = open_finished(str(starts / kind), examples=False)
    tiny.assert_same_params(params["critic"]["heads"]["value"], theirs["heads"]["score"])
    hidden = completion_hidden(model.model, theirs, rows)[:, : rows.width]
    expected = heads.apply(theirs, "score", hidden)
    np.testing.assert_allclose(np.asarray(batch.value_old)[inside], expected[inside], rtol=1e-5, atol=1e-5)


def test_a_critic_of_its_own_learns_by_its_own_rate_and_resumes_to_the_bit(starts, tmp_path):
    """The policy of the run samples, is evaluated and copied as its reference without the critic."""
    changes = CRITIC | {"critic.path": str(starts / "reward"), "objective": {"name": "actor_critic", "beta": 0.1}}
    whole = tiny.run(tiny.config(changes), tmp_path / "whole")
    assert "AGAIN" not in whole.printed
    start = open_finished(str(starts / "reward"), examples=False)[1]
    trained = whole.result.params["critic"]
    for name in ("embedding", "heads"):
        before, after = (jax.tree.leaves(tree[name])[0] for tree in (start, trained))
        assert np.abs(np.asarray(after) - np.asarray(before)).max() > 0.1  # more than the policy's rate allows
    tiny.run(tiny.config(changes | {"steps": 1}), tmp_path / "parts")
    again = tiny.run(tiny.config(changes), tmp_path / "parts", resume=True)
    tiny.assert_same_params(again.result.params, whole.result.params)
    workspace, params, _ = open_finished(str(whole.path))  # a finished run does not need its critic
    assert workspace.critic is None and "critic" not in params
    tiny.assert_same_params(params, policy_alone(whole.result.params))


def test_a_plan_counts_the_critic(starts):
    config = tiny.config(QUICK | CRITIC | {"critic.path": str(starts / "folder"), "mesh.data": 1, "mesh.fsdp": 2})
    resolved = resolve(config, 2)
    run = trace.trace_run(resolved, make_mesh(dict(data=1, fsdp=2), tiny.DEVICES[:2]), trace.data_of(resolved))
    shapes = jax.eval_shape(partial(random_critic, FOREIGN), jax.random.key(0))
    assert jax.tree.map(jnp.shape, run.state["params"]["critic"]) == jax.tree.map(jnp.shape, shapes)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"objective": {"name": "grpo"}}, "config.critic.path has no effect: objective 'grpo' asks for no values"),
        ({"critic.path": "nowhere"}, "config.critic.path 'nowhere' does not exist: it is a model folder, a GGUF"),
        ({"protocol": {"name": "apo_accelerated"}}, "moves the policy by its reference"),
    ),
)
def test_a_critic_of_its_own_that_is_refused(starts, changes, message):
    with pytest.raises(ValueError, match=message):
        setup(tiny.config(CRITIC | {"critic.path": str(starts / "folder")} | changes), load_models=load_models)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"objective": {"name": "grpo"}}, "config.optimizers.critic has no effect: no term of objective 'grpo' trains"),
        ({"optimizers.critic.name": None}, "config.optimizers.critic has no effect without a name"),
        (
            {"optimizers.critic.learning_rate": None},
            "optimizers.critic.learning_rate must be a positive number, not None",
        ),
        ({"optimizers.critic.b3": 0.5}, "unknown field of config.optimizers.critic .*'b3'.*did you mean .*'b1'"),
    ),
)
def test_an_optimizer_without_effect_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        setup(tiny.config(CRITIC | changes), report=lambda _: None)
