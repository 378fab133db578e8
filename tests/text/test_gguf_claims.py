"""What the fields and places of a GGUF file claim, against its tensors. Each lie costs one line, and no memory."""

import random
import struct
import tracemalloc

import numpy as np
import pytest

from jaxpo.policy import hf
from jaxpo.text import gguf
from jaxpo.text.tokenizers import PretrainedTokenizer
from tests.policy import tiny_gguf


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tiny_gguf.write(path)
    return path.read_bytes()


def behind(data: bytes, name: str, more: int = 0) -> int:
    """The byte behind a name of the header."""
    start = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    return start + more


def patched(data: bytes, at: int, form: str, *values: int | float) -> bytes:
    new = struct.pack(form, *values)
    return data[:at] + new + data[at + len(new) :]


def refused(path, data: bytes, *parts: str) -> None:
    """The file is refused in one line that names it and says ``parts``; what it claims is not allocated."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as error:
            gguf.open_source(path)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(data) + 2**20
    finally:
        tracemalloc.stop()
    line = str(error.value)
    assert "\n" not in line and len(line) < 600 and all(part in line for part in (str(path), *parts)), line


EPS = "llama.attention.layer_norm_rms_epsilon"
LIES = {  # where the number stands, its form, its value, and what the line says
    "offset between": (lambda d: behind(d, "output_norm.weight", 16), "<Q", 1, ["output_norm.weight", "multiple"]),
    "offset within": (lambda d: behind(d, "blk.0.ffn_up.weight", 24), "<Q", 0, ["begins within the tensor"]),
    "blocks": (
        lambda d: behind(d, "llama.block_count", 4),
        "<I",
        2**32 - 1,
        ["lacks tensors", "llama.block_count 4,294,967,295"],
    ),
    "no blocks": (lambda d: behind(d, "llama.block_count", 4), "<I", 0, ["llama.block_count", "above 0"]),
    "width": (lambda d: behind(d, "llama.embedding_length", 4), "<I", 2**31, ["llama.embedding_length", "token_embd"]),
    "MLP": (lambda d: behind(d, "llama.feed_forward_length", 4), "<I", 2**31, ["feed_forward_length", "ffn_gate"]),
    "heads": (lambda d: behind(d, "llama.attention.head_count", 4), "<I", 2**30, ["1073741824 heads of 1"]),
    "odd heads": (lambda d: behind(d, "llama.attention.head_count", 4), "<I", 32, ["32 heads of 1 numbers"]),
    "heads of keys": (lambda d: behind(d, "llama.attention.head_count_kv", 4), "<I", 2, ["head_count_kv", "attn_k"]),
    "heads of no keys": (lambda d: behind(d, "llama.attention.head_count_kv", 4), "<I", 0, ["head_count_kv is '0'"]),
    "text": (lambda d: behind(d, "llama.context_length", 4), "<I", 0, ["llama.context_length", "above 0"]),
    "no type for sizes": (lambda d: behind(d, "llama.context_length"), "<I", 6, ["llama.context_length", "whole"]),
    "nan": (lambda d: behind(d, EPS, 4), "<f", float("nan"), [EPS, "positive number"]),
    "rope": (lambda d: behind(d, "llama.rope.freq_base", 4), "<f", -1.0, ["llama.rope.freq_base", "positive"]),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_line(whole, tmp_path, lie):
    at, form, value, parts = LIES[lie]
    refused(tmp_path / "lie.gguf", patched(whole, at(whole), form, value), *parts)


def test_names_that_are_there_twice_and_texts_that_are_none(whole, tmp_path):
    twice = whole.replace(b"llama.context_length", b"general.architecture", 1)
    refused(tmp_path / "a.gguf", twice, "general.architecture is there twice")
    refused(tmp_path / "b.gguf", whole.replace(b"blk.1.ffn_up", b"blk.0.ffn_up", 1), "blk.0.ffn_up.weight", "twice")
    odd = whole.replace(b"llama.context_length", b"llama.context\nlength", 1)
    refused(tmp_path / "d.gguf", odd, r"the name of field", r"is 'llama.context\nlength', which is no name")
    refused(tmp_path / "e.gguf", whole.replace(b"blk.1.ffn_up", b"blk\x1b1.ffn_up", 1), r"the name of tensor", r"\x1b1")
    refused(tmp_path / "c.gguf", whole.replace(b"smollm", b"smol\xff\xff", 1), "tokenizer.ggml.pre", "no UTF-8")


@pytest.mark.parametrize("seed", range(4))
def test_any_broken_byte_of_the_header_is_a_line_or_harmless(whole, tmp_path, seed):
    rng, header = random.Random(seed), whole.index(b"output_norm.weight") + 2000
    for i in range(100):
        broken = bytearray(whole)
        for _ in range(rng.choice((1, 1, 8))):
            broken[rng.randrange(header)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        path = tmp_path / f"{i}.gguf"
        path.write_bytes(bytes(broken))
        try:
            source = gguf.open_source(path)
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert all(np.prod(source.shape(name)) < len(whole) * 8 for name in source.names())


def test_every_length_of_a_truncated_file_is_refused(whole, tmp_path):
    for i, length in enumerate((*range(0, 200, 7), *range(200, len(whole), len(whole) // 50))):
        path = tmp_path / f"{i}.gguf"
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is truncated or no GGUF file"):
            hf.open_source(path)


G = "tokenizer.ggml."
VOCABULARIES = {
    "tokens that are numbers": ({G + "tokens": [1, 2, 3]}, [], "tokenizer.ggml.tokens is no list of texts"),
    "a type out of range": ({G + "token_type": [7] * 266}, [], "token_type of token 0 is 7, not one of 1 to 6"),
    "a type below": ({G + "token_type": [0] * 266}, [], "token_type of token 0 is 0, not one of 1 to 6"),
    "types that are texts": ({G + "token_type": ["x"] * 266}, [], "token_type of token 0 is x, not one of 1 to 6"),
    "types that are a number": ({G + "token_type": 3}, [], "tokenizer.ggml.token_type is no list of numbers"),
    "a merge to nothing": ({G + "merges": ["h t"]}, [], "tokenizer.ggml.merges holds 'h t'"),
    "a merge of three": ({G + "merges": ["h e e"]}, [], "tokenizer.ggml.merges holds 'h e e'"),
    "a begin beyond": ({G + "bos_token_id": 266}, [], "tokenizer.ggml.bos_token_id is 266, and there are 266 tokens"),
    "a pad that is text": ({G + "padding_token_id": "x"}, [], "tokenizer.ggml.padding_token_id is x"),
    "no model": ({}, [G + "model"], "unknown GGUF vocabulary None"),
    "a model that is a list": ({G + "model": ["gpt2"]}, [], "unknown GGUF vocabulary ['gpt2']"),
    "a cut that is a list": ({G + "pre": ["gpt-2"]}, [], "unknown tokenizer.ggml.pre ['gpt-2']"),
    "a cut of a million letters": ({G + "pre": "x" * 10**6}, [], "unknown tokenizer.ggml.pre 'xxx"),
    "no scores": ({G + "model": "llama"}, [], "tokenizer.ggml.scores is missing"),
    "scores of nothing": (
        {G + "model": "llama", G + "scores": [float("nan")] * 266},
        [],
        "tokenizer.ggml.scores is no list of numbers",
    ),
    "a template that is a number": ({"tokenizer.chat_template": 3}, [], "tokenizer.chat_template is no text"),
    "begins that are texts": ({G + "add_bos_token": "no"}, [], "tokenizer.ggml.add_bos_token is 'no', not true or"),
    "begins with nothing": (
        {G + "add_bos_token": True},
        [G + "bos_token_id"],
        "tokenizer.ggml.bos_token_id is missing",
    ),
}


@pytest.mark.parametrize("lie", VOCABULARIES)
def test_a_vocabulary_that_lies_is_one_line(tmp_path, lie):
    values, drop, message = VOCABULARIES[lie]
    path = tmp_path / "lie.gguf"
    tiny_gguf.write(path, values=values, drop=drop)
    with pytest.raises(ValueError) as error:
        PretrainedTokenizer(path, chat_template=False)
    line = str(error.value)
    assert message in line and str(path) in line and "\n" not in line and len(line) < 2500
