"""A policy and its critic: a head on the trunk with an optimizer of its own, through a run that stops and goes on."""

import jax
import numpy as np
import pytest

from jaxpo import registry
from jaxpo.objectives import policy_gradient
from jaxpo.objectives.parts import advantages, critics, ratios, surrogates
from jaxpo.primitives.aggregation import token_mean
from jaxpo.runs.workspace import setup
from jaxpo.storage.checkpoint import restore_params
from tests.runs import tiny

OPTIMIZER = {"name": "adam", "learning_rate": 0.5, "clip_norm": None, "schedule": {"name": "constant"}}
CRITIC = {
    "objective": {"name": "actor_critic"},
    "optimizers.critic": OPTIMIZER,
    "evaluation.pass_at": (),
    "steps": 2,
    "checkpoint.every": 1,
}


def actor_critic():
    """PPO with a critic, of the parts that `jaxpo` has."""
    return policy_gradient(
        advantage=advantages.gae(),
        ratio=ratios.token(),
        surrogate=surrogates.clipped(0.2, 0.2),
        aggregate=token_mean,
        terms=[critics.clipped_value(coef=0.1)],
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
