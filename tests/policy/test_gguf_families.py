"""GGUF files of every architecture: the same model as from Hugging Face's files, down to transformers' logits."""

import gguf as library
import jax
import numpy as np
import pytest

from jaxpo.batch import from_sequences
from jaxpo.policy import hf
from jaxpo.policy.families import config_from_hf
from jaxpo.policy.stats import completion_hidden
from jaxpo.policy.transformer import build
from tests.policy import tiny_hf
from tests.policy.tiny_gguf import permuted

OF_LLAMA_CPP = {"gemma3_text": "gemma3"}
NAMES = ("llama_linear", "llama_yarn", "smollm2", "qwen2", "qwen3", "gemma2", "gemma3")


def write(path, name):
    """The tiny model as llama.cpp's conversion writes it, in float32, without a vocabulary."""
    source, _, _ = tiny_hf.read_golden(name)
    c = source.config
    family = OF_LLAMA_CPP.get(c["model_type"], c["model_type"])
    kinds = {text: kind for kind, text in library.MODEL_ARCH_NAMES.items()}
    names = library.get_tensor_name_map(kinds[family], c["num_hidden_layers"])
    writer = library.GGUFWriter(path, family)
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_key_length(c["head_dim"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    add_rope(writer, c.get("rope_parameters", {"rope_type": "default", "rope_theta": 10_000.0}))
    if family.startswith("gemma"):
        writer.add_sliding_window(c["sliding_window"])
    if family == "gemma2":
        writer.add_attn_logit_softcapping(c["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(c["final_logit_softcapping"])
    for theirs, x in source.arrays.items():
        if family == "llama" and ("q_proj" in theirs or "k_proj" in theirs):
            x = permuted(x, c["num_attention_heads" if "q_proj" in theirs else "num_key_value_heads"])
        plus = 1 if family.startswith("gemma") and theirs.endswith("norm.weight") else 0
        stem, _, end = theirs.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{end}", np.ascontiguousarray(x + np.float32(plus)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return source


def add_rope(writer, rope):
    rope = rope.get(tiny_hf.GLOBAL, rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "default":
        return
    writer.add_rope_scaling_type(library.RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


@pytest.mark.parametrize("name", NAMES)
def test_tensors_and_config_are_those_of_hugging_face(name, tmp_path):
    source = write(tmp_path / "m.gguf", name)
    read = hf.open_source(tmp_path / "m.gguf")
    assert sorted(read.names()) == sorted(source.names())
    for tensor in source.names():
        np.testing.assert_allclose(read.read(tensor), source.read(tensor), atol=2e-7)
    ours, theirs = config_from_hf(read.config), config_from_hf(source.config)
    differ = {k: (v, vars(theirs)[k]) for k, v in vars(ours).items() if v != vars(theirs)[k]}
    differ.pop("norm_eps", None)  # stored in float32
    if name == "llama_yarn":  # the file holds neither of the two ends of the range
        assert differ.pop("rope_scaling")
    if name.startswith("gemma"):  # the tiny ones alternate otherwise and scale otherwise than every real one
        assert set(differ) <= {"local_layers", "query_scalar", "local_rope_theta"}
        differ = {}
    assert not differ


@pytest.mark.parametrize("name", ("llama_linear", "qwen2", "qwen3"))
def test_logits_are_those_of_transformers(name, tmp_path):
    write(tmp_path / "m.gguf", name)
    _, logits, _ = tiny_hf.read_golden(name)
    source = hf.open_source(tmp_path / "m.gguf")
    config = config_from_hf(source.config)
    model, params = build(config), hf.load(source, config)
    prompt = tiny_hf.PROMPTS[0]
    batch = from_sequences([prompt[:1]], [[*prompt[1:], 0]], pad_id=0)
    got = jax.jit(lambda p: model.logits(p, completion_hidden(model, p, batch)))(params)[0]
    np.testing.assert_allclose(np.asarray(got), logits, atol=1e-4)


def test_llama_3s_factors_become_its_scaling(tmp_path):
    """Llama 3.1 and 3.2 files hold what each frequency is divided by."""
    from jaxpo.policy.config import rope_frequencies
    from jaxpo.text.gguf_families import FACTORS, config_of

    theta, d = 500_000.0, 128
    scaled = rope_frequencies(d, theta, ("llama3", 32.0, 1.0, 4.0, 8192))
    factors = (theta ** (-np.arange(d // 2) * 2 / d) / scaled).astype(np.float32)
    metadata = {
        **{"llama.embedding_length": 2048, "llama.block_count": 2, "llama.attention.head_count": 16},
        **{"llama.feed_forward_length": 64, "llama.context_length": 131072, "llama.rope.freq_base": theta},
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    shapes = {"token_embd.weight": (100, 2048)}
    rope = config_of("llama", metadata, shapes, factors)["rope_parameters"]
    assert rope == {
        **{"rope_type": "llama3", "rope_theta": theta, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 8192,
    }
    with pytest.raises(ValueError, match=f"{FACTORS} are not those of a Llama 3"):
        config_of("llama", metadata, shapes, factors * 1.1)
