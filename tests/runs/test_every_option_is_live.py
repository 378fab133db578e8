"""Every option is live: each field of a run's config is read, and changing it changes the run."""

import dataclasses
import functools
import inspect
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxpo.batch import Rollouts
from jaxpo.config import checks
from jaxpo.config.fields import default
from jaxpo.config.fill import fill
from jaxpo.config.resolve import resolve
from jaxpo.learning.programs import optimizer_of
from jaxpo.learning.state import TrainState
from jaxpo.parallel import AXES
from jaxpo.policy.config import TransformerConfig
from jaxpo.runs.gatherer import prompt_order
from jaxpo.runs.workspace import setup
from tests.runs import tiny


@pytest.fixture(autouse=True, scope="module")
def quick():
    with tiny.quick():
        yield


def leaves(block, path=""):
    for name, value in block.items():
        yield from leaves(value, f"{path}{name}.") if isinstance(value, ConfigDict) else [path + name]


def sources():
    """Everything that may read a config, without what lists the fields and what only checks them."""
    files = [file for folder in ("jaxpo", "experiments") for file in (tiny.ROOT / folder).rglob("*.py")]
    passive = [inspect.getsource(f) for f in (default, checks.check_fields, checks._check_division)]
    return functools.reduce(lambda text, f: text.replace(f, ""), passive, "\n".join(f.read_text() for f in files))


SOURCES = sources()
WHOLE = {"policy", "sampling", "mesh", "protocol", "schedule", "references"}  # blocks that are handed on whole


@pytest.mark.parametrize("path", [p for p in leaves(default()) if not WHOLE & set(p.split("."))])
def test_every_field_is_read_somewhere(path):
    """As ``config.rollout.prompts``, ``training.epochs`` or ``config["learning_rate"]``, defaults and checks aside."""
    *blocks, field = path.split(".")
    reads = [rf"\b(config|block)(\.{field}\b|\[\"{field}\"\])", *[rf"\b{block}\.{field}\b" for block in blocks[-1:]]]
    assert re.search("|".join(reads), SOURCES), path


POLICY = {
    "layers": 2,
    "heads": 4,
    "kv_heads": 1,
    "head_dim": 4,
    "mlp_width": 24,
    "tied": False,
    "width": 32,
    "rope_theta": 1e3,
    "rope_scaling": ("linear", 2.0),
    "norm_eps": 1e-5,
    "qkv_bias": True,
    "qk_norm": True,
    "norm_plus_one": True,
    "post_norms": True,
    "embedding_scaled": True,
    "activation": "gelu_tanh",
    "query_scalar": 3.0,
    "attention_softcap": 5.0,
    "final_softcap": 4.0,
    "window": 2,
    "local_layers": (0,),
    "local_rope_theta": 50.0,
    "experts": 3,
    "experts_per_token": 2,
    "norm_topk": True,
    "dtype": "bfloat16",
    "param_dtype": "bfloat16",
    "scan_layers": False,
    "remat": "full",
    "attention": "xla",
}
NEEDS = {  # fields that have no effect without others
    "local_layers": ("window",),
    "local_rope_theta": ("window", "local_layers"),
    "experts": ("experts_per_token",),
    "experts_per_token": ("experts",),
    "norm_topk": ("experts", "experts_per_token"),
}
SAMPLING = {"max_new_tokens": 9, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.2, "stop": ("1",)}


def test_every_field_of_the_policy_is_one_of_the_models():
    fields = {f.name for f in dataclasses.fields(TransformerConfig)} - {"vocab_size"}
    assert set(POLICY) == set(fill(default()).policy) - {"name"} == fields
    for name, value in POLICY.items():
        together = {field: POLICY[field] for field in NEEDS.get(name, ())} | {name: value}
        config = tiny.config({f"policy.{field}": x for field, x in together.items()})
        assert getattr(setup(config).model.config, name) == value


def test_every_field_of_sampling_reaches_the_sampler():
    assert set(SAMPLING) == set(default().sampling)
    for name, value in SAMPLING.items():
        options = setup(tiny.config({f"sampling.{name}": value})).sampling
        assert options.stop_table is not None if name == "stop" else getattr(options, name) == value
    assert resolve(tiny.config(), 1).sampling((3, 4)).eos_ids == (3, 4)


@pytest.mark.parametrize("field", AXES)
def test_every_axis_of_the_mesh(field):
    ones = dict.fromkeys(AXES, 1)
    experts = {"policy.experts": 4, "policy.experts_per_token": 2}  # else nothing lies over that axis
    with tiny.quick(devices=2):
        assert dict(setup(tiny.config({"mesh": ones | {field: 2}, **experts})).mesh.shape) == ones | {field: 2}


def test_a_protocols_fields_reach_it():
    workspace = setup(tiny.config({"objective": {"name": "dapo"}, "protocol": {"name": None, "max_batches": 3}}))
    assert inspect.getclosurevars(workspace.protocol.collect).nonlocals["max_batches"] == 3


def data_of(config):
    """What a run trains and evaluates on, as far as it is settled before anything is computed."""
    w = setup(config)
    train, test = w.questions.train, w.questions.test
    order = prompt_order(config.seed, 0, config.rollout.prompts, len(train))
    shown = w.questions.demonstrations(np.arange(len(train)), config.warm_start.drop_last, config.seed)
    scores = w.task.score(test.examples[:2], [test.examples[0].answer, test.examples[1].answer[:1]])
    return (
        [x.tolist() for x in (order, train.tokens, test.tokens, shown.tokens, shown.mask)],
        scores,
        w.tokenizer.vocab_size,
    )


DATA = {
    "seed": 1,
    "task.seed": 1,
    "task.digits": 3,
    "task.base": 3,
    "task.train_size": 9,
    "task.test_size": 3,
    "task.partial_credit": True,
    "tokenizer.base": 5,
    "rollout.prompts": 4,
    "rollout.prompt_width": 9,
    "evaluation.prompts": 2,
    "warm_start.drop_last": 1.0,
    "sampling.max_new_tokens": 5,
}


@pytest.mark.parametrize("path", DATA)
def test_changing_a_field_changes_the_data(path):
    base = {"sampling.max_new_tokens": 4}
    assert data_of(fill(tiny.config(base | {path: DATA[path]}))) != data_of(fill(tiny.config(base)))


def update_of(config):
    """The traced optimizer step of a run, on rows of which only the shapes are known."""
    w, n = setup(config), config.rollout.prompts * config.rollout.responses
    token, row = (np.zeros(shape, np.float32) for shape in ((n, 3), (n,)))
    batch = Rollouts(
        tokens=np.zeros((n, 6), np.int32),
        mask=token,
        prompt_length=np.full(n, 3),
        reward=row,
        group=np.arange(n) // 4,
        logp_old=token,
        entropy_old=token,
        logp_ref=token,
        shared_prompt=config.rollout.responses,
    )
    params = jax.eval_shape(w.init_params, jax.random.key(0))
    state = TrainState(params, jax.eval_shape(optimizer_of(config, w.objective).init, params), w.objective.init())
    batch, _ = jax.eval_shape(w.objective.prepare, batch, state.objective)
    return w.programs.update.lower(state, batch, np.arange(n // config.training.minibatches), fresh=False).as_text()


UPDATE = {
    "policy_temperature": 0.5,
    "objective.beta": 0.1,
    "optimizer.b1": 0.5,
    "optimizer.clip_norm": 1.0,
    "training.microbatches": 2,
    "policy.remat": "full",
    "policy.scan_layers": False,
}


@pytest.fixture(scope="module")
def update():
    return update_of(fill(tiny.config()))


@pytest.mark.parametrize("path", UPDATE)
def test_changing_a_field_changes_the_update(update, path):
    config = fill(tiny.config())
    config.update_from_flattened_dict({path: UPDATE[path]})
    assert update_of(config) != update
