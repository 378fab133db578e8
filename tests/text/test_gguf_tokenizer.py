"""The tokenizer of a GGUF file: the same ids as one put together from the library's own parts."""

import pytest

from jaxpo.text.control import Markup
from jaxpo.text.gguf_vocabulary import gguf_tokenizer
from jaxpo.text.tokenizers import PretrainedTokenizer, from_json
from tests.policy import tiny_gguf

TEXTS = ["the inn", "12  345, 6", "  the\n\n\tthe  ", "naïve — 中 🙂", "<|im_start|>user\nx<|im_end|>", "a<tool> b", ""]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tiny_gguf.write(path)
    return path


def assembled():
    """What the file describes, by the library's classes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(tiny_gguf.vocabulary())}
    backend = Tokenizer(models.BPE(vocabulary, [tuple(m.split(" ")) for m in tiny_gguf.MERGES]))
    cuts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in tiny_gguf.SPECIAL])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    return backend


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_parts(path, text):
    tokenizer = PretrainedTokenizer(path, chat_template=True)
    ids = tokenizer.encode(Markup(text))
    assert ids == assembled().encode(text, add_special_tokens=False).ids
    plain = text.replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert tokenizer.decode(ids) == plain
    assert b"".join(tokenizer.token_bytes()[i] for i in ids).decode() == plain


def test_digits_are_cut_before_the_merges(path):
    assert tiny_gguf.vocabulary().index("Ġ1") not in PretrainedTokenizer(path, chat_template=True).encode("the 1")


def test_special_tokens_and_the_chat_template_come_from_the_file(path):
    tokenizer = PretrainedTokenizer(path, chat_template=True)
    assert (tokenizer.eos_ids, tokenizer.pad_id, tokenizer.vocab_size) == ((2,), 2, len(tiny_gguf.vocabulary()))
    assert tokenizer.render("the") == "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
    again = from_json(tokenizer.to_json())
    assert again.render("the") == tokenizer.render("the") and again.eos_ids == tokenizer.eos_ids
    assert all(again.encode(text) == tokenizer.encode(text) for text in TEXTS)


def test_a_file_that_begins_every_text_with_a_token(tmp_path):
    tiny_gguf.write(tmp_path / "bos.gguf", add_bos=True)
    tokenizer = PretrainedTokenizer(tmp_path / "bos.gguf", chat_template=False)
    assert tokenizer.render("the") == "<|im_start|>the\n"
    assert gguf_tokenizer(tmp_path / "bos.gguf").encode("")[:1] == [1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer__ggml__pre": "smolm"}, "unknown tokenizer.ggml.pre 'smolm'.*smollm"),
        ({"tokenizer__ggml__model": "rwkv"}, "unknown GGUF vocabulary 'rwkv'.*gpt2"),
        ({"tokenizer__ggml__model": "llama"}, "tokenizer.ggml.scores is missing"),
    ],
)
def test_a_vocabulary_that_is_not_known_is_refused(tmp_path, fields, message):
    tiny_gguf.write(tmp_path / "bad.gguf", **fields)
    with pytest.raises(ValueError, match=message):
        PretrainedTokenizer(tmp_path / "bad.gguf", chat_template=False)
