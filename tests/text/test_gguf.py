"""GGUF as a source of weights: names, rows of q and k, dequantization, config; and what is refused."""

import numpy as np
import pytest

from jaxpo.text import gguf
from tests.policy import tiny_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, tiny_gguf.write(path)


def test_tensors_are_those_of_the_model_under_the_names_of_hugging_face(tiny):
    path, expected = tiny
    source = gguf.open_source(path)
    assert sorted(source.names()) == sorted(expected)
    for name, x in expected.items():
        assert source.shape(name) == x.shape, name
        got = source.read(name)
        assert got.dtype == np.float32 and np.array_equal(got, x), name


@pytest.mark.parametrize(
    "index", [(), (slice(3, 9),), (slice(None), slice(4, 8)), (slice(0, 16), slice(None, 5)), (slice(2, 2),)]
)
def test_a_part_of_a_tensor_is_that_part(tiny, index):
    source = gguf.open_source(tiny[0])
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"):
        assert np.array_equal(source.read(name, index), tiny[1][name][index])
    assert np.array_equal(source.read("model.norm.weight", index[:1]), tiny[1]["model.norm.weight"][index[:1]])


def test_more_rows_than_are_dequantized_at_a_time(tiny, monkeypatch):
    monkeypatch.setattr(gguf, "ROWS_AT_ONCE", 7)
    name = "model.embed_tokens.weight"
    assert np.array_equal(gguf.open_source(tiny[0]).read(name), tiny[1][name])


def test_the_metadata_is_a_config(tiny):
    config = gguf.open_source(tiny[0]).config
    assert config["model_type"] == "llama" and config["tie_word_embeddings"] is True
    assert config["vocab_size"] == len(tiny_gguf.vocabulary()) and config["head_dim"] == 16
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}
    assert config["rms_norm_eps"] == pytest.approx(1e-5)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    assert {name: config[name] for name in sizes} == sizes and config["num_key_value_heads"] == 1


def test_an_untied_head_is_a_tensor_of_its_own(tmp_path):
    head = np.ones((len(tiny_gguf.vocabulary()), tiny_gguf.WIDTH), np.float32)
    tiny_gguf.write(tmp_path / "untied.gguf", add={"output.weight": head})
    source = gguf.open_source(tmp_path / "untied.gguf")
    assert not source.config["tie_word_embeddings"] and np.array_equal(source.read("lm_head.weight"), head)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "llamma"}, r"unknown GGUF architecture 'llamma'.*llama"),
        ({"leave_out": "blk.1.ffn_up.weight"}, r"lacks tensors, the first is blk.1.ffn_up.weight"),
        ({"leave_out": "token_embd.weight"}, r"lacks the tensor token_embd.weight"),
        ({"add": {"rope_freqs.weight": np.ones(8, np.float32)}}, r"rope_freqs.weight are not those of a Llama 3"),
        ({"add": {"blk.0.what.weight": np.ones(8, np.float32)}}, r"does not have, the first is blk.0.what.weight"),
        ({"llama__rope__scaling__type": "longrope"}, r"rope scaling 'longrope' is not known.*safetensors"),
        ({"llama__rope__scaling__type": "yarn"}, r"llama.rope.scaling.factor is missing"),
        ({"llama__block_count": "3"}, r"llama.block_count is '3', not a whole number above 0"),
        ({"add": {"output.weight": np.ones((270, 32), np.int8)}}, r"cannot dequantize output.weight.*I8"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_line(tmp_path, options, message):
    tiny_gguf.write(tmp_path / "bad.gguf", **options)
    with pytest.raises(ValueError, match=message) as error:
        gguf.open_source(tmp_path / "bad.gguf")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(tiny, tmp_path, share):
    whole = tiny[0].read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"cut.gguf .* is truncated or no GGUF file .*: fetch it again"):
        gguf.open_source(cut)


def test_a_file_that_is_not_there(tiny):
    with pytest.raises(FileNotFoundError, match="did you mean .*tiny.gguf"):
        gguf.open_source(tiny[0].with_name("tinny.gguf"))


def test_the_library_is_named_where_it_is_missing(tiny, monkeypatch):
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'jaxpo\[gguf\]'"):
        gguf._library()
