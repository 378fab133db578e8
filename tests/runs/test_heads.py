"""Heads besides that of the vocabulary: saved and restored with a run, and left out or refused where it is exported,
sampled or evaluated as what it is not."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import evaluate, sample
from experiments.export import export_run
from jaxpo import registry
from jaxpo.learning.state import Run
from jaxpo.objectives import Term, from_terms
from jaxpo.objectives.grammar.base import asks_of
from jaxpo.policy import hf
from jaxpo.primitives import aggregation
from jaxpo.runs import trust
from jaxpo.runs.restore import checkpoint_of, checkpoints_of, open_finished, restore
from jaxpo.runs.workspace import setup
from jaxpo.storage.checkpoint import Checkpoints
from tests.runs import tiny

PAIRS = {"data": {"name": "task"}, "sampling.max_new_tokens": 4, "training.minibatches": 1}
RUNS = {
    "value": ({"objective": {"name": "critic"}}, {"value": ()}),
    "score": (PAIRS | {"objective": {"name": "bradley_terry_rm"}}, {"score": ()}),
    "embed": (PAIRS | {"objective": {"name": "gpm_rm"}, "heads.embed": 4}, {"embed": (4,), "gate": (2,)}),
}


def critic():
    """Its values learn the rewards."""
    term = Term("value", lambda stats, batch, state: (stats.value - batch.reward[:, None]) ** 2, aggregation.token_mean)
    return from_terms([term], asks=asks_of("reward", wants=("logp", "value")))


@pytest.fixture(autouse=True, scope="module")
def quick():
    entry = registry.Entry("objective", "critic", critic, "", {})
    with tiny.quick(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._TABLE, ("objective", "critic"), entry)
        yield


@pytest.fixture(scope="module", params=RUNS)
def saved(request, tmp_path_factory):
    """A run directory as a run leaves it after no iteration, its heads not what they began as."""
    changes, shapes = RUNS[request.param]
    path = tmp_path_factory.mktemp(request.param) / "run"
    workspace = setup(tiny.config(changes), report=lambda _: None)
    params = workspace.init_params(jax.random.key(1))
    heads = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(2), x.shape), params["heads"])
    run = Run(workspace.init_state({**params, "heads": heads}))
    checkpoints = Checkpoints(checkpoints_of(str(path)))
    checkpoints.save(0, *checkpoint_of(run, workspace.config.seed))
    checkpoints.close()
    (path / "config.json").write_text(json.dumps(workspace.config.to_dict()))
    (path / trust.SIGNATURE).write_text(json.dumps(trust.signature(workspace.config.to_dict())))
    (path / "tokenizer.json").write_text(json.dumps(workspace.tokenizer.to_json()))
    return request.param, path, workspace, run, shapes


def test_they_are_saved_and_restored(saved):
    name, path, workspace, run, shapes = saved
    heads = run.state.params["heads"]
    assert {n: head["bias"].shape for n, head in heads.items()} == shapes
    again, _ = restore(workspace, {}, checkpoints_of(str(path)))
    tiny.assert_same_params(again.state.params, run.state.params)
    tiny.assert_same_params(again.state.opt_state, run.state.opt_state)
    assert np.asarray(again.state.opt_state[0].mu["heads"][name]["weight"]).shape == heads[name]["weight"].shape
    without_data, params, step = open_finished(str(path), examples=False)
    tiny.assert_same_params(params, run.state.params)
    assert step == 0 and without_data.preferences is None and len(without_data.questions.train) == 1


def test_an_export_has_no_value_head_unless_it_is_asked_for_and_that_of_a_reward_model(saved, tmp_path, capsys):
    name, path, workspace, run, shapes = saved
    out, head = tmp_path / "exported", run.state.params["heads"][name]
    if name not in ("value", "score"):
        with pytest.raises(ValueError, match=rf"no place for its heads \({', '.join(sorted(shapes))}\)"):
            export_run(str(path), str(out))
        with pytest.raises(ValueError, match="unknown head of one number 'score': known: none"):
            export_run(str(path), str(out), head="score")
        assert not out.exists()
        return
    if name == "value":
        export_run(str(path), str(out))
        assert "left out, as no part of what writes answers: the heads value" in capsys.readouterr().out
        params = hf.load(hf.open_source(out), workspace.model.config)
        tiny.assert_same_params(params, {n: x for n, x in run.state.params.items() if n != "heads"})
    export_run(str(path), str(tmp_path / "judge"), head="value" if name == "value" else None)
    arrays, config = load_file(tmp_path / "judge/model.safetensors"), hf.read_config(tmp_path / "judge")
    np.testing.assert_array_equal(arrays["score.weight"], np.asarray(head["weight"])[None])
    assert "lm_head.weight" not in arrays
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["num_labels"] == 1
    assert config["score_bias"] == float(head["bias"]) and config["pad_token_id"] is None  # 0 ends a text too
    said = capsys.readouterr().out
    assert f"add {float(head['bias']):.6g} to what it gives" in said and "transformers reads row by row" in said
    assert not (tmp_path / "judge/generation_config.json").exists()


@pytest.mark.parametrize("saved", ("score", "embed"), indirect=True)
def test_a_reward_model_writes_nothing_and_is_evaluated_by_pairs(saved, capsys, monkeypatch):
    _, path, *_ = saved
    with pytest.raises(SystemExit, match="holds a reward model, which judges answers and writes none"):
        sample.main([f"--run={path}", "--prompt=12"])
    with pytest.raises(SystemExit, match="error: --samples has no effect: .* holds a reward model"):
        evaluate.main([f"--run={path}", "--samples=8"])
    monkeypatch.setenv("COLUMNS", "120")
    evaluate.main([f"--run={path}"])
    out = capsys.readouterr().out
    assert "checkpoint 0, 5 held-out pairs, toy" in " ".join(out.split())
    assert [line.split()[1] for line in out.splitlines() if line.startswith("│")] == [
        "accuracy",
        "confidence",
        "ece",
        "brier",
    ]
