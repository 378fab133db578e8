"""A reward model from pairs to judge: trained, evaluated, resumed, and used by other runs."""

import json

import jax
import numpy as np
import pytest

from experiments import score_pairs
from jaxpo.learning.needs import is_reward_model
from jaxpo.objectives import make
from jaxpo.runs import train
from jaxpo.runs.evaluation.rewards import calibration
from jaxpo.runs.judges import judge as judges
from jaxpo.runs.restore import load_params, open_finished
from jaxpo.runs.workspace import setup
from jaxpo.storage.rundir import read_metrics
from tests.runs import tiny

PAIRS = {
    "data": {"name": "task"},
    "warm_start.steps": 0,
    "training.epochs": 1,
    "training.minibatches": 1,
    "evaluation.pass_at": (),
}
BRADLEY_TERRY = PAIRS | {"objective": {"name": "bradley_terry_rm"}, "sampling.max_new_tokens": 4}


@pytest.fixture(autouse=True, scope="module")
def quick():
    with tiny.quick():
        yield


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    return tiny.run(tiny.config(BRADLEY_TERRY), tmp_path_factory.mktemp("rm") / "run")


def test_who_trains_a_reward_model():
    assert all(is_reward_model(make(name)) for name in ("bradley_terry_rm", "gpm_rm", "themis"))
    assert not any(is_reward_model(make(name)) for name in ("dpo", "grpo", "preference_orchestrator"))


def test_what_a_run_leaves_behind(reward_model):
    metrics = read_metrics(reward_model.path)
    at = metrics["step"].tolist().index(0)
    # A new head says 0 of all: even everywhere, half right, and calibrated.
    assert (metrics["eval/accuracy"][at], metrics["eval/ece"][at], metrics["eval/brier"][at]) == (0.5, 0, 0.25)
    bins = json.loads((reward_model.path / "reliability.json").read_text())
    assert bins["iteration"] == 4 and bins["pairs"] == 5 and sum(bins["share"]) == pytest.approx(1)
    assert (reward_model.path / "reliability.png").read_bytes()[:4] == b"\x89PNG"
    assert "eval/greedy" not in metrics and not (reward_model.path / "samples.jsonl").read_text()


def test_a_finished_run_is_not_evaluated_again(reward_model):
    again = tiny.run(tiny.config(BRADLEY_TERRY), reward_model.path, resume=True)
    assert "this run has finished" in again.printed
    tiny.assert_same_params(again.result.params, reward_model.result.params)


def test_it_judges_answers_as_its_head_scores_them(reward_model):
    workspace, params, _ = open_finished(str(reward_model.path))
    params = {**params, "heads": jax.tree.map(lambda x: x + 0.3, params["heads"])}
    examples, answers = workspace.task.test[:2], [["12", "3"], ["", "0123"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judges, "open_finished", lambda path, **_: (workspace, params, 0))
        verdict = judges.by_model("somewhere", None)(examples, answers)
        doubled = judges.by_model("somewhere", 2.0)(examples, answers)
    rows = judges.rows_of(workspace, examples, answers)
    np.testing.assert_allclose(
        verdict.scores.reshape(-1), workspace.programs.score_heads(params, rows).score, atol=1e-6
    )
    assert len(set(verdict.scores.reshape(-1).tolist())) == 4
    gap = verdict.scores[:, 0] - verdict.scores[:, 1]
    np.testing.assert_allclose(verdict.wins[:, 0, 1], 1 / (1 + np.exp(-gap)), atol=1e-6)
    np.testing.assert_allclose(doubled.wins[:, 0, 1], 1 / (1 + np.exp(-2 * gap)), atol=1e-6)
    np.testing.assert_allclose(verdict.wins + verdict.wins.transpose(0, 2, 1), 1, atol=1e-6)


def test_several_models_and_what_weighs_them(reward_model, tmp_path, monkeypatch):
    row = {"prompt": "12", "chosen": "21", "rejected": "12", "rm_scores": [1, 0]}
    (tmp_path / "scores.jsonl").write_text(json.dumps(row))
    scores = {"objective": {"name": "preference_orchestrator"}, "heads.gate": 2, "sampling.max_new_tokens": 4}
    gates = setup(tiny.config(PAIRS | scores | {"data": {"name": "jsonl", "path": str(tmp_path / "scores.jsonl")}}))
    workspace, params, _ = open_finished(str(reward_model.path))
    heads = gates.init_params(jax.random.key(1))
    heads = {**heads, "heads": jax.tree.map(lambda x: x + np.linspace(0, 1, x.shape[-1]), heads["heads"])}
    loves = setup(tiny.config(BRADLEY_TERRY | {"objective": {"name": "rluf"}}))
    runs = {
        "one": (workspace, {**params, "heads": jax.tree.map(lambda x: x + 0.3, params["heads"])}, 0),
        "two": (workspace, {**params, "heads": jax.tree.map(lambda x: x - 0.2, params["heads"])}, 0),
        "love": (loves, {**params, "heads": jax.tree.map(lambda x: x + 0.1, params["heads"])}, 0),
        "adapter": (gates, heads, 0),
    }
    monkeypatch.setattr(judges, "open_finished", lambda path, **_: runs[path])
    examples, answers = workspace.task.test[:2], [["12", "3", "1"], ["", "0123", "2"]]
    one, two, love = (judges.by_model(name, None)(examples, answers).scores for name in ("one", "two", "love"))
    assert ((love > 0) & (love < 1)).all()  # a probability
    fixed = judges.by_models(("one", "love"), (0.9, 0.1), None, None)(examples, answers)
    np.testing.assert_allclose(fixed.scores, 0.9 * one + 0.1 * love, atol=1e-6)
    assert set(np.unique(fixed.wins)) <= {0, 0.5, 1}  # without a scale the higher score wins
    gate = judges.score_heads(gates, heads, examples, answers).gate.reshape(2, 3, 2)
    np.testing.assert_allclose(gate, gate[:, :1].repeat(3, 1), atol=1e-6)  # of the prompt alone
    weight = np.exp(gate) / np.exp(gate).sum(-1, keepdims=True)
    mixed = judges.by_models(("one", "two"), None, "adapter", 1.0)(examples, answers)
    np.testing.assert_allclose(mixed.scores, weight[..., 0] * one + weight[..., 1] * two, atol=1e-5)
    for arguments, message in (
        ((("one",), None, None, None), "either their weights or an adapter"),
        ((("one",), (1.0, 2.0), None, None), "must hold a weight for each of 1 paths"),
        ((("one",), None, "two", None), "is not a run of preference_orchestrator"),
        ((("one",), None, "adapter", None), "weighs 2 models, but paths names 1"),
    ):
        with pytest.raises(ValueError, match=message):
            judges.by_models(*arguments)


@pytest.mark.slow
def test_it_is_the_reward_of_a_run(reward_model, tmp_path):
    judge = {"judge": {"name": "model", "path": str(reward_model.path)}}
    one = {"steps": 1, "training.epochs": 1, "training.minibatches": 1, "warm_start.steps": 0, "evaluation.pass_at": ()}
    done = tiny.run(tiny.config(one | judge), tmp_path / "rl")
    line = tiny.trained(done.path)[0]
    assert 0 <= line["reward/verified"] <= 1  # what the task's own verifier says of the same answers
    assert line["reward/mean"] != line["reward/verified"]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ("bradley_terry_rm", "gpm_rm"))
def test_on_a_mesh_it_is_the_same_and_judges_alike(objective, tmp_path):
    changes = BRADLEY_TERRY | {"objective": {"name": objective}}
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    one = {"steps": 2, "training.epochs": 1, "training.minibatches": 1, "evaluation.pass_at": ()}
    one |= {"warm_start.steps": 10, "judge": {"name": "model", "path": str(tmp_path / "one" / "run")}}
    done = {}
    for name, devices, where in (("one", 1, {}), ("many", 8, mesh)):
        with tiny.quick(devices):
            model = tiny.run(tiny.config(changes | where), tmp_path / name / "run")
            judged = tiny.run(tiny.config(one | where), tmp_path / name / "rl")
        assert "AGAIN" not in model.printed + judged.printed
        done[name] = [tiny.untimed(run.path / "metrics.jsonl") for run in (model, judged)]
    for alone, spread in zip(done["one"], done["many"], strict=True):
        for a, b in zip(alone, spread, strict=True):
            assert b == pytest.approx(a, abs=1e-4, rel=1e-4), a["step"]
    assert all(line["reward/mean"] != 0 for line in done["one"][1] if "loss" in line)


def test_a_policys_run_is_no_judge(monkeypatch):
    policy = setup(tiny.config(), report=lambda _: None)
    monkeypatch.setattr(judges, "open_finished", lambda path, **_: (policy, None, 0))
    with pytest.raises(ValueError, match="'runs/rl' holds no reward or preference model: it has no score or embed"):
        judges.by_model("runs/rl", None)


def test_it_learns_from_data_alone():
    alone = setup(tiny.config(BRADLEY_TERRY | {"data": {"name": None}}), report=lambda _: None)
    with pytest.raises(ValueError, match="config.data.name is None: 'bradley_terry_rm' trains a reward model"):
        train.check_start(alone)


def test_what_a_judge_cannot_be_is_said_before_anything_is_compiled(reward_model):
    near = reward_model.path.parent / "rum"
    with pytest.raises(ValueError, match="config.judge.path: unknown run directory '.*rum': did you mean '.*/run'"):
        judges.by_model(str(near), None)
    judge = {"judge": {"name": "model", "path": str(reward_model.path)}}
    asks = setup(tiny.config(judge | {"tokenizer": {"name": "integers", "base": 6}}), report=lambda _: None)
    assert judges.characters(asks) == list("012345=")
    with pytest.raises(ValueError, match="cannot read what this run asks or may answer: character '4' of '4'"):
        judges.make_judge(asks)


def test_heads_come_and_go_between_runs(reward_model):
    """A preference model from a reward model's body, and a policy too: heads that are missing are fresh."""
    policy = setup(tiny.config(BRADLEY_TERRY | {"objective": {"name": "dpo"}}), report=lambda _: None)
    params, step = load_params(policy, str(reward_model.path))
    assert "heads" not in params and step == 4
    body = {name: x for name, x in reward_model.result.params.items() if name != "heads"}
    tiny.assert_same_params(params, body)
    other = setup(tiny.config(BRADLEY_TERRY | {"objective": {"name": "gpm_rm"}}), report=lambda _: None)
    params, _ = load_params(other, str(reward_model.path))
    assert params["heads"].keys() == {"embed", "gate"} and np.asarray(params["heads"]["embed"]["weight"]).any()


THEMIS = BRADLEY_TERRY | {"objective": {"name": "themis"}, "sampling.max_new_tokens": 12}


def test_tool_calls_are_read_after_the_answers(monkeypatch):
    """In training data and where the model judges, by the same function."""
    config = tiny.config(THEMIS | {"trace": "jaxpo.tasks.preferences.traces:reverser"})
    workspace = setup(config, report=lambda _: None)
    batch = workspace.preferences.units([0, 1], (0,))
    segment = batch.per_token["segment"]
    for row in range(4):
        ids = batch.completions[row][batch.mask[row] > 0]
        answer, tool, seen = (ids[segment[row][: len(ids)] == kind] for kind in (0, 1, 2))
        assert (answer[:-1] == tool).all() and (tool[::-1] == seen[:-1]).all()
    rows = judges.rows_of(workspace, workspace.task.test[:1], [["123"]])
    assert workspace.tokenizer.decode(rows.completions[0][rows.mask[0] > 0].tolist()) == "123123321"
    untold = setup(config, report=lambda _: None)
    untold.config.trace = None
    monkeypatch.setattr(judges, "open_finished", lambda path, **_: (untold, None, 0))
    with pytest.raises(ValueError, match="reads tool calls, and its config.trace makes none"):
        judges.by_model("runs/themis", None)


def test_traces_that_are_missing_or_read_by_nobody():
    with pytest.raises(ValueError, match="no answer of toy has one: set config.trace"):
        setup(tiny.config(THEMIS), report=lambda _: None)
    dpo = BRADLEY_TERRY | {"objective": {"name": "dpo"}, "trace": "jaxpo.tasks.preferences.traces:reverser"}
    with pytest.raises(ValueError, match="config.trace has no effect"):
        setup(tiny.config(dpo), report=lambda _: None)


def test_calibration_of_a_model_that_is_too_sure():
    metrics, bins = calibration(np.array([0.9, 0.9, 0.9, 0.9, 0.2]), np.array([1, 1, 0, 0, 0.0]))
    assert metrics["eval/accuracy"] == pytest.approx(0.6) and metrics["eval/confidence"] == pytest.approx(0.88)
    assert metrics["eval/ece"] == pytest.approx(0.8 * 0.4 + 0.2 * 0.2) and bins["pairs"] == 5
    assert metrics["eval/accuracy_lo"] < 0.6 < metrics["eval/accuracy_hi"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "trace"),
    [("bradley_terry_rm", None), ("gpm_rm", None), ("themis", "jaxpo.tasks.preferences.traces:reverser")],
)
def test_it_learns_what_the_verifier_says(objective, trace, tmp_path):
    changes = {
        "objective": {"name": objective},
        "trace": trace,
        "steps": 300,
        "evaluation.every": 100,
        "checkpoint.every": 100,
    }
    more = {"task": {"name": "toy", "train_size": 400, "test_size": 80, "seed": 0, "digits": 3, "base": 10}}
    more |= {"tokenizer": {"name": "integers", "base": 10}, "rollout.prompts": 32, "sampling.max_new_tokens": 16}
    with tiny.quick(4):
        done = tiny.run(tiny.config(BRADLEY_TERRY | changes | more), tmp_path / "run")
    assert done.result.after["eval/accuracy"] > 0.7 > done.result.before["eval/accuracy"]


def test_it_scores_given_pairs_and_says_which_are_hard(reward_model, tmp_path, capsys):
    workspace = reward_model.result.workspace
    examples = workspace.task.train[:3]
    wrong = [e.answer[::-1] + "1" for e in examples]
    pairs = [{"prompt": e.question, "chosen": e.answer, "rejected": w} for e, w in zip(examples, wrong, strict=True)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n\n")
    expected = judges.by_model(str(reward_model.path), None)(
        examples, [[e.answer, w] for e, w in zip(examples, wrong, strict=True)]
    ).scores
    gap = float(np.median(np.abs(expected[:, 0] - expected[:, 1])))
    flags = [f"--pairs={tmp_path / 'pairs.jsonl'}", f"--judge={reward_model.path}", f"--gap={gap}"]
    flags += [f"--{name}={tmp_path / name}.jsonl" for name in ("out", "hard")]
    score_pairs.main(flags)
    scored, hard = (
        [json.loads(x) for x in (tmp_path / f"{n}.jsonl").read_text().splitlines()] for n in ("out", "hard")
    )
    np.testing.assert_allclose([[r["rm_chosen"], r["rm_rejected"]] for r in scored], expected, atol=1e-6)
    assert [{k: r[k] for k in pairs[0]} for r in scored] == pairs
    assert len(hard) == 2 and all(abs(r["rm_chosen"] - r["rm_rejected"]) <= gap + 1e-9 for r in hard)
    assert "3 pairs" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is there already"):
        score_pairs.main(flags)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "1", "chosen": "2"}')
    with pytest.raises(SystemExit, match=r"pairs.jsonl:1: field 'rejected' is missing"):
        score_pairs.main([*flags[:3], f"--out={tmp_path / 'new.jsonl'}"])
    with pytest.raises(SystemExit, match="--judge is required"):
        score_pairs.main(flags[:1])
