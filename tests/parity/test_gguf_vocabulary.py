"""The SentencePiece vocabulary of a GGUF file, beside the sentencepiece library."""

import random

import pytest

from jaxpo.text import gguf
from jaxpo.text.gguf_vocabulary import gguf_tokenizer
from tests.policy.models import path_or_skip

pytestmark = pytest.mark.parity

TEXTS = [
    "The capital of France is Paris.",
    "a  b\n\n\tc   d",
    "naïve — 中文 🙂 \x01 <table>x</table>",
    "",
    " ",
    "   leading and trailing   ",
    "def f(x):\n        return x ** 2\n\n\n    # 1234567890",
    "Äpfel, Öl, Übermut; ½ ٣٤ Ⅷ ﬁ é",
    "https://example.org/a?b=c&d=%20#e",
]


def theirs(path):
    """The library's tokenizer of the same pieces."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as pb

    fields = gguf.open_source(path).metadata
    model = pb.ModelProto()
    model.trainer_spec.model_type = pb.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.bos_id, model.trainer_spec.eos_id, model.trainer_spec.pad_id, model.trainer_spec.unk_id = (
        -1,
        -1,
        -1,
        3,
    )
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    model.normalizer_spec.remove_extra_whitespaces = False
    names = ("tokens", "scores", "token_type")
    for token, score, kind in zip(*(fields[f"tokenizer.ggml.{name}"] for name in names), strict=True):
        piece = model.pieces.add()
        piece.piece, piece.score, piece.type = token.replace(" ", "▁") if kind == 4 else token, score, kind
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def test_gemma():
    path = path_or_skip("gemma3")
    ours, other, rng = gguf_tokenizer(path), theirs(path), random.Random(0)
    words = [" the", "in", "ner ", "\n", "  ", "é", "中", "x", "(", "tion", "42", "'s", "\t", "Straße", "🙂🙂", "://"]
    made = ["".join(rng.choices(words, k=rng.randrange(1, 30))) for _ in range(300)]
    for text in (*TEXTS, *made):
        assert ours.encode(text, add_special_tokens=False) == other.encode(text), text
