"""Every JSON file of a model folder that is damaged or another one is told by its name, in a line."""

import shutil

import pytest

from jaxpo.policy import hf
from jaxpo.text.tokenizers import PretrainedTokenizer
from tests.runs import tiny_model

DAMAGE = {
    "truncated": b'{"a": [1,',
    "deep": b"[" * 200_000 + b"]" * 200_000,
    "no text": b'{"a":"\xff\xfe"}',
    "a list": b"[1]",
    "a number": b"7",
    "null": b"null",
    "a huge number": b'{"a":' + b"9" * 9999 + b"}",
    "empty": b"",
}
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "config.json"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("json") / "m")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_the_file_is_named(folder, tmp_path, file, damage):
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    (copy / file).write_bytes(DAMAGE[damage])
    with pytest.raises(ValueError, match=file) as error:
        PretrainedTokenizer(copy, chat_template=True)
        hf.open_source(copy)
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_and_a_tokenizer_that_is_none(folder, tmp_path):
    for content, message in (
        (b"\xef\xbb\xbf{}", "tokenizer_config.json begins with a byte order mark"),
        (b'{"tokenizer_class": 7}', "transformers cannot read its tokenizer|fast tokenizer"),
    ):
        copy = tmp_path / message[:4]
        shutil.copytree(folder, copy)
        (copy / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            PretrainedTokenizer(copy, chat_template=True)
