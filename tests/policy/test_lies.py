"""What a config.json and an index claim is checked before anything is made of it: one line, at once."""

import json
import shutil
import time

import pytest
from safetensors import safe_open

from jaxpo.policy import hf
from jaxpo.policy.families import config_from_hf
from tests.runs import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("lies") / "m")


def load(folder):
    source = hf.open_source(folder)
    return hf.load(source, config_from_hf(source.config))


SIZES = [
    ({"hidden_size": 10**9}, "hidden_size is 1000000000, and no model has more than"),
    ({"hidden_size": 10**30}, "hidden_size is 1000.*, and no model has more than"),
    ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000, and no model has more than"),
    ({"vocab_size": 10**12}, "vocab_size is 1000000000000, and no model has more than"),
    ({"intermediate_size": 2**62}, "intermediate_size is .*, and no model has more than"),
    ({"num_attention_heads": 10**9}, "num_attention_heads is 1000000000, and no model"),
    ({"sliding_window": 10**40, "use_sliding_window": True}, "sliding_window is 1000.*, and no model"),
    ({"hidden_size": -16}, "hidden_size is -16, not a whole number above 0"),
    ({"hidden_size": "16"}, "hidden_size is '16', not a whole number above 0"),
    ({"hidden_size": True}, "hidden_size is True, not a whole number above 0"),
    ({"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5, not a whole number above 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, not a finite number"),
    ({"rope_parameters": 7}, "rope_parameters is 7, and no object"),
    ({"layer_types": ["full_attention"] * 9}, "layer_types must name the type of each of 2 layers"),
    ({"hidden_size": 1024}, r"config.json: hidden_size is 1024, but model.embed_tokens.weight is \[259, 16\]"),
    ({"num_hidden_layers": 4}, "tensor model.layers.2.* is missing"),
]


@pytest.mark.parametrize(("changes", "message"), SIZES, ids=[str(list(c.items())[0])[:40] for c, _ in SIZES])
def test_a_size_that_no_model_has(folder, tmp_path, changes, message):
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        config_from_hf(config)  # without the files that it can be compared with
        load(copy)
    assert "\n" not in str(error.value) and time.monotonic() - start < 5


FILE = "model-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": "x.safetensors"}, "weight_map must name a file of this folder for each tensor"),
        ({}, "weight_map must name a file of this folder"),
        ({"weight_map": {"a": 3}}, "weight_map must name a file of this folder"),
        ({"weight_map": {"a": "../m/model.safetensors"}}, "weight_map must name a file of this folder"),
        ({"weight_map": {"a": "x.safetensors"}}, "has no x.safetensors: fetch the missing file"),
        ([], "holds no JSON object"),
        (None, "is no JSON"),
    ],
)
def test_an_index_that_lies(folder, tmp_path, index, message):
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    (copy / "model.safetensors").rename(copy / FILE)
    (copy / "model.safetensors.index.json").write_text("{" if index is None else json.dumps(index))
    with pytest.raises(ValueError, match=message) as error:
        load(copy)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)


def test_an_index_whose_total_is_nonsense_still_loads(folder, tmp_path):
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    (copy / "model.safetensors").rename(copy / FILE)
    with safe_open(copy / FILE, "numpy") as tensors:
        names = dict.fromkeys(tensors.keys(), FILE)
    index = {"metadata": {"total_size": 10**30}, "weight_map": names}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    load(copy)
