"""A run holds the policy of the start of each iteration where an objective compares the policy with it (`lp_reg`)."""

import numpy as np
import pytest

from jaxpo.batch import Compared
from jaxpo.config.resolve import resolve
from jaxpo.learning.needs import compared_of, copies_of, references_of
from jaxpo.objectives import Asks, Term, from_terms
from jaxpo.parallel import make_mesh
from jaxpo.plan import trace
from jaxpo.race.race import race
from jaxpo.registry import make
from tests.runs import tiny

OLD = {"name": "lp_reg", "form": "paper", "proxy": "old", "rho": 1.0, "tau": 0.05, "beta": 3.0}


def changes(proxy: str, steps: int) -> dict:
    """An iteration of so many optimizer steps."""
    return {
        "objective": OLD | {"proxy": proxy},
        "steps": 2,
        "training.epochs": steps,
        "training.minibatches": 1,
        "warm_start.steps": 20,
        "evaluation.pass_at": (),
        "evaluation.every": 100,
        "checkpoint.every": 100,
        "optimizer.learning_rate": 3e-2,
    }


def test_the_objective_asks_for_the_copy():
    objective = make("lp_reg", **{k: v for k, v in OLD.items() if k != "name"})
    assert compared_of(objective) == {"prev"} and copies_of(objective) == ["prev"]
    assert references_of(objective) == ["prev"] and references_of(make("lp_reg", form="paper")) == []
    assert resolve(tiny.config(changes("old", 2)), 1).references == ("prev",)
    with pytest.raises(ValueError, match="compares the policy with its copy prev, and a race"):
        race({"old": objective}, seeds=1, steps=1, evaluations=1)


@pytest.mark.parametrize("name", ("ema", "reward_model", "half"))
def test_what_moves_within_an_iteration_is_no_model_to_compare_with(name):
    statistic = Compared(lambda logits, tokens, other: logits.sum(-1), name)
    asks = Asks(wants=frozenset({"gap"}), derived={"gap": statistic})
    objective = from_terms([Term("gap", lambda stats, batch, state: stats.derived["gap"], asks=asks)])
    with pytest.raises(ValueError, match=f"a statistic of two models: unknown other model {name!r}"):
        compared_of(objective)


def test_a_plan_holds_the_copy_and_scores_it():
    resolved = resolve(tiny.config(changes("old", 2)), 1)
    planned = trace.trace_run(resolved, make_mesh(dict(data=1), tiny.DEVICES[:1]), trace.data_of(resolved))
    assert "prev" in planned.state and "update" in [step.name for step in planned.steps]


@pytest.mark.slow
def test_with_one_step_the_old_policy_is_the_current_one_and_with_two_it_is_not(tmp_path):
    def losses(proxy: str, steps: int) -> np.ndarray:
        lines = tiny.trained(tiny.run(tiny.config(changes(proxy, steps)), tmp_path / f"{proxy}{steps}").path)
        assert all(line["step/nonfinite"] == 0 for line in lines)
        return np.array([line["loss/lp_reg"] for line in lines])

    with tiny.quick():
        np.testing.assert_allclose(losses("old", 1), losses("current", 1), rtol=1e-4, atol=1e-6)
        old, current = losses("old", 2), losses("current", 2)
    assert old.max() > 1e-4 and np.abs(old - current).max() > 1e-5
