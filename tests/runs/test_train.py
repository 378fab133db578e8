"""Whole runs of seconds: what they leave behind, what they say, and what must not change their result."""

import functools
import json
import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo import registry
from jaxpo.learning.needs import references_of
from jaxpo.objectives import make
from jaxpo.objectives.grammar.base import asks_of
from jaxpo.parallel import AXES
from jaxpo.protocols.protocol import NothingLeft
from jaxpo.registry import names
from jaxpo.runs import loop, restore
from jaxpo.runs.gatherer import prompt_order
from jaxpo.storage.checkpoint import finished_steps, restore_params
from jaxpo.storage.rundir import read_metrics
from tests.runs import tiny

STANDARD = {
    "loss",
    "reward/mean",
    "reward/std",
    "adv/mean",
    "adv/std",
    "ratio/mean",
    "ratio/max",
    "ratio/clip_frac",
    "kl/old_k3",
    "kl/ref_k3",
    "entropy",
    "length/mean",
    "length/truncated_frac",
    "group/degenerate_frac",
    "grad_norm",
    "mismatch/logp_abs_max",
}


@pytest.fixture(autouse=True, scope="module")
def quick():
    with tiny.quick():
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    return tiny.finished(tmp_path_factory.getbasetemp())


@pytest.fixture
def objective(monkeypatch):
    """Registers an objective for one test, under the name "mine"."""

    def enter(factory):
        monkeypatch.setitem(
            registry._TABLE, ("objective", "mine"), registry.Entry("objective", "mine", factory, "", {})
        )
        return {"name": "mine"}

    return enter


# ---- what a run leaves behind ---------------------------------------------------------------------------------------


def test_files(finished):
    names = {path.name for path in finished.path.iterdir()}
    assert names == {"config.json", "tokenizer.json", "metrics.jsonl", "samples.jsonl", "curves.png", "checkpoints"}
    assert finished_steps(finished.path / "checkpoints") == [2, 4]  # keep = 2
    config = json.loads((finished.path / "config.json").read_text())
    rollout = {"prompts": 8, "responses": 4, "prompt_width": None, "scan_layers": False, "mesh": dict.fromkeys(AXES)}
    assert config["objective"]["eps_high"] == 0.2 and config["rollout"] == rollout
    assert json.loads((finished.path / "tokenizer.json").read_text()) == {"kind": "integers", "base": 4}
    assert (finished.path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_standard_metrics_are_there_at_every_iteration(finished):
    training = tiny.trained(finished.path)
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    for line in training:
        assert line.keys() >= STANDARD, STANDARD - line.keys()
        assert all(math.isfinite(line[name]) for name in STANDARD)
        assert line["mismatch/logp_abs_max"] < 1e-4
        assert line["step/nonfinite"] == line["step/empty"] == line["reward/errors"] == 0
        assert 0 <= line["reward/mean"] <= 1 and 1 <= line["length/mean"] <= 3 and 0 < line["entropy"] < math.log(6)
    assert all(
        line["kl/ref_k3"] > 0 and line["kl/old_k3"] > 0 for line in training
    )  # from the second optimizer step on
    last, times = (
        tiny.lines(finished.path / "metrics.jsonl")[-2],
        {"generate", "reward", "score", "update", "iteration", "tokens_per_s"},
    )
    assert last.keys() >= {f"time/{name}" for name in times}


def test_warm_start_lowers_the_loss_and_has_steps_up_to_0(finished):
    metrics = [line for line in tiny.lines(finished.path / "metrics.jsonl") if "sft/loss" in line]
    assert [line["step"] for line in metrics] == [-50, -40, -30, -20, -10, 0]
    assert metrics[-1]["sft/loss"] < 0.5 * metrics[0]["sft/loss"]


def test_evaluations_before_during_and_after(finished):
    scores = {line["step"]: line for line in tiny.lines(finished.path / "metrics.jsonl") if "eval/greedy" in line}
    assert list(scores) == [0, 2, 4]
    for step, line in scores.items():
        assert ("eval/pass@4" in line) == (step != 2)
        assert line["eval/greedy_lo"] <= line["eval/greedy"] <= line["eval/greedy_hi"]
    assert finished.result.before["eval/greedy"] == scores[0]["eval/greedy"]
    assert finished.result.after["eval/pass@1"] == scores[4]["eval/pass@1"]
    samples = tiny.lines(finished.path / "samples.jsonl")
    assert [line["step"] for line in samples] == [0, 0, 0, 2, 2, 2, 4, 4, 4]  # config.logging.samples = 3
    assert all({"question", "answer", "completion", "reward", "correct"} < line.keys() for line in samples)
    test = {e.question for e in finished.result.workspace.task.test}
    assert {line["question"] for line in samples} <= test


def test_functions_are_compiled_once(finished):
    counts = {f.name: f.compilations for f in finished.result.workspace.programs.compiled}
    assert counts == {"generate": 2, "score": 1, "prepare": 1, "update": 1}  # training and greedy generation differ
    assert "AGAIN" not in finished.printed
    assert all(f"compiled {name} in" in finished.printed for name in [*counts, "supervised update"])


def test_what_a_run_says(finished):
    for text in (
        "train/size",
        "test/unseen_share 1",
        "objective grpo",
        "mesh data 1 x fsdp 1 x expert 1 x context 1 x tensor 1",
        "step 4/4",
        "before and after 4 iterations",
        "greedy",
        "pass@4",
        "compiling",
        "warm start",
        "generate",
        "score",
        "update",
    ):
        assert text in finished.printed, text
    phases = finished.result.seconds
    assert phases.keys() >= {"generate", "reward", "score", "update", "evaluate", "warm start", "checkpoint"}


def test_every_optimizer_step_counts(finished):
    state, position = restore_params(finished.path / "checkpoints", name="objective")
    assert position == {"seed": 0, "iteration": 4, "position": 4 * 8}
    assert state["iteration"] == 3 and state["step"] == 4 * 2 * 2  # iterations, epochs, minibatches


def test_prompts_come_in_epochs(finished):
    size = len(finished.result.workspace.questions.train)
    drawn = np.concatenate(finished.drawn)
    assert size < len(drawn) == 4 * 8
    assert sorted(drawn[:size]) == list(range(size)) and len(set(drawn[size:])) == len(drawn) - size


@pytest.mark.parametrize(("seed", "size", "n"), ((0, 7, 3), (1, 5, 12), (2, 8, 8)))
def test_prompt_order_is_a_permutation_an_epoch_however_it_is_cut(seed, size, n):
    whole = prompt_order(seed, 0, 6 * size, size)
    for epoch in whole.reshape(6, size):
        assert sorted(epoch) == list(range(size))
    assert len({tuple(epoch) for epoch in whole.reshape(6, size)}) > 1
    parts = [prompt_order(seed, position, n, size) for position in range(0, 6 * size - n, n)]
    np.testing.assert_array_equal(np.concatenate(parts), whole[: len(parts) * n])
    assert not np.array_equal(whole, prompt_order(seed + 1, 0, 6 * size, size))


def test_merging_the_steps_of_an_iteration():
    names = ("loss", "ratio/max", "step/nonfinite", "mismatch/logp_abs_max")
    steps = [dict(zip(names, jnp.array(row), strict=True)) for row in ([1.0, 2.0, 1.0, 0.1], [3.0, 1.0, 1.0, 0.5])]
    assert loop.merge_steps(steps) == pytest.approx(
        {"loss": 2, "ratio/max": 2, "step/nonfinite": 2, "mismatch/logp_abs_max": 0.1}
    )


# ---- every objective, and what must not change the result -----------------------------------------------------------


@pytest.fixture(scope="module")
def ran(finished, tmp_path_factory):
    """name -> one iteration of that objective, run once."""
    return functools.cache(
        lambda name: tiny.run(tiny.warm(finished, {"objective": {"name": name}}), tmp_path_factory.mktemp(name) / "run")
    )


@pytest.mark.parametrize("name", ("reinforce", "rloo", "grpo", "dr_grpo", "dapo"))
def test_objectives_run(finished, ran, name):
    run = ran(name)
    (line,) = tiny.trained(run.path)
    assert line.keys() >= STANDARD - {"kl/ref_k3"} and ("kl/ref_k3" in line) == (name in ("rloo", "grpo"))
    assert line["mismatch/logp_abs_max"] < 1e-4 and line["grad_norm"] > 0
    assert line["step/nonfinite"] == line["step/empty"] == 0
    assert line["ratio/mean"] == pytest.approx(1) and line["kl/old_k3"] == 0  # the first step is its own old policy
    if name == "dapo":
        assert line["dynamic_sampling/batches"] >= 1 and line["group/degenerate_frac"] == 0
    before, _ = restore_params(run.path / "checkpoints", 0)
    tiny.assert_same_params(before, restore_params(finished.path / "checkpoints")[0])  # init_from
    assert not np.array_equal(before["embedding"], run.result.params["embedding"])


def has_all_it_needs(name: str) -> bool:
    """Whether samples and rewards are all that the objective learns from: no pairs, no judge."""
    objective = make(name, **registry.entry(name).of_run(8, 1))
    protocol = make(objective.protocol.name, "protocol", **objective.protocol.options)
    try:
        references_of(objective, protocol.facts.provides)
    except ValueError:
        return False
    return not objective.unit.layout and "pref_opp" not in protocol.facts.provides


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted(filter(has_all_it_needs, set(names()) - {"reinforce", "rloo", "grpo", "dr_grpo", "dapo", "sft"}))
)
def test_every_other_objective_runs_with_its_protocol(finished, tmp_path, name):
    alone = {"rollout.responses": 1, "rollout.prompts": 16} if name == "spo_single_stream" else {}
    run = tiny.run(tiny.warm(finished, {"objective": {"name": name}, **alone}), tmp_path / "run")
    (line,) = tiny.trained(run.path)
    assert line["mismatch/logp_abs_max"] < 1e-4 and line["grad_norm"] > 0
    assert line["step/nonfinite"] == line["step/empty"] == 0
    before, _ = restore_params(run.path / "checkpoints", 0)
    assert not np.array_equal(before["embedding"], run.result.params["embedding"])


@pytest.mark.slow
def test_sampling_away_from_the_policy_is_no_mismatch(finished, tmp_path):
    changes = {"sampling.temperature": 0.7, "sampling.top_k": 4, "policy_temperature": 0.9}
    run = tiny.run(tiny.warm(finished, changes | {"objective": {"name": "reinforce"}}), tmp_path / "run")
    (line,) = tiny.trained(run.path)
    assert line["mismatch/logp_abs_max"] < 1e-4


@pytest.mark.parametrize("name", ("reinforce", pytest.param("rloo", marks=pytest.mark.slow)))
def test_microbatches_do_not_change_the_result(finished, ran, tmp_path, name):
    four = tiny.run(tiny.warm(finished, {"objective": {"name": name}, "training.microbatches": 4}), tmp_path / "run")
    for a, b in zip(tiny.trained(ran(name).path), tiny.trained(four.path), strict=True):
        assert b == pytest.approx(a, abs=1e-5)
    assert_close(ran(name).result.params, four.result.params, 1e-5)


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


MESHES = (
    pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, id="all three"),
    *[
        pytest.param(mesh, id=str(mesh), marks=pytest.mark.slow)
        for mesh in (
            {"data": 8},
            {"fsdp": 8},
            {"data": 4, "tensor": 2},
            {"data": 1, "fsdp": 4, "tensor": 2},
            {"fsdp": 2, "context": 2, "tensor": 2},
            {"data": 1, "context": 8},
        )
    ],
)


@pytest.mark.parametrize("mesh", MESHES)
def test_the_mesh_does_not_change_the_result(finished, ran, tmp_path, mesh):
    one, eight = ran("rloo"), {"data": 1, "fsdp": 1, "tensor": 1} | mesh  # rloo scores the old policy and the reference
    with tiny.quick(devices=8):
        eight = tiny.run(tiny.warm(finished, {"objective": {"name": "rloo"}, "mesh": eight}), tmp_path / "run")
    traces = [{f.name: f.compilations for f in run.result.workspace.programs.compiled} for run in (one, eight)]
    assert traces[0] == traces[1] and len(eight.result.params["embedding"].sharding.device_set) == 8
    lines = [tiny.untimed(run.path / "metrics.jsonl") for run in (one, eight)]
    for a, b in zip(*lines, strict=True):
        assert b == pytest.approx(a, abs=1e-4)
    assert tiny.lines(eight.path / "samples.jsonl") == tiny.lines(one.path / "samples.jsonl")
    assert_close(one.result.params, eight.result.params, 1e-4)


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def broken(when):
    """``reinforce`` whose loss is NaN where ``when(batch, state)`` says so."""
    good = make("reinforce")

    def loss(policy, batch, state):
        value, report = good.loss(policy, batch, state)
        return jnp.where(when(batch, state), jnp.nan, value), report

    return good._replace(loss=loss)


def broken_but_in_0_and_2():
    return broken(lambda batch, state: (state.iteration == 1) | (state.iteration >= 3))


def test_steps_that_are_not_finite_are_skipped_and_stop_the_run(finished, tmp_path, objective):
    mine = objective(broken_but_in_0_and_2)
    config = tiny.warm(
        finished, {"objective": mine, "steps": 20, "checkpoint.every": 1, "checkpoint.keep": 9, "nonfinite_patience": 3}
    )
    with pytest.raises(
        loop.Diverged, match="3 optimizer steps in a row.*up to iteration 6.*last good checkpoint is .*checkpoints/3"
    ) as error:
        tiny.run(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    metrics = read_metrics(tmp_path / "run")
    assert metrics["step/nonfinite"][metrics["step"] > 0].tolist() == [0, 1, 0, 1, 1, 1]
    # None is saved among skipped steps: it would take the place of one from before the trouble began.
    assert finished_steps(tmp_path / "run" / "checkpoints") == [0, 1, 3]
    params, _ = restore_params(tmp_path / "run" / "checkpoints", 3)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_patience_counts_steps_in_a_row(finished, tmp_path, monkeypatch):
    """One of two optimizer steps of every iteration is skipped: never two in a row for certain."""
    iteration = loop.timed_iteration

    def half_skipped(*args):
        run, metrics = iteration(*args)
        return run, metrics | {"step/nonfinite": 1.0}

    monkeypatch.setattr(loop, "timed_iteration", half_skipped)
    config = {"objective": {"name": "reinforce"}, "training.epochs": 2, "steps": 4, "nonfinite_patience": 3}
    assert tiny.run(tiny.warm(finished, config), tmp_path / "run").result.iteration == 4


def test_a_run_that_ends_on_a_skipped_step_is_saved(finished, tmp_path, objective):
    tiny.run(tiny.warm(finished, {"objective": objective(broken_but_in_0_and_2), "steps": 2}), tmp_path / "run")
    assert finished_steps(tmp_path / "run" / "checkpoints")[-1] == 2


def test_a_policy_that_is_not_finite_any_more(finished, tmp_path, monkeypatch):
    """What it samples is nonsense, and the run says that it has diverged."""
    load = restore.load_params
    monkeypatch.setattr(restore, "load_params", lambda *a: jax.tree.map(lambda x: x * jnp.nan, load(*a)))
    config = tiny.warm(finished, {"objective": {"name": "reinforce"}, "steps": 20, "nonfinite_patience": 3})
    with pytest.raises(loop.Diverged, match="up to iteration 3: stopped. no checkpoint was saved before"):
        tiny.run(config, tmp_path / "run")
    assert finished_steps(tmp_path / "run" / "checkpoints") == []


@pytest.mark.slow
def test_a_learning_rate_that_blows_up(finished, tmp_path):
    changes = {"optimizer.learning_rate": 1e30, "steps": 20, "nonfinite_patience": 3, "checkpoint.every": 50}
    with pytest.raises(loop.Diverged, match="the last good checkpoint is .*checkpoints/0$"):
        tiny.run(tiny.warm(finished, changes | {"objective": {"name": "dr_grpo"}}), tmp_path / "run")


def test_dynamic_sampling_says_when_nothing_is_left(finished, tmp_path):
    config = tiny.warm(
        finished, {"init_from": None, "objective": {"name": "dapo"}, "protocol": {"name": None, "max_batches": 1}}
    )
    with pytest.raises(
        NothingLeft,
        match=r"iteration 0: .*found \d of 8 groups.* in 1 batches.*config.protocol.max_batches.*checkpoints/0",
    ):
        tiny.run(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"objective": {"name": "mine"}}, "the objective needs logp_tutor .*; the training loop provides .*logp_ref"),
        ({"rollout.prompt_width": 1}, "config.rollout.prompt_width 1 is shorter than every training prompt"),
        (
            {"rollout.prompts": 7, "training.minibatches": 2},
            "config.training.minibatches 2 does not divide config.rollout.prompts 7",
        ),
        ({"task": {"name": "toy", "train_size": 25, "test_size": 5}}, "task 'toy' needs seed"),
        ({"tokenizer": {"name": "integers", "base": 2}}, "character '[23]' of .* is not in the alphabet"),
        ({"init_from": "nowhere"}, "nowhere"),
        ({"sampling.stop": ("1", "")}, "config.sampling.stop must hold texts that are not empty"),
        (
            {"sampling.max_new_tokens": 2},
            "config.sampling.max_new_tokens 2 is too short for demonstrations of 3 tokens",
        ),
    ),
)
def test_bad_configs_fail_before_anything_is_compiled_or_written(tmp_path, objective, change, message):
    objective(lambda: make("reinforce")._replace(asks=asks_of("reward", "logp_tutor")))
    with pytest.raises(ValueError, match=message) as error:
        tiny.run(tiny.config(change), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()  # it is made before the first compilation


def test_a_used_directory_is_refused(finished):
    with pytest.raises(FileExistsError, match="is not empty; continue its run with --resume"):
        tiny.run(tiny.config(), finished.path)


def test_one_start_builds_the_objective_once(finished, tmp_path, monkeypatch):
    built, entry = [], registry.entry("grpo")

    @functools.wraps(entry.factory)
    def counted(*args, **hyperparameters):
        built.append(hyperparameters)
        return entry.factory(*args, **hyperparameters)

    monkeypatch.setitem(registry._TABLE, ("objective", "grpo"), entry._replace(factory=counted))
    tiny.run(tiny.warm(finished), tmp_path / "run")
    assert len(built) == 1 and built[0]["beta"] == 0.04


# ---- profile, signals -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_profile(finished, tmp_path):
    run = tiny.run(
        tiny.warm(finished, {"objective": {"name": "reinforce"}, "steps": 3}), tmp_path / "run", profile_steps=1
    )
    assert list((run.path / "profile").rglob("*.xplane.pb")) and "profile of 1 iterations in" in run.printed
    with pytest.raises(RuntimeError, match="No profile"):  # none is left open
        jax.profiler.stop_trace()


@pytest.mark.parametrize("profile_steps", (2, -1))
def test_a_profile_that_would_not_fit_the_run_is_refused(finished, tmp_path, profile_steps):
    with pytest.raises(ValueError, match=f"--profile_steps={profile_steps}: this run can trace at most 1 iterations"):
        tiny.run(tiny.warm(finished, {"steps": 3}), tmp_path / "run", profile_steps=profile_steps)
    assert not (tmp_path / "run").exists()


def test_the_callers_signal_handler_comes_back(finished):
    assert finished and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
