"""SentencePiece vocabularies of GGUF files: the same ids as the algorithm by the book, and back."""

import random

import pytest

from jaxpo.text import gguf
from jaxpo.text.control import Markup
from jaxpo.text.gguf_vocabulary import assembled, gguf_tokenizer, sentencepiece, vocabulary_of
from jaxpo.text.tokenizers import PretrainedTokenizer, from_json
from tests.policy.models import path_or_skip
from tests.text import spm

WORDS = ["▁t", "he", "▁the", "in", "▁in", "inn", "▁i", "er", "▁th", "th", "▁▁", "ab", "abc", "bc", "▁a", "ca"]
LETTERS = list("▁abcdefghijklmnopqrstuvwxyz.é")
TOKENS = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "\n\n", "  ", "<tool>"),
    *(f"<0x{b:02X}>" for b in range(256)),
    *LETTERS,
    *WORDS,
]
KINDS = [3, 3, 3, 2, 4, 4, 4, *[6] * 256, *[1] * (len(LETTERS) + len(WORDS))]
SCORES = [0.0] * (7 + 256) + [-100.0] * len(LETTERS) + [-1.0 - i for i in range(len(WORDS))]
TEXTS = ["the inn", " the", "the  the", "abc bca\n\nthere", "ca<tool>b é ü 🙂", "", " ", "\n", "tttheee in  in"]


def fields(**changes):
    return {
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": KINDS,
        "tokenizer.ggml.scores": SCORES,
        **{
            f"tokenizer.ggml.{name}_token_id": i
            for name, i in zip(("padding", "eos", "bos", "unknown"), range(4), strict=True)
        },
        "tokenizer.ggml.add_space_prefix": False,
        **{f"tokenizer.ggml.{name}": value for name, value in changes.items()},
    }


def made(**changes):
    given = fields(**changes)
    vocabulary = vocabulary_of(given, True)
    return assembled(sentencepiece(vocabulary, given), vocabulary, given)


@pytest.mark.parametrize("prefix", (False, True))
def test_ids_are_those_of_the_algorithm(prefix):
    tokenizer, rng = made(add_space_prefix=prefix), random.Random(0)
    drawn = [
        "".join(rng.choice(["the", "in", " ", "a", "bc", "ü", "\n\n", "th"]) for _ in range(12)) for _ in range(50)
    ]
    for text in [*TEXTS, *drawn]:
        got = tokenizer.encode(text, add_special_tokens=False)
        assert got == spm.encode(text, TOKENS, SCORES, KINDS, prefix), text
        if not prefix or "\n\n" not in text and "  " not in text and "<tool>" not in text:
            assert tokenizer.decode(got, clean_up_tokenization_spaces=False) == text


def test_texts_begin_with_bos_unless_the_file_says_otherwise():
    assert made().encode("a")[0] == 2
    assert made(add_bos_token=False).encode("a")[0] != 2


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"scores": SCORES[:5]}, "tokenizer.ggml.scores is of 5 entries for"),
        ({"scores": None}, "tokenizer.ggml.scores is missing"),
    ),
)
def test_scores_that_are_not_whole(changes, message):
    given = fields(**changes)
    with pytest.raises(ValueError, match=message):
        sentencepiece(vocabulary_of(given, True), given)


@pytest.mark.slow
def test_gemma_3_is_read_as_it_was_trained():
    """Its 262,144 tokens, on texts of many kinds; transformers 5.12 orders the merges of this file by its scores."""
    path = path_or_skip("gemma3")
    metadata = gguf.open_source(path).metadata
    tokens, scores, kinds = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    tokenizer = gguf_tokenizer(path)
    texts = [
        "The capital of France is Paris.",
        "  two\n\n\nand\ttabs",
        "naïve — 中文 🙂 ٣٤",
        "I'll we've x ** 2",
        "a" * 40,
    ]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == spm.encode(text, tokens, scores, kinds, False), text
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("The capital of France is") == [2, 818, 5279, 529, 7001, 563]
    ours = PretrainedTokenizer(path, chat_template=False)
    assert from_json(ours.to_json()).encode(Markup(texts[1])) == ours.encode(Markup(texts[1]))
    assert b"".join(ours.token_bytes()[i] for i in ours.encode(texts[2])).decode() == texts[2]
