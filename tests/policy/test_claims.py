"""Model folders that lie: sizes of config.json, and tables of an index, that do not fit the files."""

import json

import pytest

from jaxpo.policy.families import config_from_hf
from jaxpo.policy.hf import export, load, open_source, read_config
from tests.policy import tiny_hf

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    source = tiny_hf.random_source("llama3")
    config = config_from_hf(source.config)
    export(load(source, config), config, tmp_path / "model", hf_config=source.config, file_bytes=4000)
    return tmp_path / "model"


def refused(read, *parts):
    with pytest.raises(ValueError) as error:
        read()
    line = str(error.value)
    assert "\n" not in line and len(line) < 600 and all(part in line for part in parts), line


SIZES = (
    ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000, but the files have 21 tensors"),
    ("num_hidden_layers", 10**400, "num_hidden_layers is 1"),
    ("vocab_size", 10**12, "vocab_size is 1000000000000, but model.embed_tokens.weight is [47, 16]"),
    ("hidden_size", 2**40, "hidden_size is 1099511627776, but model.embed_tokens.weight is [47, 16]"),
)


@pytest.mark.parametrize(("key", "value", "line"), SIZES, ids=[f"{k}={str(v)[:15]}" for k, v, _ in SIZES])
@pytest.mark.parametrize("read", (open_source, read_config))
def test_sizes_are_compared_with_the_files(folder, read, key, value, line):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    refused(lambda: read(folder), str(file), line)


ENTRIES = (
    ("../model/model.safetensors", "weight_map must name a file of this folder"),
    ("/etc/passwd", "weight_map must name a file of this folder"),
    ("..", "weight_map must name a file of this folder"),
    ("", "weight_map must name a file of this folder"),
    (3, "weight_map must name a file of this folder"),
    (None, "weight_map must name a file of this folder"),
    ("nowhere.safetensors", "has no nowhere.safetensors: fetch the missing file"),
)


@pytest.mark.parametrize(("file", "line"), ENTRIES, ids=[str(file) for file, _ in ENTRIES])
def test_an_index_names_files_of_its_folder(folder, file, line):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (folder / INDEX).write_text(json.dumps(index))
    refused(lambda: open_source(folder), str(folder), line)


def test_an_index_that_has_a_tensor_where_it_is_not(folder):
    index = json.loads((folder / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    moved = {name: files[0] for name in index["weight_map"]} | {f"x{i}": file for i, file in enumerate(files)}
    for table in (moved, index["weight_map"] | {"no.such.tensor": files[0]}):
        (folder / INDEX).write_text(json.dumps(index | {"weight_map": table}))
        refused(lambda: open_source(folder), INDEX, "weight_map has", "where it is not")


@pytest.mark.parametrize("index", ({}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": 3}))
def test_an_index_without_a_table(folder, index):
    (folder / INDEX).write_text(json.dumps(index))
    refused(lambda: open_source(folder), INDEX, "weight_map must name a file")
