"""Preference runs of seconds: what they leave behind, resuming to the bit, meshes, and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest

from experiments import train_preference
from jaxpo.config.command_line import parse
from jaxpo.config.resolve import resolve
from jaxpo.runs import loop, train
from jaxpo.runs.evaluation.pairs import START, tables
from jaxpo.runs.restore import checkpoints_of, restore
from jaxpo.runs.workspace import setup
from jaxpo.storage.checkpoint import finished_steps
from tests.runs import tiny

DATA = {"data": {"name": "task", "flipped": 0.25, "seed": 3}}
QUICK = {
    "training.epochs": 1,
    "evaluation.pass_at": (),
    "evaluation.every": 2,
    "warm_start.steps": 0,
    "sampling.max_new_tokens": 4,
    "checkpoint.every": 1,
    "checkpoint.keep": 9,
    "rollout.responses": 2,
}
DPO = {"objective": {"name": "dpo"}, **DATA}


@pytest.fixture(autouse=True, scope="module")
def quick():
    with tiny.quick():
        yield


def run(path, changes, **options):
    return tiny.run(tiny.config(QUICK | changes), path / "run", **options)


@pytest.fixture(scope="module")
def dpo(tmp_path_factory):
    return run(tmp_path_factory.mktemp("dpo"), DPO)


def resumed(finished, changes, directory, step):
    """The run again from its checkpoint ``step``: as it would be had it been killed after that."""
    shutil.copytree(finished.path, directory / "run")
    for later in finished_steps(directory / "run" / "checkpoints"):
        if later > step:
            shutil.rmtree(directory / "run" / "checkpoints" / str(later))
    return run(directory, changes, resume=True)


def assert_resumed_alike(finished, changes, directory, step):
    again = resumed(finished, changes, directory, step)
    assert f"resumed at iteration {step}" in again.printed
    tiny.assert_same_params(again.result.params, finished.result.params)
    assert tiny.trained(again.path) == tiny.trained(finished.path)


# ---- offline


def test_metrics_of_pairs(dpo):
    lines = tiny.trained(dpo.path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    names = {
        "preference/accuracy",
        "preference/margin",
        "logp/chosen",
        "logp/rejected",
        "drift/chosen",
        "drift/rejected",
    }
    for line in lines:
        assert line.keys() >= names | {"loss", "grad_norm"} and line["step/empty"] == 0
        assert "kl/ref_k3" not in line  # an estimate for samples, which given answers are not
        assert all(np.isfinite(line[name]) for name in names)
    assert "AGAIN" not in dpo.printed and "data/flipped 0.238" in dpo.printed  # 5 of 21
    assert (dpo.path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_held_out_pairs(dpo):
    held = [line for line in tiny.untimed(dpo.path / "metrics.jsonl") if "eval/accuracy" in line]
    assert [line["step"] for line in held] == [0, 2, 4]
    start, end = held[0], held[-1]
    assert start["eval/drift_chosen"] == start["eval/drift_rejected"] == start["eval/margin"] == 0
    assert start["eval/loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert end["eval/drift_chosen"] == pytest.approx(end["eval/logp_chosen"] - start["eval/logp_chosen"], abs=1e-5)
    assert end["eval/margin"] == pytest.approx(0.1 * (end["eval/drift_chosen"] - end["eval/drift_rejected"]), abs=1e-5)
    assert end["eval/reward_accuracy"] == end["eval/accuracy"]
    assert start["eval/idealized_accuracy"] == end["eval/idealized_accuracy"]  # of the start, whatever was learned
    assert start["eval/kl"] == 0 != end["eval/kl"] and "eval/greedy" in end


def test_resuming_goes_on_in_the_same_epoch(dpo, tmp_path):
    assert_resumed_alike(dpo, DPO, tmp_path, 1)


def test_two_minibatches_are_two_steps_on_other_pairs(dpo):
    steps = 4 * dpo.result.workspace.resolved.optimizer_steps
    assert int(dpo.result.workspace.objective.init().step) == 0 and steps == 8


# ---- what a run is made of


def test_files_without_a_task(tmp_path):
    rows = [{"prompt": f"{i % 4}{i // 4}", "chosen": "0123"[i % 4], "rejected": "0123"[(i + 1) % 4]} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"task": {"name": None}, "data": {"name": "jsonl", "path": str(tmp_path / "pairs.jsonl"), "test_size": 3}}
    workspace = setup(tiny.config(QUICK | DPO | files))
    assert (len(workspace.preferences.train), len(workspace.preferences.test)) == (9, 3)
    assert workspace.task.score is None and len(workspace.questions.train) == 9
    assert workspace.task.demonstrate(workspace.task.train[0]) in {r["chosen"] for r in rows}
    with pytest.raises(ValueError, match="config.judge.name"):
        setup(tiny.config(QUICK | files | {"objective": {"name": "online_ipo"}}))
    by = {
        "judge": {"name": "function", "path": "jaxpo.tasks.preferences.traces:reverser"},
        "objective": {"name": "online_ipo"},
    }
    online = setup(
        tiny.config(QUICK | files | by)
    )  # the judge says what the objective asks: the prompts alone are read
    assert online.preferences is None and len(online.questions.train) == 9
    with pytest.raises(ValueError, match="data are 'pair' rows, and this objective needs the fields truth"):
        setup(tiny.config(QUICK | files | {"objective": {"name": "opa_dpo"}, "protocol": {"name": "preference_data"}}))
    with pytest.raises(ValueError, match="has no 'win'"):
        setup(tiny.config(QUICK | files | {"objective": {"name": "sppo"}}))


REFUSED = [
    ({"objective": {"name": "dpo"}, "protocol": {"name": "on_policy"}}, "set config.data.name"),
    (DPO | {"judge": {"name": "function", "path": "a:b"}}, "config.judge has no effect"),
    (DPO | {"judge": {"name": "verifer"}}, "did you mean 'verifier'"),
    (DPO | {"data": {"name": "task", "fliped": 0.1}}, "did you mean 'flipped'"),
    (DPO | {"data": {"name": "taks"}}, "did you mean 'task'"),
    (DPO | {"data": {"name": "task", "draft_prompt": "{draft}"}}, "draft_prompt has no effect"),
    ({"objective": {"name": "kto"}, "rollout.prompts": 1, "training.minibatches": 1}, "prompts must be at least 2"),
    ({"objective": {"name": "rationale_dpo"}}, "which a judge does not make"),
    ({"objective": {"name": "dno", "variant": "prct"}, "protocol": {"name": "dno_prct"}}, "is a grade from 1 to 6"),
    (DPO | {"training.microbatches": 8}, "would cut units of 2 rows"),
    (DPO | {"soup.of": ("a",)}, "config.soup.of"),
    (DPO | {"sampling.max_new_tokens": 2}, "the limit sampling.max_new_tokens is 2"),
    (DPO | {"task": {"name": None}}, "config.task.name is None"),
    (
        {"objective": {"name": "nash_md"}, "protocol": {"name": None, "mixture": 0.5}},
        "is set by config.objective.mixture",
    ),
]


@pytest.mark.parametrize("changes, message", REFUSED)
def test_refused_before_anything_is_compiled(changes, message):
    with pytest.raises(ValueError, match=message):
        setup(tiny.config(QUICK | changes))


def test_the_alphabet_is_that_of_the_prompts_that_hold_answers_too():
    words = {"tokenizer": {"name": "characters"}, "objective": {"name": "srpo"}}
    workspace = setup(tiny.config(QUICK | DPO | words))
    assert workspace.tokenizer.alphabet == "".join(sorted(set("\n0123 :Draft:Better:")))
    data = {"data": {"name": "task", "draft_prompt": "{draft}>{prompt}"}}
    assert setup(tiny.config(QUICK | DPO | words | data)).tokenizer.alphabet == "\n0123>"


def test_soup_asks_for_the_runs_that_it_is_made_of():
    workspace = setup(tiny.config(QUICK | DPO | {"soup.of": ("absent", "absent")}))
    with pytest.raises(ValueError, match="'absent' is no run directory"):
        train.check_start(workspace)


def test_the_best_checkpoint_is_judged_by_what_there_is():
    best = {"checkpoint.every": 2, "checkpoint.keep_best": "eval/accuracy"}
    train.check_start(setup(tiny.config(QUICK | DPO | best)))
    with pytest.raises(ValueError, match="no held-out pairs"):
        train.check_start(setup(tiny.config(QUICK | best | {"objective": {"name": "reinforce"}})))


def test_the_command_refuses_objectives_of_single_answers(capsys):
    flags = [f"--config={tiny.FILE}", "--workdir=nowhere"]
    with pytest.raises(SystemExit, match="train it with experiments.train_rl"):
        train_preference.main(flags)
    with pytest.raises(SystemExit, match="--workdir=DIRECTORY is required"):
        train_preference.main(flags[:1])


# ---- online, and protocols that move the weights


def test_nash_md_plays_against_the_mixture(tmp_path):
    done = run(tmp_path, {"objective": {"name": "nash_md"}, "task.partial_credit": True, "steps": 2})
    for line in tiny.trained(done.path):
        assert 0 <= line["judge/win"] <= 1 and line["step/empty"] == 0 and line["mismatch/logp_abs_max"] < 1e-4
    assert "AGAIN" not in done.printed


MOVING = {
    "egpo": {"objective": {"name": "egpo"}},
    "nash_mp": {"objective": {"name": "nash_mp"}, "protocol": {"name": "nash_mp", "stage": 2}},
    "nash_ema": {"objective": {"name": "nash_ema", "b": 0.5}},
    "inpo": {"objective": {"name": "inpo"}, "protocol": {"name": "judged", "prev_every": 2}},
    "seppo": {"objective": {"name": "seppo"}, **DATA, "protocol": {"name": "seppo", "size": 3, "every": 1}},
    "apo": {"objective": {"name": "dpo"}, **DATA, "protocol": {"name": "apo_accelerated", "iterations": 2}},
    "kto": {"objective": {"name": "kto"}, **DATA},
    "hypo": {"objective": {"name": "hypo"}, **DATA},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVING)
def test_resuming_to_the_bit(name, tmp_path):
    changes = {"task.partial_credit": True, **MOVING[name]}
    done = run(tmp_path / "whole", changes)
    assert "AGAIN" not in done.printed
    assert_resumed_alike(done, changes, tmp_path / "again", 1)


MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
SALSA = {"name": "policy_gradient", "advantage": "group_normalized", "shaping": "salsa(kl_coef=0.1)"}
ON_MESHES = {name: MOVING[name] for name in ("egpo", "nash_mp", "nash_ema", "inpo", "seppo", "apo")} | {
    "dpo": DPO,
    "salsa": {"objective": SALSA},
}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A policy unlike that of `dpo`."""
    return run(tmp_path_factory.mktemp("other"), DPO | {"seed": 7, "steps": 2, "checkpoint.every": 2})


def watched(path, changes):
    """A run, and the states and references that it had where it was saved."""
    seen, checkpoint_of = [], loop.checkpoint_of

    def recorded(run, seed):
        seen.append((run.state, run.references))
        return checkpoint_of(run, seed)

    with pytest.MonkeyPatch.context() as patch:
        for module in (train, loop):
            patch.setattr(module, "checkpoint_of", recorded)
        return run(path, changes), seen


def parts(name, held):
    """The policies that a reference holds."""
    return list(held.values()) if name == "pool" else [held["params"]] if name == "center" else [held]


def lie_as(a, b):
    """Whether arrays lie on the devices as those of another tree of their shapes do."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.sharding.is_equivalent_to(y.sharding, x.ndim) for x, y in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_MESHES)
def test_a_mesh_does_not_change_the_result(name, tmp_path, dpo, other):
    """Eight devices against one: the metrics, and every reference, which lies on the mesh as the policy does."""
    changes = {"task.partial_credit": True, **ON_MESHES[name]}
    if name == "salsa":
        changes |= {"soup.of": (str(dpo.path), str(other.path)), "soup.alpha": 0.25}
    one, states = watched(tmp_path / "one", changes)
    with tiny.quick(8):
        many, on_mesh = watched(tmp_path / "many", changes | MESH)
    assert "AGAIN" not in many.printed
    for a, b in zip(tiny.untimed(one.path / "metrics.jsonl"), tiny.untimed(many.path / "metrics.jsonl"), strict=True):
        for line in (a, b):
            line.pop("preference/accuracy", None)  # at the start margins are 0 up to rounding, and so is their sign
        assert b == pytest.approx(a, abs=1e-4, rel=1e-4), a["step"]
    first, *more = [part for of, held in on_mesh[0][1].items() if of != "soup" for part in parts(of, held)] or [0]
    assert all(x is y for part in more for x, y in zip(*map(jax.tree.leaves, (part, first)), strict=True))
    for (_, alone), (state, references) in zip(states, on_mesh, strict=True):
        for of, held in references.items():
            assert all(lie_as(part, state.params) for part in parts(of, held)), of
            assert of != "center" or lie_as(held["opt_state"], state.opt_state)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), alone[of], held)


def test_the_start_is_kept_in_the_checkpoint(dpo):
    workspace = dpo.result.workspace
    run, found = restore(workspace, tables(workspace), checkpoints_of(str(dpo.path)))
    assert found.step == 4 and run.tables[START].shape == (5, 2) and (run.tables[START] < 0).all()


@pytest.mark.parametrize(
    "name", ("dpo_reasoning_gym", "online_dpo_reasoning_gym", "nash_md_reasoning_gym", "reward_reasoning_gym")
)
def test_the_configs_that_are_offered_can_run(name):
    run = resolve(parse([f"--config={tiny.ROOT / 'configs' / name}.py"])[0], 1)
    expected = {"dpo": "preference_data", "online": "judged", "nash": "nash_md", "reward": "preference_data"}
    assert run.protocol_name == expected[name.split("_")[0]]
