"""Models and data sets of the hub, from a server on this machine: what is fetched, and one line for each error."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import constants
from ml_collections import ConfigDict

from jaxpo import hub
from jaxpo.config.fields import default
from jaxpo.config.pins import keep_pins, pin
from jaxpo.policy.hf import open_source, read_config
from jaxpo.tasks import build
from jaxpo.tasks.preferences import sets
from tests.hub_server import COMMIT, serving

SUMS = "".join(json.dumps({"question": f"{i}+1", "answer": f"so #### {i + 1}"}) + "\n" for i in range(4)).encode()
CARD = b"""---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
- config_name: socratic
  data_files:
  - {split: train, path: socratic/train-*}
---
Sums.
"""
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"",
    "original/params.json": b"{}",
    "consolidated.safetensors": b"large",
    "pytorch_model.bin": b"pickle",
}
REPOSITORIES = {
    "models/some/model": MODEL,
    "datasets/some/sums": {
        "README.md": CARD,
        "main/train-0.jsonl": SUMS,
        "main/test-0.jsonl": SUMS[: SUMS.index(b"\n")].replace(b"0+1", b"7+1"),
        "socratic/train-0.jsonl": SUMS,
    },
    "datasets/some/empty": {"a.py": b""},
    "datasets/some/pairs": {
        "data/train.jsonl": b'{"prompt": "up", "chosen": "down", "rejected": "up"}\n',
        "data/val.csv": b"prompt,chosen,rejected\nleft,right,left\n",
    },
}


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.chdir(tmp_path)
    hub._snapshot.cache_clear()
    hub._names.cache_clear()
    with serving(REPOSITORIES) as (address, asked):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield asked
    hub._snapshot.cache_clear()
    hub._names.cache_clear()


def test_what_is_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert hub.hub_id("Qwen/Qwen3-0.6B") == ("Qwen/Qwen3-0.6B", None)
    assert hub.hub_id("models/qwen@v1") == ("models/qwen", "v1")
    for path in ("models/qwen", "qwen", "./a", "../a", "/a/b", "a/b/c", "~/a"):
        assert hub.hub_id(path) is None


def test_a_model_is_fetched_once_and_only_what_is_needed(server):
    assert read_config("some/model") == {"model_type": "llama"}
    assert not any("safetensors" in path for path in server if "resolve" in path)
    folder = hub.model_files("some/model", hub.WEIGHTS)
    assert sorted(p.name for p in folder.rglob("*")) == ["config.json", "model.safetensors"]
    before = len(server)
    assert hub.model_files("some/model", hub.WEIGHTS) == folder and len(server) == before
    with pytest.raises(ValueError, match="model.safetensors is truncated"):
        open_source("some/model")


def test_offline_the_cache_serves(server, monkeypatch):
    folder = hub.model_files("some/model")
    hub._snapshot.cache_clear()
    before = len(server)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.model_files("some/model") == folder and len(server) == before
    with pytest.raises(ValueError, match="'some/other' is not in the cache .* HF_HUB_OFFLINE is set"):
        hub.model_files("some/other")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("closed/model", "model 'closed/model' is gated at .*: ask for access"),
        ("some/modle", "model 'some/modle' does not exist at .*, or is private: correct the name"),
        ("some/model@v2", "model 'some/model@v2' has no revision 'v2' at "),
        ("some/model--x", "is no name of a repository: it is written owner/name"),
        ("broken/model", "cannot be fetched: .* answers with 418; try again later"),
    ],
)
def test_errors_are_one_line(server, path, message):
    with pytest.raises(ValueError, match=message) as error:
        read_config(path)
    assert "\n" not in str(error.value) and "hf_secret" not in str(error.value)


def test_no_network_is_one_line(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="'some/model' is not in the cache .*127.0.0.1:9 cannot be reached") as error:
        read_config("some/model")
    assert "\n" not in str(error.value)


def test_a_config_gets_the_commit_and_a_resumed_run_keeps_it(server):
    config = default()
    config.policy = ConfigDict(dict(name="pretrained", path="some/model"))
    config.task = ConfigDict(dict(name="jsonl", path="some/sums", revision="v1"))
    pin(config)
    assert config.policy.path == f"some/model@{COMMIT}" and config.task.path == f"some/sums@{COMMIT}"
    assert config.task.revision is None and "hf_secret" not in json.dumps(config.to_dict())
    again = default()
    again.policy = ConfigDict(dict(name="pretrained", path="some/model"))
    held = {"policy": {"path": "some/model@" + "1" * 40}}
    keep_pins(again, held)
    assert again.policy.path == held["policy"]["path"]
    again.policy.path = "some/other"
    keep_pins(again, held)
    assert again.policy.path == "some/other"
    config.task = ConfigDict(dict(name="jsonl", path=__file__, revision="v1"))
    with pytest.raises(ValueError, match="config.task.revision: only hub ids have a revision"):
        pin(config)


def test_a_task_of_the_hub(server):
    task = build({"name": "jsonl", "path": "some/sums", "split": "train", "reward": "numeric"})
    assert [e.question for e in task.train] == ["0+1", "1+1", "2+1", "3+1"] and task.test[0].question == "7+1"
    assert not any("socratic" in path for path in server if "resolve" in path)
    one = build({"name": "hub", "path": "some/sums", "subset": "socratic", "revision": COMMIT, "test_size": 1})
    assert len(one.train) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "some/sums", "split": "trian"}, "some/sums: unknown split 'trian': did you mean 'train'"),
        ({"path": "some/sums", "subset": "mein"}, "some/sums: unknown subset 'mein': did you mean 'main'"),
        ({"path": "some/sums", "subset": "socratic"}, "give exactly one of .*unknown split 'test'.*known: train"),
        ({"path": "some/empty"}, "some/empty.* has no data files .*refs/convert/parquet"),
        ({"path": "closed/data"}, "data set 'closed/data' is gated"),
        ({"path": "some/smus"}, "data set 'some/smus' does not exist"),
        ({"path": "some/sums", "revision": "v7"}, "data set 'some/sums@v7' has no revision 'v7'"),
    ],
)
def test_data_that_cannot_be_had(server, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        build({"name": "jsonl", **arguments})
    assert "\n" not in str(error.value)


def test_preferences_of_the_hub(server):
    data = sets.build({"name": "hub", "path": "some/pairs", "test_split": "validation"}, None)
    assert [row.prompt for row in data.train] == ["up"] and [row.prompt for row in data.test] == ["left"]
    assert re.fullmatch(r".*data/train.jsonl:1", data.train[0].where)


def test_a_misspelt_model_path_names_the_nearest_alone(tmp_path):
    for name in ("SmolLM2-135M", "unrelated", "notes"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError) as error:
        read_config(tmp_path / "SmolLM2-153M")
    assert "did you mean" in str(error.value) and "unrelated" not in str(error.value)
    with pytest.raises(ValueError, match="there is no folder"):
        read_config(tmp_path / "nowhere" / "model")
    assert Path(tmp_path).is_dir()


def test_the_environment_says_where_the_hub_is(tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, as a user sets them."""
    program = "from jaxpo.hub import model_files, pinned\nprint(pinned('some/model'), model_files('some/model'))"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HOME": str(tmp_path)}
    run = partial(subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True, check=False)
    with serving(REPOSITORIES) as (address, _):
        first = run(env=kept | {"HF_ENDPOINT": address})
    assert first.stdout.startswith(f"some/model@{COMMIT} {tmp_path}"), first.stderr
    assert run(env=kept | {"HF_HUB_OFFLINE": "1"}).stdout == first.stdout
