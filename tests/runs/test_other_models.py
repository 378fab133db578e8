"""Models beside the policy (config.references): runs and folders as teachers, what is refused, resuming, and plans."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo import registry
from jaxpo.batch import Compared
from jaxpo.config.resolve import resolve
from jaxpo.learning.state import Run
from jaxpo.objectives import Asks, Shaping, Term, asks_of, from_terms, policy_gradient
from jaxpo.objectives.parts import advantages, ratios, surrogates
from jaxpo.parallel import make_mesh
from jaxpo.plan import trace
from jaxpo.plan.plan import shard_bytes
from jaxpo.policy import hf, transformer
from jaxpo.policy.config import TransformerConfig
from jaxpo.policy.stats import token_stats
from jaxpo.primitives.aggregation import token_mean
from jaxpo.protocols.gatherer import Watch
from jaxpo.protocols.rows import as_scored
from jaxpo.race.rules import Rules, resolved_by
from jaxpo.runs.gatherer import make_gatherer, make_stage
from jaxpo.runs.iteration import score_references
from jaxpo.runs.models import load_models
from jaxpo.runs.restore import checkpoint_of, checkpoints_of, first_params, open_finished
from jaxpo.runs.workspace import setup
from jaxpo.storage.checkpoint import Checkpoints
from jaxpo.text.tokenizers import IntegerTokenizer, for_transformers
from tests.policy.test_compared import full_kl
from tests.runs import tiny

QUICK = {
    "warm_start.steps": 0,
    "training.epochs": 1,
    "training.minibatches": 1,
    "rollout.prompts": 4,
    "rollout.responses": 2,
    "evaluation.pass_at": (),
    "evaluation.every": 100,
    "policy_temperature": 0.8,
}
REWARD = {
    "objective": {"name": "bradley_terry_rm"},
    "data": {"name": "task"},
    "policy.width": 24,
    "policy.heads": 3,
    "sampling.max_new_tokens": 4,
}
FOREIGN = TransformerConfig(vocab_size=6, width=24, layers=2, heads=4, kv_heads=2, qkv_bias=True, tied=False)
KL = Compared(full_kl)


def taught():
    """Tokens are made likelier by what the teacher says of them."""

    def value(stats, batch, state):
        return -stats.logp * batch.get("logp_teacher")

    return from_terms([Term("likely", value)], asks=asks_of("reward", "logp_teacher"))


def liked():
    """REINFORCE on the verifier's reward and the score of a reward model."""
    both = Shaping(lambda batch, state: batch.reward + batch.get("model_score"), asks_of("reward", "model_score"))
    return policy_gradient(
        advantage=advantages.reward(),
        ratio=ratios.token(),
        surrogate=surrogates.clipped(0.2, 0.2),
        aggregate=token_mean,
        shaping=[both],
    )


def distilled(old: bool = False):
    """The KL to the teacher; with ``old``, beside that of the old policy."""

    def value(stats, batch, state):
        return stats.derived["kl"] - (batch.get("logp_kl") if old else 0)

    asks = Asks(wants=frozenset({"kl"}), peeks=frozenset({"kl"}), derived={"kl": KL})
    return from_terms([Term("kl", value, asks=asks)], asks=asks_of("reward", *(["logp_kl"] if old else [])))


@pytest.fixture(autouse=True, scope="module")
def quick():
    with tiny.quick(), pytest.MonkeyPatch.context() as patch:
        for make in (taught, distilled, liked):
            entry = registry.Entry("objective", make.__name__, make, "", {})
            patch.setitem(registry._TABLE, ("objective", make.__name__), entry)
        yield


def save_run(path, changes):
    """A run directory as a run leaves it after no iteration."""
    workspace = setup(tiny.config(QUICK | changes), report=lambda _: None)
    params = jax.tree.map(lambda x: 3 * x + 0.1, workspace.init_params(jax.random.key(5)))
    checkpoints = Checkpoints(checkpoints_of(str(path)))
    checkpoints.save(0, *checkpoint_of(Run(workspace.init_state(params)), 0))
    checkpoints.close()
    (path / "config.json").write_text(json.dumps(workspace.config.to_dict()))
    (path / "tokenizer.json").write_text(json.dumps(workspace.tokenizer.to_json()))


def save_folder(path, config=FOREIGN, tokenizer=None):
    """A pretrained folder, as of another program."""
    params = jax.tree.map(lambda x: 3 * x, transformer.init(config, jax.random.key(6)))
    hf.export(params, config, path, tokenizer=tokenizer)


def adapters(root):
    """Of a run that trains adapters beside the weights of the folder."""
    return {"policy": dict(name="pretrained", path=str(root / "folder")), "lora.rank": 2}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Paths of teachers by name."""
    root = tmp_path_factory.mktemp("teachers")
    save_run(root / "run", {"policy.width": 24, "policy.heads": 3})
    save_run(root / "reward", REWARD)
    save_run(root / "other tokens", {"tokenizer": {"name": "integers", "base": 5}})
    save_folder(root / "folder")
    save_run(root / "adapters", adapters(root))
    wide = TransformerConfig(**{**FOREIGN.__dict__, "vocab_size": 9})
    save_folder(root / "wide", wide)
    save_folder(root / "wide with tokens", wide, for_transformers(IntegerTokenizer(4)))
    (root / "begun").mkdir()
    (root / "begun" / "config.json").write_text((root / "run" / "config.json").read_text())
    return root


def config_of(path, name="taught", **changes):
    return tiny.config(QUICK | {"objective": dict(name=name), "references.teacher": str(path)} | changes)


def scored(config):
    """A workspace, and a batch that its policy has sampled, scored as in a run."""
    workspace = setup(config, load_models=load_models, report=lambda _: None)
    params, gatherer = first_params(workspace, jax.random.key(0)), make_gatherer(workspace, Watch())
    rollouts = gatherer.reward(gatherer.generate(params, np.arange(4, dtype=np.int32), jax.random.key(1)))
    run = Run(workspace.init_state(params))
    return workspace, score_references(make_stage(workspace, Watch()), run, workspace.put(rollouts))


def known(path, kind):
    """The teacher at a path, read without the run that it teaches."""
    if kind in ("run", "adapters"):
        workspace, params, _ = open_finished(str(path), examples=False)
        return workspace.model, workspace.whole(params)
    source = hf.open_source(path)
    config = FOREIGN if kind == "folder" else TransformerConfig(**{**FOREIGN.__dict__, "vocab_size": 9})
    return transformer.build(config), hf.load(source, config)


@pytest.mark.parametrize("kind", ["run", "folder", "wide with tokens", "adapters"])
def test_log_probs_are_those_of_the_other_model(places, kind):
    """A policy of adapters has a teacher of adapters: its own frozen weights are no part of the teacher."""
    _, batch = scored(config_of(places / kind, **(adapters(places) if kind == "adapters" else {})))
    model, params = known(places / kind, kind)
    expected = token_stats(model, params, jax.tree.map(jnp.asarray, as_scored(batch)), temperature=0.8).logp
    assert model.config.width == 24 and set(batch.per_token) == {"logp_sampler", "logp_teacher"}
    inside = np.asarray(batch.mask) > 0
    np.testing.assert_allclose(batch.get("logp_teacher")[inside], expected[inside], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_a_reward_model_scores_the_rows(places, packing):
    changes = {"references.reward_model": str(places / "reward"), "training.packing": packing}
    workspace, batch = scored(tiny.config(QUICK | {"objective": dict(name="liked")} | changes))
    model, params, _ = open_finished(str(places / "reward"), examples=False)
    rows = jax.tree.map(jnp.asarray, as_scored(batch).replace(per_token={}))
    expected = token_stats(model.model, params, rows, wants=frozenset({"score"})).score
    np.testing.assert_allclose(batch.get("model_score"), expected, rtol=1e-5, atol=1e-5)
    assert len(set(np.asarray(batch.get("model_score")).round(6))) > 1
    prepared, _ = workspace.objective.prepare(batch, workspace.objective.init())
    np.testing.assert_allclose(prepared.reward, batch.reward + batch.get("model_score"), rtol=1e-6)


@pytest.mark.parametrize(
    ("place", "objective", "message"),
    [
        ("reward", "grpo", "config.references.reward_model has no effect: objective 'grpo' needs no model_score"),
        (None, "liked", "config.references.reward_model is None, but objective 'liked' needs the model: set it to"),
        ("run", "liked", "config.references.reward_model '.*run' has no score head: it must be a run dir"),
        ("folder", "liked", "config.references.reward_model '.*folder' has no score head"),
    ],
)
def test_a_reward_model_that_is_refused(places, place, objective, message):
    config = tiny.config(QUICK | {"objective": dict(name=objective)})
    config.references.reward_model = None if place is None else str(places / place)
    with pytest.raises(ValueError, match=message):
        setup(config, load_models=load_models)


@pytest.mark.parametrize("packing", [False, True])
def test_the_old_policy_is_compared_too(places, packing):
    config = config_of(places / "folder", "distilled", **{"objective.old": True, "training.packing": packing})
    workspace, batch = scored(config)
    assert {"hidden_teacher", "logp_kl", "logp_sampler"} == set(batch.per_token)
    model, params = known(places / "folder", "folder")
    rows = jax.tree.map(jnp.asarray, as_scored(batch).replace(per_token={}))

    def logits(model, params):
        hidden = token_stats(model, params, rows, wants=frozenset({"hidden"})).derived["hidden"]
        return (model.logits(params, hidden) / 0.8).reshape(-1, 6)

    own = logits(workspace.model, workspace.init_params(jax.random.key(0)))
    expected = full_kl(own, None, logits(model, params)).reshape(batch.mask.shape)
    inside = np.asarray(batch.mask) > 0
    np.testing.assert_allclose(batch.get("logp_kl")[inside], expected[inside], rtol=1e-4, atol=1e-5)
    assert expected[inside].min() > 1e-3


def test_a_policy_learns_from_its_teacher_and_resumes_to_the_bit(places, tmp_path):
    """Two iterations at once, and one and another; on two devices, with two microbatches."""
    changes = {"steps": 2, "checkpoint.every": 1, "evaluation.every": 1, "training.microbatches": 2}
    with tiny.quick(2):
        whole = tiny.run(config_of(places / "run", "distilled", **changes), tmp_path / "whole")
        half = {**changes, "steps": 1}
        tiny.run(config_of(places / "run", "distilled", **half), tmp_path / "parts")
        parts = tiny.run(config_of(places / "run", "distilled", **changes), tmp_path / "parts", resume=True)
    assert "AGAIN" not in whole.printed and "compiled score by the teacher" in whole.printed
    tiny.assert_same_params(whole.result.params, parts.result.params)
    assert [line["loss"] for line in tiny.trained(whole.path)] == [line["loss"] for line in tiny.trained(parts.path)]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in tiny.trained(whole.path))
    workspace, *_ = open_finished(str(whole.path))  # a finished run does not need its teacher
    assert not workspace.models


@pytest.mark.parametrize(
    ("place", "objective", "message"),
    [
        ("run", "grpo", "config.references.teacher has no effect: objective 'grpo' needs no logp_teacher"),
        (None, "taught", "config.references.teacher is None, but objective 'taught' needs the model: set it to"),
        (None, "distilled", "config.references.teacher is None, but objective 'distilled' needs the model"),
        ("absent", "taught", "config.references.teacher '.*absent' does not exist: it is a model folder, a GGUF"),
        ("begun", "taught", "config.references.teacher '.*begun': this run directory has no checkpoint"),
        ("", "taught", "config.references.teacher '.*': .* has no config.json: it is not the folder of a model"),
        ("other tokens", "taught", r"config.references.teacher '.*' has other tokens than the policy \(7 and 6"),
        ("wide", "taught", "config.references.teacher '.*wide' has 9 vocabulary rows and the policy 6"),
    ],
)
def test_what_is_refused_before_anything_is_written(places, tmp_path, place, objective, message):
    config = config_of(places / (place or ""), objective)
    config.references.teacher = None if place is None else str(places / place)
    with pytest.raises(ValueError, match=message):
        tiny.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_mesh_that_does_not_divide_the_teacher(places):
    config = config_of(places / "run", **{"mesh.data": 1, "mesh.tensor": 2})
    with tiny.quick(2), pytest.raises(ValueError, match="config.mesh.tensor 2 does not divide config.references.teac"):
        setup(config, load_models=load_models)


def test_a_statistic_that_compares_with_what_moves_in_an_iteration():
    compares = Asks(wants=frozenset({"kl"}), derived={"kl": Compared(full_kl, "ema")})
    objective = from_terms([Term("kl", lambda stats, b, s: stats.derived["kl"], asks=compares)])
    with pytest.raises(ValueError, match="unknown other model 'ema'.*known: prev, ref, soup, teacher"):
        resolve(tiny.config(QUICK), 1, objective=objective)


def test_a_race_has_no_teacher():
    for make in (taught, distilled):
        with pytest.raises(ValueError, match="needs the model teacher beside the policy, and a race has none"):
            resolved_by(Rules(), "mine", make(), 4)


@pytest.mark.parametrize("objective", ["taught", "distilled"])
def test_a_plan_counts_the_teacher(places, objective):
    config = config_of(places / "folder", objective, **{"mesh.data": 1, "mesh.fsdp": 2})
    mesh = make_mesh(dict(data=1, fsdp=2), tiny.DEVICES[:2])
    resolved = resolve(config, 2)
    run = trace.trace_run(resolved, mesh, trace.data_of(resolved))
    assert [s.name for s in run.steps][:2] == ["rollout", "teacher"] and run.steps[1].times == 1
    theirs = {name: x for name, x in run.state.items() if name.startswith("teacher")}
    shapes = jax.eval_shape(partial(transformer.init, FOREIGN), jax.random.key(0))
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    assert total / 2 <= shard_bytes(theirs) < total and set(run.steps[1].state) == set(theirs)
    compares = objective == "distilled"
    assert ("teacher_head" in run.steps[-1].state) == ("teacher_head" in theirs) == compares
    assert ("hidden_teacher" in run.steps[-1].arguments[1].per_token) == compares
