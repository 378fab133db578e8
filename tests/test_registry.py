"""Names and hyperparameters that do not exist fail with the nearest ones that do."""

import math
import os
import subprocess
import sys

import pytest

import jaxpo.objectives  # noqa: F401 (imported for its registrations)
from jaxpo import registry


@pytest.fixture(autouse=True)
def own_table(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    monkeypatch.setattr(registry, "_LATER", dict(registry._LATER))


def thing(size: int, scale: float = 2.0, name: str = "a") -> tuple:
    """A thing."""
    return size, scale, name


def test_register_gives_the_factory_back_and_make_calls_it():
    assert registry.register("task", source="a paper", budget={"size": 0.5})(thing) is thing
    assert registry.make("thing", "task", size=3, scale=0.5) == (3, 0.5, "a")
    row = registry.entry("thing", "task")
    assert (row.kind, row.id, row.source, row.budget) == ("task", "thing", "a paper", {"size": 0.5})
    assert row.defaults == {"size": None, "scale": 2.0, "name": "a"}
    assert "thing" in registry.names("task") and "thing" not in registry.names("objective")


def test_one_name_of_two_kinds():
    registry.register("task", id="both")(lambda: 1)
    registry.register("metric", id="both")(lambda: 2)
    assert (registry.make("both", "task"), registry.make("both", "metric")) == (1, 2)


def test_names_are_sorted():
    for name in ("c", "a", "b"):
        registry.register("schedule", id=name)(lambda: None)
    assert [n for n in registry.names("schedule") if n in "abc"] == ["a", "b", "c"]


def test_a_taken_name_is_refused_unless_it_is_the_same_definition():
    registry.register("task")(thing)
    registry.register("task")(thing)  # a notebook cell run twice

    def other() -> None: ...

    with pytest.raises(ValueError, match="task 'thing' is already registered by .*test_registry.thing"):
        registry.register("task", id="thing")(other)


def test_a_cell_run_twice_takes_the_newer_definition():
    def build(result):
        def factory() -> int:
            return result

        return factory

    registry.register("task", id="cell")(build(1))
    registry.register("task", id="cell")(build(2))
    assert registry.make("cell", "task") == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: registry.make("grop"), r"unknown objective 'grop': did you mean 'grpo'.*\? known: .*dapo.*sft"),
        (lambda: registry.entry("grop"), "unknown objective 'grop': did you mean 'grpo'"),
        (lambda: registry.describe("grop"), "unknown objective 'grop': did you mean 'grpo'"),
        (lambda: registry.make("zzzzzz"), "unknown objective 'zzzzzz': known: "),
        (
            lambda: registry.make("grpo", eps_hihg=0.3),
            "unknown hyperparameter of objective 'grpo' 'eps_hihg': did you mean 'eps_high'",
        ),
        (lambda: registry.make("dr_grpo"), "objective 'dr_grpo' needs L_const"),
        (lambda: registry.make("grpo", "objektive"), "unknown objektive 'grpo'|unknown kind 'objektive'"),
        (lambda: registry.names("objektive"), "unknown kind 'objektive': did you mean 'objective'"),
        (lambda: registry.register("objektive"), "unknown kind 'objektive': did you mean 'objective'"),
    ],
)
def test_errors_name_the_nearest(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_describe_tells_source_settings_and_docstring():
    text = registry.describe("grpo")
    for part in ("objective grpo(", "eps_high: float = 0.2", "Source: DeepSeekMath, arXiv:2402.03300", "Shapes: logp"):
        assert part in text


def test_the_first_members_are_there():
    assert {"reinforce", "rloo", "grpo", "dr_grpo", "dapo", "sft"} <= set(registry.names())
    assert {"token_mean", "seq_mean", "seq_sum", "seq_sum_const"} <= set(registry.names("aggregation"))


FILLS = """
from jaxpo import registry
for kind, name in (("objective", "grpo"), ("filter", "mixed_groups"), ("protocol", "on_policy"), ("sampler", "hapo"),
                   ("task", "toy"), ("term", "clipped_value"), ("diagnostic", "ppo_outer_loop")):
    assert name in registry.names(kind), kind
    assert registry.entry(name, kind).id == name
"""


def test_the_table_fills_itself_on_first_use():
    subprocess.run([sys.executable, "-c", FILLS], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def test_a_name_of_another_kind_says_of_which():
    with pytest.raises(
        ValueError, match=r"^unknown objective 'clipped': it is a surrogate: make\('clipped', 'surrogate'\)$"
    ):
        registry.make("clipped")
    with pytest.raises(
        ValueError, match=r"unknown ratio 'grpo': it is an objective and an advantage: make\('grpo'\) or"
    ):
        registry.make("grpo", "ratio")


def test_an_entry_may_be_registered_by_its_place():
    registry.register_later("schedule", {"square_root": "math:sqrt"})
    assert (
        "square_root" in registry.names("schedule") and registry.entry("square_root", "schedule").factory is math.sqrt
    )
