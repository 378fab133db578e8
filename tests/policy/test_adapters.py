"""Adapters of peft in and out without peft: names and shapes of its tensors, its settings, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpo.config.fields import default
from jaxpo.config.fill import fill_lora
from jaxpo.policy import lora
from jaxpo.policy.adapters import Adapter, load_adapter, read_adapter, write_adapter
from jaxpo.policy.families import config_from_hf
from jaxpo.policy.transformer import init
from tests.policy import tiny_hf

CONFIG = config_from_hf(tiny_hf.hf_config("llama3"))
PREFIX = "base_model.model.model.layers"


def adapters(targets=lora.TARGETS, rank=2):
    """None of whose numbers is zero."""
    base = jax.eval_shape(lambda: init(CONFIG, jax.random.key(0)))
    made = lora.init(base, jax.random.key(1), rank=rank, targets=targets)
    return jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), made)


@pytest.fixture
def folder(tmp_path):
    write_adapter(adapters(), CONFIG, tmp_path / "adapter", alpha=5.0, base="models/base")
    return tmp_path / "adapter"


def test_out_and_in_again_bit_for_bit(folder):
    assert read_adapter(folder) == Adapter(2, 5.0, lora.TARGETS)
    jax.tree.map(np.testing.assert_array_equal, load_adapter(folder, CONFIG), adapters())


def test_names_shapes_and_settings_are_those_of_peft(folder):
    arrays, d = load_file(folder / "adapter_model.safetensors"), CONFIG.width
    assert len(arrays) == CONFIG.layers * 7 * 2 and {x.dtype for x in arrays.values()} == {np.dtype("float32")}
    shapes = {name.removeprefix(f"{PREFIX}.1."): x.shape for name, x in arrays.items() if ".1." in name}
    assert shapes["self_attn.q_proj.lora_A.weight"] == (2, d) and shapes["mlp.up_proj.lora_A.weight"] == (2, d)
    assert shapes["self_attn.k_proj.lora_B.weight"] == (CONFIG.kv_heads * CONFIG.head_dim, 2)
    assert shapes["self_attn.o_proj.lora_A.weight"] == (2, CONFIG.heads * CONFIG.head_dim)
    assert shapes["mlp.down_proj.lora_A.weight"] == (2, CONFIG.mlp_width)
    settings = json.loads((folder / "adapter_config.json").read_text())
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert settings["target_modules"] == modules and settings["task_type"] == "CAUSAL_LM"
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (2, 5.0, "models/base")


def test_the_product_of_each_matrix_is_that_of_its_tensors(folder):
    """``W + scale B A`` of every tensor of the merged model, as a file of Hugging Face would have it."""
    own, arrays = adapters(), load_file(folder / "adapter_model.safetensors")
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(lambda: init(CONFIG, jax.random.key(0))))
    merged = lora.merge(zero, own, 2.5)["blocks"]
    for side, module in enumerate(("gate_proj", "up_proj")):
        a, b = (arrays[f"{PREFIX}.1.mlp.{module}.lora_{x}.weight"] for x in "AB")
        np.testing.assert_allclose(merged["w_in"][1, :, side].T, 2.5 * b @ a, atol=1e-4)
    a, b = (arrays[f"{PREFIX}.0.self_attn.o_proj.lora_{x}.weight"] for x in "AB")
    np.testing.assert_allclose(merged["wo"][0].reshape(-1, CONFIG.width).T, 2.5 * b @ a, atol=1e-4)


def test_rank_alpha_and_targets_of_a_config_are_the_adapters(tmp_path):
    write_adapter(adapters(("wv", "w_in"), rank=3), CONFIG, tmp_path / "a", alpha=6.0, base="")
    config = default()
    config.lora.path = str(tmp_path / "a")
    fill_lora(config)
    fill_lora(config)  # of a filled config too
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (3, 6.0, ("wv", "w_in"))
    config.lora.rank = 4
    with pytest.raises(ValueError, match="config.lora.rank is 4, the adapter in config.lora.path has 3"):
        fill_lora(config)
    config.lora.path = str(tmp_path)
    with pytest.raises(ValueError, match="config.lora.path: .* has no adapter_config.json"):
        fill_lora(config)


def test_rank_stabilized_scale(folder):
    change(folder, use_rslora=True, r=2)
    assert read_adapter(folder).alpha == 5.0 * 2**0.5


def change(folder, **settings):
    held = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(held | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not known; LORA is"),
        ({"use_dora": True}, "use_dora=True is not known here: only plain LoRA is"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern="),
        ({"bias": "all"}, "bias='all' is not known here"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"layers_to_transform": [0]}, "layers_to_transform="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the frozen weights too"),
        ({"r": 0}, "r 0 and lora_alpha 5.0 must be positive numbers"),
        ({"r": 3}, "lora_A.weight is .2, .*, this model and r make it .3, "),
    ],
)
def test_settings_that_are_refused(folder, settings, message):
    change(folder, **settings)
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(folder, CONFIG)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("without", "extra", "message"),
    [
        ("1.mlp.down_proj.lora_A", None, "down_proj.lora_A.weight is missing: it adapts another model"),
        ("up_proj", None, "adapts gate_proj without up_proj: here both have an adapter or none"),
        (None, f"{PREFIX}.9.mlp.down_proj.lora_A.weight", r"layers.9.mlp.*has no place in this model \(1 such\)"),
        (None, "base_model.model.lm_head.lora_A.weight", "unknown adapted module 'lm_head'"),
        (None, "base_model.model.score.weight", "score.weight has no place in a LoRA adapter"),
    ],
)
def test_tensors_that_are_refused(folder, without, extra, message):
    arrays = load_file(folder / "adapter_model.safetensors")
    arrays = {n: x for n, x in arrays.items() if not without or without not in n}
    arrays |= {extra: np.ones(2)} if extra else {}
    save_file(arrays, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(folder, CONFIG)
    assert "\n" not in str(error.value)


def test_files_that_are_refused(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="is truncated or no safetensors file"):
        load_adapter(folder, CONFIG)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no adapter_model.safetensors: save the adapter with save_pretrained"):
        load_adapter(folder, CONFIG)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="is not one of peft's"):
        read_adapter(folder)
