"""Runs that train adapters beside a GGUF's frozen weights, and runs with heads of their own."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments.export import export_run
from jaxpo import registry
from jaxpo.batch import Rollouts
from jaxpo.config.resolve import resolve
from jaxpo.objectives.grammar.base import Term, asks_of, from_terms
from jaxpo.parallel import make_mesh
from jaxpo.plan.trace import data_of, trace_run
from jaxpo.policy import hf, lora
from jaxpo.policy.stats import token_stats
from jaxpo.primitives import aggregation
from jaxpo.protocols.gatherer import Watch
from jaxpo.runs.gatherer import make_gatherer, make_stage
from jaxpo.runs.loop import Session, keys_of
from jaxpo.runs.restore import checkpoint_of, first_params, open_finished
from jaxpo.runs.train import begin
from jaxpo.runs.workspace import setup
from jaxpo.storage.checkpoint import restore_params
from tests.policy import tiny_gguf
from tests.runs import tiny


@pytest.fixture(autouse=True, scope="module")
def surroundings():
    entry = registry.Entry("objective", "mine", regressed, "", {})
    with tiny.quick(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._TABLE, ("objective", "mine"), entry)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tiny_gguf.write(path)
    return path


def regressed():
    """A value head learns a number, ``value_old`` and a reference are asked for, and every token moves the policy."""

    def error(stats, batch, state):
        return (stats.value - 1) ** 2 + 0 * batch.get("value_old")

    def gain(stats, batch, state):
        return batch.get("logp_ref") - stats.logp

    terms = [Term("value", error, aggregation.token_mean), Term("policy", gain, aggregation.token_mean)]
    return from_terms(terms, asks=asks_of("logp_ref", "value_old", wants=("logp", "value")))


def config(model, **changes):
    out = tiny.config({"warm_start.steps": 0, "training.epochs": 1, "training.minibatches": 1, "steps": 1})
    out.objective = ConfigDict(dict(name="mine"))
    out.tokenizer = ConfigDict(dict(name="pretrained", path=str(model), chat_template=True))
    out.policy = ConfigDict(dict(name="pretrained", path=str(model)))
    out.evaluation.update(every=9, pass_at=())
    out.checkpoint.keep = 3
    out.lora.update(rank=2, alpha=4.0, targets=("wq", "wo", "w_in"))
    for path, value in changes.items():
        block, _, field = path.rpartition(".")
        (out[block] if block else out)[field] = value
    return out


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """One iteration."""
    return tiny.run(config(model), tmp_path_factory.mktemp("lora") / "run")


def test_checkpoints_hold_adapters_only(finished, model):
    saved, _ = restore_params(finished.path / "checkpoints", 0)
    assert saved.keys() == {"blocks", "heads"} and saved["blocks"].keys() == {"wq", "wo", "w_in"}
    whole = sum(np.prod(hf.open_source(model).shape(name)) for name in hf.open_source(model).names())
    assert (
        f"policy: {sum(x.size for x in jax.tree.leaves(saved)):,} parameters beside {whole:,} frozen"
        in finished.printed
    )
    assert not any(np.asarray(x["b"]).any() for x in saved["blocks"].values())
    moved = [np.abs(np.asarray(x["b"])).max() for x in finished.result.params["blocks"].values()]
    assert 0 < min(moved) and max(moved) < 1e-2


@pytest.mark.slow
def test_a_run_that_is_resumed_goes_on_beside_the_same_weights(model, tmp_path):
    whole = tiny.run(config(model, steps=2), tmp_path / "whole")
    tiny.run(config(model), tmp_path / "parts")
    parts = tiny.run(config(model, steps=2), tmp_path / "parts", resume=True)
    assert "resumed at iteration 1" in parts.printed
    tiny.assert_same_params(whole.result.params, parts.result.params)


@pytest.mark.slow
def test_a_mesh_trains_the_same_adapters(finished, model, tmp_path):
    with tiny.quick(devices=4):
        spread = tiny.run(config(model, **{"mesh.fsdp": 2}), tmp_path / "run")
    assert len(spread.result.workspace.base["blocks"]["wq"].sharding.device_set) == 4
    assert {x.sharding.is_fully_replicated for x in jax.tree.leaves(spread.result.params)} == {True}
    for a, b in zip(*(jax.tree.leaves(x.result.params) for x in (spread, finished)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_reference_is_the_base_and_no_second_copy(finished):
    """The reference ``ref`` is the adapters of the start, whose product is zero."""
    arrays = checkpoint_of(reference_run(finished), 0)[0]
    ref = arrays["references"]["ref"]
    assert jax.tree.map(jnp.shape, ref) == jax.tree.map(jnp.shape, finished.result.params)
    workspace = finished.result.workspace
    batch = some_batch(workspace)
    plain = workspace.score(ref, batch).logp
    base = hf.load(hf.open_source(workspace.config.policy.path), workspace.model.config, workspace.mesh)
    expected = jax.jit(lambda p: token_stats(workspace.model, p, batch).logp)(base)
    np.testing.assert_allclose(plain, expected, atol=1e-5)


def reference_run(finished):
    workspace = finished.result.workspace
    watch = Watch()
    gatherer, stage = make_gatherer(workspace, watch), make_stage(workspace, watch)
    return begin(Session(workspace, gatherer, stage, keys_of(0), None, None), {})


def some_batch(workspace):
    tokens = jax.random.randint(jax.random.key(0), (32, workspace.questions.train.tokens.shape[1] + 3), 0, 200)
    return Rollouts(tokens=tokens, mask=jnp.ones((32, 3)), prompt_length=jnp.full(32, tokens.shape[1] - 3))


def test_what_is_exported_is_merged(finished, tmp_path):
    export_run(str(finished.path), str(tmp_path / "out"))
    workspace, params, _ = open_finished(finished.path)
    merged = {name: x for name, x in lora.merge(workspace.base, params, 2.0).items() if name != "heads"}
    source = hf.open_source(tmp_path / "out")
    again = hf.load(source, workspace.model.config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), again, merged)
    assert np.abs(np.asarray(again["blocks"]["wo"] - workspace.base["blocks"]["wo"])).max() > 1e-6


def test_an_adapter_goes_out_and_another_run_starts_from_it(finished, model, tmp_path, capsys):
    """And goes on when its folder is gone."""
    export_run(str(finished.path), str(tmp_path / "out"), adapter=True)
    assert "left out, as no part of what writes answers: the heads value" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == str(model)
    own = {"lora.path": str(tmp_path / "out"), "lora.rank": 0}
    run = tiny.run(config(model, steps=0, **own), tmp_path / "run")
    assert (run.result.workspace.config.lora.rank, run.result.workspace.config.lora.alpha) == (2, 4.0)
    first = run.result.params
    jax.tree.map(np.testing.assert_array_equal, first["blocks"], finished.result.params["blocks"])
    assert not np.asarray(first["heads"]["value"]["weight"]).any()
    shutil.rmtree(tmp_path / "out")
    rest = tiny.run(config(model, **own), tmp_path / "run", resume=True)
    assert "resumed at iteration 0" in rest.printed and rest.result.iteration == 1
    open_finished(str(tmp_path / "run"))
    with pytest.raises(ValueError, match="--dtype has no effect with --adapter"):
        export_run(str(finished.path), str(tmp_path / "a"), dtype="float32", adapter=True)
    export_run(str(tmp_path / "run"), str(tmp_path / "again"), adapter=True)
    own = {"lora.path": str(tmp_path / "again"), "init_from": "runs/a"}
    with pytest.raises(ValueError, match="config.lora.path and config.init_from both give the first adapters"):
        resolve(config(model, **own), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.rank": -1}, "config.lora.rank must be a whole number of at least 0, not -1"),
        ({"lora.alpha": 0.0}, "config.lora.alpha must be a positive number, not 0.0"),
        ({"lora.targets": ("wz",)}, "unknown lora target 'wz'"),
    ],
)
def test_what_is_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        resolve(config(model, **changes), 1)


def test_a_plan_counts_the_frozen_weights(model):
    """The steps of a run with adapters, traced from shapes: the base is an argument of each."""
    resolved = resolve(config(model), 1)
    mesh = make_mesh(resolved.config.mesh, jax.devices()[:1])
    planned = trace_run(resolved, mesh, data_of(resolved))
    sizes = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in planned.state.items()}
    assert sizes["base"] > sizes["params"] == sizes["ref"]
    for step in planned.steps:
        taken = {x.shape for x in step.trace().jaxpr.in_avals}
        assert planned.state["base"]["embedding"].shape in taken and "base" in step.state


def test_adapters_need_weights_to_lie_beside():
    with pytest.raises(ValueError, match="config.lora.rank 2 trains adapters beside frozen weights"):
        resolve(tiny.config({"lora.rank": 2}), 1)


def test_an_objective_that_wants_a_value_gets_a_head(finished, model, tmp_path):
    """Beside adapters, and (without another run) beside a whole policy."""
    head = finished.result.params["heads"]
    assert head.keys() == {"value"} and head["value"]["weight"].shape == (tiny_gguf.WIDTH,)
    assert np.abs(np.asarray(head["value"]["weight"])).max() > 0 and head["value"]["bias"] > 0
    workspace = setup(config(model, **{"lora.rank": 0}))
    params = first_params(workspace, jax.random.key(0))
    assert workspace.base is None and not np.asarray(params["heads"]["value"]["weight"]).any()
    shapes = jax.eval_shape(workspace.init_params, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
