"""Runs that start from a model folder: out of a run, into another, out again, bit for bit; and what is refused."""

import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import export, train_rl
from jaxpo.config.fill import fill
from jaxpo.config.resolve import resolve
from jaxpo.policy.config import TransformerConfig
from jaxpo.policy.hf import export as write_model
from jaxpo.policy.hf import read_config
from jaxpo.policy.transformer import init
from jaxpo.runs.restore import open_finished
from jaxpo.runs.workspace import setup, within_table
from jaxpo.text.tokenizer_files import transformers_library
from jaxpo.text.tokenizers import PretrainedTokenizer, for_transformers
from tests.runs import tiny, tiny_model

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True, scope="module")
def quick():
    with tiny.quick():
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    return tiny.finished(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    """What the tiny run has learned, as a model folder."""
    out = tmp_path_factory.mktemp("models") / "tiny"
    export.main([f"--workdir={finished.path}", f"--out={out}"])
    return out


def started_from(path, changes=None):
    """A run of one iteration with the policy at ``path``."""
    one = {"steps": 1, "warm_start.steps": 0, "evaluation.pass_at": (), "evaluation.every": 100}
    return tiny.config({"policy": dict(name="pretrained", path=str(path))} | one | (changes or {}))


def test_out_of_a_run_into_another_and_out_again(finished, folder, tmp_path):
    """The second run starts from what the first one has learned, and needs the folder no longer once it has begun."""
    here = shutil.copytree(folder, tmp_path / "model")
    run = tiny.run(started_from(here), tmp_path / "run")
    assert run.result.before["eval/greedy"] == finished.result.after["eval/greedy"]
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), finished.result.params, run.result.params)
    assert all(x > 0 for x in jax.tree.leaves(moved))
    shutil.rmtree(here)
    workspace, params, _ = open_finished(str(tmp_path / "run"), 0)
    tiny.assert_same_params(params, finished.result.params)
    assert workspace.model.config == resolve(started_from(folder), 1).transformer()
    export.main([f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'again'}", "--step=0"])
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert read_config(tmp_path / "again") == read_config(folder)


@pytest.mark.slow
def test_adapters_go_out_added_to_their_weights(folder, tmp_path):
    """Before they have learned anything they add nothing; later on they change what they belong to, and that alone."""
    run = tiny.run(started_from(folder, {"lora.rank": 2, "lora.targets": ("wq",)}), tmp_path / "run")
    for step in (0, 1):
        export.main([f"--workdir={run.path}", f"--out={tmp_path / str(step)}", f"--step={step}"])
    assert (tmp_path / "0" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    start, end = (load_file(tmp_path / step / WEIGHTS) for step in "01")
    assert [name for name in start if (start[name] != end[name]).any()] == ["model.layers.0.self_attn.q_proj.weight"]


def test_the_folder_is_one_of_transformers(finished, folder):
    config = transformers_library().AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.vocab_size, str(config.dtype)) == ("llama", 6, "float32")
    tokenizer = transformers_library().AutoTokenizer.from_pretrained(folder)
    ours = finished.result.workspace.tokenizer
    assert tokenizer.encode("12=30") == ours.encode("12=30") and tokenizer.decode(ours.encode("12=30")) == "12=30"
    assert tokenizer.eos_token_id == 0 == ours.eos_ids[0]
    assert json.loads((folder / "generation_config.json").read_text()) == dict(eos_token_id=[0], pad_token_id=0)


def test_a_tokenizer_of_characters_goes_out_too():
    from jaxpo.text.tokenizers import CharTokenizer

    ours = CharTokenizer("añ b")
    theirs = for_transformers(ours)
    assert theirs.encode("a ñb\n") == ours.encode("a ñb\n") and theirs.decode(ours.encode("a ñb\n")) == "a ñb\n"
    assert (theirs.pad_token_id, theirs.eos_token_id) == (ours.pad_id, ours.eos_ids[0]) == (0, 1)


@pytest.mark.parametrize(("vocab_size", "fits"), [(9, True), (6 + 511, True), (6 + 512, False), (5, False)])
def test_tables_may_be_padded(tmp_path, vocab_size, fits):
    """A model may have some more rows than the tokenizer has tokens; stop strings know them too."""
    policy = TransformerConfig(vocab_size=vocab_size, width=16, layers=1, heads=2)
    params = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(partial(init, policy), jax.random.key(0))
    )
    write_model(params, policy, tmp_path / "model")
    config = started_from(tmp_path / "model", {"sampling.stop": ("1",)})
    if fits:
        workspace = setup(config)
        assert workspace.tokenizer.vocab_size == 6 and workspace.model.config.vocab_size == vocab_size
        assert workspace.sampling.stop_table.shape[1] == vocab_size
    else:
        with pytest.raises(ValueError, match=f"the tokenizer has 6 tokens, the policy {vocab_size}: set config.tok"):
            setup(config)


def test_tokens_beyond_the_table_may_not_be_used(tmp_path):
    """A special token that no text has does no harm (Gemma 3 1B); a text with one is refused, and such an end."""
    tiny_model.write(tmp_path / "model")
    whole = PretrainedTokenizer(str(tmp_path / "model"), chat_template=True)
    rows, text = whole.vocab_size - 1, "\u00ad"  # a text of two bytes, the second of which is the last token
    assert whole.encode(text)[1] == rows
    cut = within_table(whole, rows)
    assert cut.encode("a") == whole.encode("a")
    with pytest.raises(ValueError, match=rf"token '.' \({rows}\) is beyond the {rows} rows of the policy's vocabulary"):
        cut.encode(text)
    assert within_table(whole, whole.vocab_size + 250) is whole
    with pytest.raises(ValueError, match="which pads or ends texts, is beyond the 1 rows"):
        within_table(whole, 1)


def test_how_to_compute_is_chosen_and_the_shape_is_not(folder):
    numerics = dict(dtype="bfloat16", param_dtype="bfloat16", scan_layers=False, remat="full")
    config = fill(started_from(folder, {f"policy.{name}": value for name, value in numerics.items()}))
    made = resolve(config, 1).transformer()
    assert {name: getattr(made, name) for name in numerics} == numerics and made.width == 16
    config.unlock()
    config.policy.width = 32
    with pytest.raises(
        ValueError, match="unknown field of config.policy .pretrained. 'width': .*known: attention, dtype"
    ):
        fill(config)


def test_an_update_that_rounding_swallows_is_told_once(folder, tmp_path):
    """bfloat16 parameters and a small step: how many moved is in the metrics, the remedy on the screen."""
    half = {"policy.param_dtype": "bfloat16", "optimizer.learning_rate": 1e-9, "steps": 2}
    run = tiny.run(started_from(folder, half), tmp_path / "run")
    moved = [line["update/moved_frac"] for line in tiny.trained(run.path)]
    assert len(moved) == 2 and max(moved) < 0.1
    assert run.printed.count("WARNING") == 1
    assert "iteration 1: rounding swallowed the update of" in run.printed and "param_dtype=float32" in run.printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.policy.path={model}x"], "unknown model folder or GGUF file '.*tinyx': did you mean '.*tiny'"),
        (["--config.policy.path={model}", "--config.policy.width=8"], "unknown field of config.policy.*'width'"),
        ([], "policy 'pretrained' needs path"),
        (
            ["--config.policy.path={model}", "--config.tokenizer.base=8"],
            "the tokenizer has 10 tokens, the policy 6: set config.tokenizer.name to pretrained",
        ),
        (["--config.policy.path={broken}"], "tensor model.norm.weight is missing"),
    ],
)
def test_refused_before_anything_is_written(folder, tmp_path, arguments, message):
    broken = shutil.copytree(folder, tmp_path / "broken")
    arrays = load_file(broken / WEIGHTS)
    save_file({name: x for name, x in arrays.items() if name != "model.norm.weight"}, broken / WEIGHTS)
    given = [x.format(model=folder, broken=broken) for x in arguments]
    command = [f"--config={tiny.FILE}", "--config.policy.name=pretrained", f"--workdir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit, match=message) as error:
        train_rl.main([*command, "--config.warm_start.steps=0", *given])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out={free}"], "--workdir=RUN and --out=DIRECTORY are required"),
        (["--workdir={run}", "--out={taken}"], "taken is there already: choose another folder"),
        (["--workdir={run}x", "--out={free}"], "unknown run directory"),
        (["--workdir={run}", "--out={free}", "--step=3"], "has no checkpoint 3"),
        (["--workdir={run}", "--out={free}", "--dtype=int8"], "unknown dtype of an export 'int8'"),
    ],
)
def test_exports_that_are_refused(finished, tmp_path, arguments, message):
    (tmp_path / "taken").mkdir()
    places = dict(run=finished.path, free=tmp_path / "free", taken=tmp_path / "taken")
    with pytest.raises(SystemExit, match=message):
        export.main([x.format(**places) for x in arguments])
    assert not (tmp_path / "free").exists()
