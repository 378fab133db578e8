"""Runs that need neither the model folder nor the data that they began with; and other data, which they refuse."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import evaluate, sample
from experiments.export import export_run
from jaxpo.runs import kept
from jaxpo.runs.restore import open_finished
from jaxpo.storage.checkpoint import saved_origin
from jaxpo.tasks.preferences import sets
from jaxpo.text.tokenizer_files import read_files, transformers_library
from tests.runs import tiny, tiny_model

SETTINGS = dict(
    tokenizer_class="Qwen2Tokenizer",
    model_max_length=32768,
    padding_side="left",
    eos_token="<|im_end|>",
    pad_token="<|endoftext|>",
    additional_special_tokens=["<|im_start|>", "<|im_end|>"],
)
GENERATION = dict(do_sample=True, temperature=0.6, top_p=0.95, top_k=20, eos_token_id=[2, 0], pad_token_id=0)


@pytest.fixture(autouse=True, scope="module")
def quick():
    with tiny.quick():
        yield


def sums(path, rows=range(25), sign="+"):
    """Questions and answers."""
    made = [{"question": f"{i // 5}{sign}{i % 5}", "answer": str(i // 5 + i % 5)} for i in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def config_of(data, model=None, **changes):
    """One iteration of a policy on characters, or of the model in a folder."""
    out = tiny.config({"warm_start.steps": 0, "training.epochs": 1, "training.minibatches": 1, "steps": 1})
    out.task = ConfigDict(dict(name="jsonl", path=str(data), test_size=5))
    out.tokenizer = ConfigDict(dict(name="characters"))
    out.objective = ConfigDict(dict(name="grpo", beta=0.0))
    if model is not None:
        out.policy = ConfigDict(dict(name="pretrained", path=str(model)))
        out.tokenizer = ConfigDict(dict(name="pretrained", path=str(model), chat_template=True))
    out.evaluation.update(every=9, pass_at=())
    out.checkpoint.every = 1
    for path, value in changes.items():
        block, _, field = path.rpartition(".")
        (out[block] if block else out)[field] = value
    return out


def model_in(folder):
    """A model folder whose tokenizer and generation settings have much to lose."""
    tiny_model.write(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of one iteration, and its model and data."""
    root = tmp_path_factory.mktemp("begun")
    config = config_of(sums(root / "data.jsonl"), model_in(root / "model"))
    tiny.run(config, root / "run")
    return root


@pytest.fixture
def alone(begun, tmp_path):
    """A copy of that run; its model and data are gone."""
    shutil.copytree(begun, tmp_path / "was")
    for name in ("model", "data.jsonl"):
        (begun / name).rename(begun / f"{name}.away")
    yield tmp_path / "was" / "run"
    for name in ("model", "data.jsonl"):
        (begun / f"{name}.away").rename(begun / name)


def test_a_run_goes_on_without_its_model_and_its_data(begun, alone, capsys):
    config = config_of(begun / "data.jsonl", begun / "model", steps=2)
    rest = tiny.run(config, alone, resume=True)
    assert "resumed at iteration 1" in rest.printed
    assert "data.jsonl' is gone: the run reads its own copy in " in rest.printed
    assert rest.printed.count("WARNING") == 1 and "another config: config.steps: 1 -> 2" in rest.printed
    held = json.loads((alone / "config.json").read_text())
    assert held["policy"]["path"] == str(begun / "model") and held["task"]["path"] == str(begun / "data.jsonl")
    assert evaluate.evaluate(str(alone), None, (), 1, 0, 0, "")["eval/greedy"] == rest.result.after["eval/greedy"]
    how = dict(run=str(alone), step=-1, n=1, greedy=True, temperature=1.0, seed=0)
    assert len(sample.sample(["1+1"], **how)) == 1


def test_what_goes_out_is_the_files_of_the_model_patched(begun, alone, tmp_path):
    export_run(str(alone), str(tmp_path / "out"))
    came = read_files(alone.parent / "model")
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= came.keys()
    for name, content in came.items():
        if name != "config.json":
            assert (tmp_path / "out" / name).read_bytes() == content, name
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == SETTINGS
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation == GENERATION | {"eos_token_id": [2, 0]}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == json.loads((alone.parent / "model/config.json").read_text())


def test_the_forms_that_vllm_and_llama_cpp_read(begun, tmp_path):
    """Both read config.json, tokenizer.json, tokenizer_config.json and generation_config.json of the folder; the
    converter of llama.cpp by its library gguf."""
    export_run(str(begun / "run"), str(out := tmp_path / "out"))
    names = ("config", "tokenizer", "tokenizer_config")
    read = {name: json.loads((out / f"{name}.json").read_text()) for name in names}
    added = {token["content"]: token for token in read["tokenizer"]["added_tokens"]}
    special = ("eos_token", "pad_token")
    assert all(added[read["tokenizer_config"][name]]["special"] for name in special)
    ids = [*read["tokenizer"]["model"]["vocab"].values(), *(token["id"] for token in added.values())]
    assert max(ids) < read["config"]["vocab_size"] and read["config"]["architectures"] == ["Qwen2ForCausalLM"]
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert ends[0] == added["<|im_end|>"]["id"] and all(isinstance(i, int) for i in ends)
    vocabulary = gguf.SpecialVocab(out, load_merges=True, n_vocab=read["config"]["vocab_size"])
    assert vocabulary.special_token_ids == {"eos": ends[0], "pad": added["<|endoftext|>"]["id"]}
    assert vocabulary.chat_template == tiny_model.TEMPLATE
    theirs = transformers_library().AutoTokenizer.from_pretrained(out)
    assert (theirs.padding_side, theirs.model_max_length) == ("left", 32768)


def test_the_tokenizer_that_changed_in_its_folder_is_not_taken(begun, tmp_path):
    shutil.copytree(begun / "run", tmp_path / "run")
    before, model = (tmp_path / "run/tokenizer.json").read_bytes(), shutil.copytree(begun / "model", tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}{% if add_generation_prompt %}!{% endif %}")
    rest = tiny.run(config_of(begun / "data.jsonl", model), tmp_path / "run", resume=True)
    assert (tmp_path / "run/tokenizer.json").read_bytes() == before
    assert rest.result.workspace.tokenizer.render("a").endswith("assistant\n")
    assert "WARNING: config.tokenizer.path" in rest.printed and "chat_template.jinja" in rest.printed


# ---- data


@pytest.fixture(scope="module")
def simple(tmp_path_factory):
    """A run on characters that only began, and its data."""
    root = tmp_path_factory.mktemp("simple")
    tiny.run(config_of(sums(root / "data.jsonl"), steps=0), root / "run")
    return root


OTHER = {
    "another sign": dict(sign="a"),
    "a row more": dict(rows=range(26)),
    "a row less": dict(rows=range(24)),
    "another order": dict(rows=[1, 0, *range(2, 25)]),
}


@pytest.mark.parametrize("other", OTHER)
def test_other_data_are_refused_and_nothing_is_touched(simple, tmp_path, other):
    shutil.copytree(simple / "run", tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    config = config_of(sums(tmp_path / "data.jsonl", **OTHER[other]), steps=0)
    with pytest.raises(ValueError, match="the data are not those that the run was trained on: 20 . 5 rows then") as e:
        tiny.run(config, tmp_path / "run", resume=True)
    copy = f"--config.task.path={tmp_path / 'run/data/task.path/data.jsonl'}"
    assert "--other_data" in str(e.value) and copy in str(e.value) and "\n" not in str(e.value)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    config.task.path = copy.partition("=")[2]
    assert "another config" not in tiny.run(config, tmp_path / "run", resume=True).printed


def test_other_data_on_demand(simple, tmp_path):
    """Their copy takes the place of the first, the alphabet stays."""
    shutil.copytree(simple / "run", tmp_path / "run")
    before = (tmp_path / "run/tokenizer.json").read_bytes()
    config = config_of(sums(tmp_path / "data.jsonl", rows=range(20)), steps=0)
    run = tiny.run(config, tmp_path / "run", resume=True, other_data=True)
    assert "WARNING: the data are not those that the run was trained on: 20 + 5 rows then, 15 + 5 now" in run.printed
    assert (tmp_path / "run/tokenizer.json").read_bytes() == before
    assert (tmp_path / "run/data/task.path/data.jsonl").read_bytes() == (tmp_path / "data.jsonl").read_bytes()


def test_a_finished_run_is_evaluated_on_the_data_that_it_had(simple, tmp_path, capsys):
    shutil.copytree(simple, tmp_path / "was")
    config = json.loads((tmp_path / "was/run/config.json").read_text())
    config["task"]["path"] = str(sums(tmp_path / "was/data.jsonl", rows=range(3, 25)))
    (tmp_path / "was/run/config.json").write_text(json.dumps(config))
    workspace, *_ = open_finished(str(tmp_path / "was/run"))
    assert len(workspace.task.train) == 20 and "WARNING" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "was/run/data")
    workspace, *_ = open_finished(str(tmp_path / "was/run"))
    assert len(workspace.task.train) == 17 and "its test examples may be others" in capsys.readouterr().out


def test_large_data_are_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "KEPT_BYTES", 100)
    config = config_of(sums(tmp_path / "data.jsonl"), steps=0)
    tiny.run(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/data").iterdir()] == ["places.json"]
    (tmp_path / "data.jsonl").rename(tmp_path / "away")
    message = r"config.task.path '.*' is gone, and the run keeps no copy of so much \(.* bytes\): bring .*jsonl back"
    with pytest.raises(ValueError, match=message):
        tiny.run(config, tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match=message):
        open_finished(str(tmp_path / "run"))
    open_finished(str(tmp_path / "run"), examples=False)  # sampling and exports need no data


def test_a_lost_directory_does_not_make_another_alphabet(simple, tmp_path):
    """The checkpoints are elsewhere, as in a bucket; the directory of the run is gone with its machine."""
    sums(tmp_path / "data.jsonl")
    config = config_of(tmp_path / "data.jsonl", **{"checkpoint.directory": str(tmp_path / "bucket"), "steps": 0})
    tiny.run(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    tiny.run(config, tmp_path / "run", resume=True)
    assert (tmp_path / "run/data/task.path/data.jsonl").exists()
    shutil.rmtree(tmp_path / "run")
    sums(tmp_path / "data.jsonl", sign="a")
    with pytest.raises(ValueError, match="the tokenizer is not that of the run.*bring .*tokenizer.json back"):
        tiny.run(config, tmp_path / "run", resume=True, other_data=True)


def test_the_hash_is_of_what_was_read(simple, tmp_path):
    """Not of the bytes: the same rows in another file are the same data."""
    run = json.loads((simple / "run/config.json").read_text())
    lines = [json.loads(line) for line in Path(run["task"]["path"]).read_text().splitlines()]
    (tmp_path / "data.jsonl").write_text("\n\n".join(json.dumps(dict(reversed(row.items()))) for row in lines))
    config = config_of(tmp_path / "data.jsonl", steps=0)
    shutil.copytree(simple / "run", tmp_path / "run")
    assert "resumed" in tiny.run(config, tmp_path / "run", resume=True).printed
    origin = saved_origin(str(tmp_path / "run/checkpoints"))
    assert origin["data"]["rows"] == [20, 5] and len(origin["data"]["sha256"]) == len(origin["tokenizer"]) == 64


def test_preferences_are_data_too(tmp_path):
    """Their order and every field of a row count; where they lie does not."""

    def of(*rows, name="a.jsonl", **options):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return kept.fingerprint(None, sets.jsonl(tmp_path / name, **options))

    first, second = ({"prompt": p, "chosen": "yes", "rejected": "no"} for p in ("a", "b"))
    known = of(first, second)
    assert known["rows"] == [2, 0] and of(first, second, name="b.jsonl") == known
    others = [(second, first), (first,), (first, second | {"pref_prob": 0.8}), (first, second | {"rejected": "No"})]
    assert len({of(*rows)["sha256"] for rows in others} | {known["sha256"]}) == 5
    assert of(first, second, test_size=1)["rows"] == [1, 1]


def test_a_folder_around_the_run_is_not_copied_into_it(tmp_path):
    (tmp_path / "run").mkdir()
    config = config_of(tmp_path)
    kept.keep_data(tmp_path / "run", config)
    assert json.loads((tmp_path / "run/data/places.json").read_text())["task.path"]["copy"] is None


def test_values_that_are_no_json_have_a_hash_that_stays():
    task = tiny.finished  # any object counts by its type
    one, two = (kept._text_of({"a": {3, "b", 1}, "x": task, (1, 2): np.arange(3), None: 1.5}) for _ in range(2))
    assert one == two != kept._text_of({"a": {3, "b"}, "x": task, (1, 2): np.arange(3), None: 1.5})


# ---- adapters beside frozen weights


def test_frozen_weights_are_known_by_a_hash_and_asked_for_by_name(begun, tmp_path):
    model = shutil.copytree(begun / "model", tmp_path / "model")
    lora = {"lora.rank": 2, "lora.targets": ("wq",)}
    config = config_of(begun / "data.jsonl", model, **lora)
    tiny.run(config, tmp_path / "run")
    shutil.rmtree(model)
    message = r"config.policy.path '.*model' is gone: .*run trains adapters beside these frozen weights"
    for gone in (lambda: open_finished(str(tmp_path / "run")), lambda: tiny.run(config, tmp_path / "run", resume=True)):
        with pytest.raises(ValueError, match=message) as error:
            gone()
        assert "\n" not in str(error.value)
    moved = config_of(begun / "data.jsonl", begun / "model", **lora)
    assert "resumed" in (rest := tiny.run(moved, tmp_path / "run", resume=True)).printed
    assert "another config" not in rest.printed
    tiny_model.write(tmp_path / "other", seed=1)
    other = config_of(begun / "data.jsonl", tmp_path / "other", **lora)
    with pytest.raises(ValueError, match="config.policy.path does not hold the frozen weights beside which"):
        tiny.run(other, tmp_path / "run", resume=True)
    held = json.loads((tmp_path / "run/config.json").read_text())
    held["policy"]["path"] = str(tmp_path / "other")
    (tmp_path / "run/config.json").write_text(json.dumps(held))
    with pytest.raises(ValueError, match="config.policy.path '.*other' does not hold the frozen weights beside which"):
        open_finished(str(tmp_path / "run"))
