"""Weights in and out without torch: what transformers computed and was kept, files byte for byte, and whatever can be
wrong with a model folder."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpo.batch import from_sequences
from jaxpo.parallel import make_mesh
from jaxpo.policy import hf
from jaxpo.policy.config import TransformerConfig
from jaxpo.policy.families import config_from_hf, config_to_hf, tensors
from jaxpo.policy.hf import check_source, export, load, open_source, read_config
from jaxpo.policy.stats import completion_hidden
from jaxpo.policy.transformer import build, init
from jaxpo.rollout import SamplingOptions, generate
from tests.oracles.cases import COMPILE_FAST
from tests.policy import tiny_hf


@partial(jax.jit, static_argnums=0, compiler_options=COMPILE_FAST)
def greedy_and_logits(config, params, tokens, length, batch):
    model = build(config)
    options = SamplingOptions(tiny_hf.NEW, greedy=True)
    answers = generate(model, params, tokens, jax.random.key(0), options, prompt_length=length).completions
    return answers, model.logits(params, completion_hidden(model, params, batch))


@pytest.mark.parametrize("name", tiny_hf.MODELS)
def test_what_transformers_computed(name):
    """Logits within 1e-4; greedy answers token for token, prompts ragged and left-padded, windows shorter than them."""
    source, logits, greedy = tiny_hf.read_golden(name)
    config = config_from_hf(source.config)
    first = tiny_hf.PROMPTS[0]
    batch = jax.tree.map(jnp.asarray, from_sequences([first[:1]], [[*first[1:], 0]]))
    answers, ours = greedy_and_logits(config, load(source, config), *tiny_hf.padded(), batch)
    np.testing.assert_allclose(ours[0], logits, atol=1e-4)
    np.testing.assert_array_equal(answers, greedy)
    assert config.window is None or config.window < len(first)


# ---- files


@pytest.mark.parametrize(
    ("name", "dtype"),  # every kind of tensor
    [("llama3", "float32"), ("qwen2_window", "bfloat16"), ("qwen3_moe", "bfloat16"), ("gemma3", "bfloat16")],
)
def test_an_untouched_model_comes_back_bit_for_bit(name, dtype, tmp_path):
    """Through float32 parameters, from one file to several."""
    most = 2000 * np.dtype(dtype).itemsize // 2
    given = tiny_hf.random_source(name)
    arrays = {n: x.astype(dtype) for n, x in given.arrays.items()}
    folder = write(tmp_path / "a", {**given.config, "dtype": dtype}, arrays)
    source = open_source(folder)
    config = config_from_hf(source.config)
    export(load(source, config), config, tmp_path / "b", hf_config=source.config, file_bytes=most)
    assert json.loads((tmp_path / "b/config.json").read_text()) == source.config
    index = json.loads((tmp_path / "b/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3 and set(index["weight_map"]) == set(arrays)
    out = {}
    for file in set(index["weight_map"].values()):
        part = load_file(tmp_path / "b" / file)
        assert sum(x.nbytes for x in part.values()) <= most or len(part) == 1
        assert all(index["weight_map"][n] == file for n in part)
        out |= part
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in out.values())
    for n, x in arrays.items():
        assert out[n].dtype == x.dtype and out[n].tobytes() == x.tobytes(), n
    again = open_source(tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, load(source, config), load(again, config))


# The classes that vLLM's registry lists under these names; the sizes of its layers come from config.json alone.
OF_VLLM = ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe", "Gemma2", "Gemma3")
OF_LLAMA_CPP = dict(qwen3_moe="qwen3moe", gemma3_text="gemma3", mistral="llama")  # the others have our names


@pytest.mark.parametrize("name", tiny_hf.MODELS)
def test_the_names_that_vllm_and_llama_cpp_know(name):
    """Of classes, and of tensors: those of experts, which llama.cpp stacks, by what they are of."""
    config = tiny_hf.hf_config(name)
    model_type = config["model_type"]
    assert config_to_hf(config_from_hf(config))["architectures"][0].removesuffix("ForCausalLM") in OF_VLLM
    kinds = {text: kind for kind, text in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(kinds[OF_LLAMA_CPP.get(model_type, model_type)], config["num_hidden_layers"])
    for slot in tensors(config_from_hf(config)):
        stacked = re.sub(r"experts\.\d+\.", "experts.", slot.name)
        assert known.get_name(stacked, try_suffixes=(".weight", ".bias")), slot.name


def write(folder, config, arrays):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_the_dtype_is_chosen_on_the_way(tmp_path):
    source = tiny_hf.random_source("smollm2")
    config = config_from_hf(source.config, param_dtype="bfloat16")
    params = load(source, config)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    embedding = source.arrays["model.embed_tokens.weight"]
    np.testing.assert_array_equal(params["embedding"], embedding.astype(jnp.bfloat16))
    export(params, config, tmp_path / "a", hf_config=source.config, dtype="float16")
    assert read_config(tmp_path / "a")["dtype"] == "float16"
    assert open_source(tmp_path / "a").read("model.norm.weight").dtype == np.float16


def test_parameters_of_every_slot_are_filled():
    """The tensors of a model cover its parameters, each number once."""
    for name in tiny_hf.MODELS:
        config = config_from_hf(tiny_hf.hf_config(name))
        shapes = jax.eval_shape(partial(init, config), jax.random.key(0))
        counts = jax.tree.map(lambda x: np.zeros(x.shape, int), shapes)
        for slot in tensors(config):
            leaf = counts[slot.path[0]] if len(slot.path) == 1 else counts[slot.path[0]][slot.path[1]]
            leaf[slot.index] += 1
        assert all((x == 1).all() for x in jax.tree.leaves(counts)), name


class Recording(tiny_hf.Arrays):
    """Counts the numbers that are read of each tensor."""

    read_of: dict[str, list[int]] = {}

    def read(self, name, index=()):
        out = super().read(name, index)
        self.read_of.setdefault(name, []).append(out.size)
        return out


@pytest.mark.parametrize("name", ["qwen2_window", "qwen3_moe"])
def test_each_device_is_given_its_part(name):
    mesh = make_mesh(dict(fsdp=2, tensor=2, data=2))
    given = tiny_hf.random_source(name)
    source, config = Recording(given.config, given.arrays), config_from_hf(given.config)
    Recording.read_of.clear()
    params = load(source, config, mesh)
    jax.tree.map(np.testing.assert_array_equal, params, load(given, config))
    assert params["blocks"]["wq"].sharding.spec == jax.P(None, "fsdp", "tensor", None)
    assert params["blocks"]["wq"].sharding.shard_shape(params["blocks"]["wq"].shape)[1:3] == (8, 2)
    for slot in tensors(config):
        if slot.name.endswith("proj.weight"):  # nothing but quarters was read
            assert set(Recording.read_of[slot.name]) == {given.arrays[slot.name].size // 4}, slot.name


# ---- what can be wrong


def broken(change):
    """The tiny Llama after ``change(config, arrays)``."""
    source = tiny_hf.random_source("llama3")
    change(source.config, source.arrays)
    return source


def drop(name):
    return lambda config, arrays: arrays.pop(name)


def put(name, x):
    return lambda config, arrays: arrays.update({name: x})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop("model.layers.1.mlp.up_proj.weight"),
            "tensor model.layers.1.mlp.up_proj.weight is missing .1 of 21 are.:",
        ),
        (drop("lm_head.weight"), "tensor lm_head.weight is missing .*set tie_word_embeddings"),
        (
            put("model.layers.0.self_attn.q_proj.bias", np.zeros(24, np.float32)),
            "tensor model.layers.0.self_attn.q_proj.bias has no place in the model of config.json .1 such.",
        ),
        (
            put("model.norm.weight", np.zeros(8, np.float32)),
            r"tensor model.norm.weight is \[8\], config.json makes it \[16\]",
        ),
        (lambda c, a: c.update(num_hidden_layers=3), "tensor model.layers.2.input_layernorm.weight is missing"),
        (lambda c, a: c.update(tie_word_embeddings=True), "lm_head.weight differs from the embedding"),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    source = broken(change)
    config = config_from_hf(source.config)
    source = Recording(source.config, source.arrays)
    Recording.read_of.clear()
    with pytest.raises(ValueError, match=message) as error:
        load(source, config)
    assert "\n" not in str(error.value)
    assert set(Recording.read_of) <= {"lm_head.weight", "model.embed_tokens.weight"}


def test_a_tied_head_may_be_written_out_and_buffers_left_over():
    source = tiny_hf.random_source("smollm2")
    source.arrays["lm_head.weight"] = source.arrays["model.embed_tokens.weight"]
    source.arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    config = config_from_hf(source.config)
    check_source(source, tensors(config))
    assert "head" not in load(source, config)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "llama3",
            dict(architectures=["GPT2LMHeadModel"]),
            "unknown architecture of config.json 'GPT2LMHeadModel': known: ",
        ),
        (
            "llama3",
            dict(architectures=["LlamaForSequenceClassification"]),
            "did you mean 'LlamaForCausalLM'.*known: Gemma2",
        ),
        (
            "llama3",
            dict(architectures=None, model_type="gpt2"),
            "unknown model_type of config.json 'gpt2': .*llama, mistral",
        ),
        ("llama3", dict(model_type="lama"), "unknown model_type of config.json 'lama': did you mean 'llama'"),
        (
            "llama3",
            dict(rope_parameters=dict(rope_type="longrope", rope_theta=1e4, long_factor=[1.0], short_factor=[1.0])),
            "unknown rope type of config.json 'longrope': .*default, linear, llama3",
        ),
        ("llama3", dict(hidden_act="relu"), "unknown activation of config.json 'relu': .*gelu_pytorch_tanh, silu"),
        ("llama3", dict(attention_bias=True), "attention_bias=True of llama is not known; False is"),
        ("qwen3_moe", dict(mlp_only_layers=[0]), "mlp_only_layers=.0. of qwen3_moe is not known"),
        ("llama3", dict(quantization_config=dict(bits=4)), "quantized weights"),
        ("llama3", dict(hidden_size="wide"), "config.json: hidden_size is 'wide', not a whole number above 0"),
        ("gemma3", dict(layer_types=["chunked_attention"] * 3), "chunked_attention"),
    ],
)
def test_configs_that_are_refused(name, fields, message):
    with pytest.raises(ValueError, match=message) as error:
        config_from_hf({**tiny_hf.hf_config(name), **fields})
    assert "\n" not in str(error.value)


@pytest.fixture
def folder(tmp_path):
    source = tiny_hf.random_source("llama3")
    config = config_from_hf(source.config)
    export(load(source, config), config, tmp_path / "model", hf_config=source.config, file_bytes=4000)
    return tmp_path / "model"


def parts(folder):
    return sorted(folder.glob("*.safetensors"))


def truncate(folder, file="model-00002*"):
    path = next(folder.glob(file))
    path.write_bytes(path.read_bytes()[:-40])


def pickled(folder):
    for file in [*parts(folder), folder / "model.safetensors.index.json"]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, "model-00002-of-.* is truncated or no safetensors file .*: fetch it again"),
        (
            lambda f: parts(f)[1].write_text("version https://git-lfs.github.com/spec/v1"),
            "model-00002.* is truncated or no",
        ),
        (lambda f: parts(f)[1].unlink(), "has no model-00002-of-.*: fetch the missing file"),
        (partial(truncate, file="*.index.json"), "model.safetensors.index.json is no JSON .*: it may be truncated"),
        (lambda f: (f / "config.json").unlink(), "has no config.json: it is not the folder of a model"),
        (pickled, "has its weights in pickle format .pytorch_model.bin., .* save_pretrained of transformers"),
        (
            lambda f: save_file({"a": np.zeros(2, np.int8)}, parts(f)[1]),
            "a is I8, quantized or no number; known: F64, F32, F16, BF16",
        ),
    ],
)
def test_folders_that_are_refused(folder, harm, message):
    harm(folder)
    with pytest.raises(ValueError, match=message) as error:
        open_source(folder)
    assert "\n" not in str(error.value)


def test_no_such_folder(folder):
    with pytest.raises(ValueError, match="unknown model folder or GGUF file .*modle': did you mean '.*model'"):
        open_source(folder.parent / "modle")


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    source = tiny_hf.random_source("llama3")
    config = config_from_hf(source.config)
    params, written = load(source, config), []

    def interrupted(arrays, file, metadata):
        if written:
            raise KeyboardInterrupt
        written.append(save_file(arrays, file, metadata))
        assert not (tmp_path / "out").exists()

    monkeypatch.setattr(hf, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(params, config, tmp_path / "out", file_bytes=4000)
    assert written and not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out is there already: choose another folder"):
        export(params, config, tmp_path / "out")


# ---- configurations that are made here


def test_a_policy_made_here_is_a_llama():
    hf_config = config_to_hf(TransformerConfig(vocab_size=11))
    assert hf_config["model_type"] == "llama" and hf_config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("name", tiny_hf.MODELS)
def test_configs_go_out_as_they_came(name):
    config = config_from_hf(tiny_hf.hf_config(name), dtype="bfloat16", remat="full")
    out = config_to_hf(config)
    assert out["model_type"] == tiny_hf.hf_config(name)["model_type"]
    assert config_from_hf(out, dtype="bfloat16", remat="full") == config


def test_a_mixture_that_no_family_has():
    with pytest.raises(ValueError, match="no family of llama, .* has all features of this policy"):
        config_to_hf(TransformerConfig(vocab_size=11, qkv_bias=True, qk_norm=True))


# ---- memory

MEASURE = """
import math, sys, jax, jax.numpy as jnp
from jaxpo.policy.families import config_from_hf, tensors
from jaxpo.policy.hf import load, open_source
from jaxpo.parallel.mesh import make_mesh

def of_process(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) * 1024

source = open_source(sys.argv[1])
config = config_from_hf(source.config, param_dtype=sys.argv[2])
jax.block_until_ready(jax.jit(jnp.sin)(1.0))
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = of_process("VmRSS")
params = load(source, config, make_mesh(dict(fsdp=2, tensor=2), jax.devices()) if jax.device_count() == 4 else None)
peak = of_process("VmHWM") - before
size = sum(x.nbytes for x in jax.tree.leaves(params))
largest = max(math.prod(slot.shape) for slot in tensors(config)) * jnp.dtype(sys.argv[2]).itemsize
print(size, peak, largest)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The folder of 477 MB in five files or so."""
    config = TransformerConfig(vocab_size=20_000, width=768, layers=12, heads=12, kv_heads=4, mlp_width=3072)
    out = tmp_path_factory.mktemp("large") / "model"
    export(jax.jit(partial(init, config))(jax.random.key(0)), config, out, file_bytes=10**8)
    assert len(parts(out)) >= 4
    return out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell the peak")
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_loading(large, dtype, devices):
    """At most 1.3 times the model and one tensor, from several files in float32."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    run = [sys.executable, "-c", MEASURE, str(large), dtype]
    done = subprocess.run(run, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=True)
    size, peak, largest = map(int, done.stdout.split())
    print(f"{dtype}, {devices} devices: model {size:,} bytes, peak {peak / size:.2f} of it, one tensor {largest:,}")
    assert 2e8 < size and 0.9 * size < peak <= 1.3 * size + largest, (peak / size, size, largest)
