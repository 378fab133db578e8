"""The vocabulary of a GGUF file as a fast tokenizer of transformers: byte-level BPE and SentencePiece.

transformers itself reads GGUF files only if torch is installed, and ignores the cuts of ``tokenizer.ggml.pre``.
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpo.registry import unknown
from jaxpo.text import gguf
from jaxpo.text.tokenizer_files import transformers_library

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # values of ``tokenizer.ggml.token_type``
SPACE = "\u2581"  # SentencePiece's mark of a space

# How ``tokenizer.ggml.pre`` cuts a text before the merges, as llama.cpp lists it. GPT-2's own expression is None.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{NUMBER}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Cut(NamedTuple):
    """Steps before the merges.

    digits: cut after every digit first.
    expression: a word; None = GPT-2's.
    nfc: characters are composed first.
    whole: a word that is a token of its own takes no merges.
    """

    digits: bool = False
    expression: str | None = None
    nfc: bool = False
    whole: bool = False


LLAMA3 = Cut(expression=f"{CONTRACTIONS}|{WORDS.replace('{NUMBER}', '{1,3}')}", whole=True)
QWEN2 = Cut(expression=f"{CONTRACTIONS}|{WORDS.replace('{NUMBER}', '')}", nfc=True)
CUTS = {
    **dict.fromkeys(("default", "gpt-2"), Cut()),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), Cut(digits=True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), QWEN2),
}


class Vocabulary(NamedTuple):
    """What a file says of its tokens.

    tokens, kinds: the text and the kind of each.
    ids: of the tokens bos, eos, pad and unk, where the file names them.
    begins: every text begins with bos.
    """

    tokens: Sequence[str]
    kinds: Sequence[int]
    ids: Mapping[str, int]
    begins: bool


def gguf_tokenizer(path: str | Path) -> Any:
    """A ``PreTrainedTokenizerFast`` with a GGUF file's vocabulary, merges, special tokens and chat template.

    Raises:
      ValueError: a kind of vocabulary or ``tokenizer.ggml.pre`` that is not known; a vocabulary that is not whole, or
        contradicts itself. The line names the file and the field.
    """
    fields = gguf.open_source(path).metadata
    kinds = {"gpt2": byte_level, "llama": sentencepiece}
    kind = fields.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{path}: " + unknown("GGUF vocabulary", kind, kinds))
    try:
        if not isinstance(fields.get("tokenizer.chat_template"), str | None):
            raise ValueError("tokenizer.chat_template is no text: fetch it again")
        vocabulary = vocabulary_of(fields, begins=kind == "llama")
        backend = kinds[kind](vocabulary, fields)
        return assembled(backend, vocabulary, fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def vocabulary_of(fields: Mapping[str, Any], begins: bool) -> Vocabulary:
    """The tokens of a file. ``begins``: whether texts begin with bos where the file does not say."""
    tokens = texts_in(fields, "tokens")
    kinds = fields.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not isinstance(kinds, list):
        raise ValueError("tokenizer.ggml.token_type is no list of numbers: fetch it again")
    if len(kinds) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens")
    odd = next((i for i, kind in enumerate(kinds) if type(kind) is not int or not NORMAL <= kind <= BYTE), None)
    if odd is not None:
        raise ValueError(
            f"tokenizer.ggml.token_type of token {odd} is {str(kinds[odd])[:40]}, not one of {NORMAL} to {BYTE}"
        )
    if len(set(tokens)) < len(tokens):
        seen: set[str] = set()
        twice = next(t for t in tokens if t in seen or seen.add(t))
        raise ValueError(f"tokenizer.ggml.tokens holds {twice[:40]!r} twice")
    ids = {}
    for ours, theirs in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        i = fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if i is None:
            continue
        if not isinstance(i, int) or not 0 <= i < len(tokens):
            raise ValueError(f"tokenizer.ggml.{theirs}_token_id is {str(i)[:40]}, and there are {len(tokens)} tokens")
        ids[ours] = i
    told = fields.get("tokenizer.ggml.add_bos_token")
    if not isinstance(told, bool | None):
        raise ValueError(f"tokenizer.ggml.add_bos_token is {str(told)[:40]!r}, not true or false")
    if told and "bos" not in ids:
        raise ValueError("tokenizer.ggml.bos_token_id is missing, and every text begins with it")
    return Vocabulary(tokens, kinds, ids, (begins if told is None else told) and "bos" in ids)


def texts_in(fields: Mapping[str, Any], name: str) -> Sequence[str]:
    """A list of texts; ``ValueError`` if it is not there, or something else."""
    found = fields.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list) or not found or not all(isinstance(x, str) for x in found):
        raise ValueError(
            f"tokenizer.ggml.{name} is {'missing' if found is None else 'no list of texts'}: fetch it again"
        )
    return found


def byte_level(vocabulary: Vocabulary, fields: Mapping[str, Any]) -> Any:
    """Byte-level BPE."""
    library = importlib.import_module("tokenizers")
    pre = library.pre_tokenizers
    name = fields.get("tokenizer.ggml.pre", "default")
    if not isinstance(name, str) or name not in CUTS:
        raise ValueError(unknown("tokenizer.ggml.pre", name, CUTS))
    cut = CUTS[name]
    known = {token: i for i, token in enumerate(vocabulary.tokens)}
    merges = [tuple(merge.split(" ")) for merge in texts_in(fields, "merges")]
    for merge in merges:
        if len(merge) != 2 or merge[0] not in known or merge[1] not in known or "".join(merge) not in known:
            raise ValueError(f"tokenizer.ggml.merges holds {' '.join(merge)[:80]!r}, which its tokens do not have")
    backend = library.Tokenizer(library.models.BPE(known, merges, ignore_merges=cut.whole))
    backend.normalizer = library.normalizers.NFC() if cut.nfc else None
    steps = [pre.Digits(individual_digits=True)] if cut.digits else []
    if cut.expression:
        steps.append(pre.Split(library.Regex(cut.expression), "isolated"))
    steps.append(pre.ByteLevel(add_prefix_space=False, use_regex=cut.expression is None))
    backend.pre_tokenizer = pre.Sequence(steps)
    backend.decoder = library.decoders.ByteLevel()
    return backend


def sentencepiece(vocabulary: Vocabulary, fields: Mapping[str, Any]) -> Any:
    """SentencePiece's BPE: of all neighbours whose union is a token, those with the best token are joined first.
    Characters without a token are spelled in bytes."""
    library = importlib.import_module("tokenizers")
    decoders, normalizers = library.decoders, library.normalizers
    scores = fields.get("tokenizer.ggml.scores")
    number = isinstance(scores, list) and all(type(score) is float and score == score for score in scores)
    if not number or len(scores) != len(vocabulary.tokens):
        found = f"of {len(scores)} entries for {len(vocabulary.tokens)} tokens" if number else "no list of numbers"
        found = "missing" if scores is None else found
        raise ValueError(f"tokenizer.ggml.scores is {found}: fetch it again")
    unknown_id = vocabulary.ids.get("unk", next((i for i, k in enumerate(vocabulary.kinds) if k == UNKNOWN), None))
    known = {token: i for i, token in enumerate(vocabulary.tokens)}
    model = library.models.BPE(
        known,
        merges_of(vocabulary, scores),
        byte_fallback=BYTE in vocabulary.kinds,
        fuse_unk=True,
        unk_token=None if unknown_id is None else vocabulary.tokens[unknown_id],
    )
    backend = library.Tokenizer(model)
    spaces, prefix = normalizers.Replace(" ", SPACE), fields.get("tokenizer.ggml.add_space_prefix", True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def merges_of(vocabulary: Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every cut of a token into two others, the best token's first; of one token, the longest first half first."""
    normal = {t: s for t, s, kind in zip(vocabulary.tokens, scores, vocabulary.kinds, strict=True) if kind == NORMAL}
    found = [
        (-score, -i, token[:i], token[i:])
        for token, score in normal.items()
        for i in range(1, len(token))
        if token[:i] in normal and token[i:] in normal
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def assembled(backend: Any, vocabulary: Vocabulary, fields: Mapping[str, Any]) -> Any:
    """The tokenizer of transformers, with the special tokens, the beginning of texts, and the chat template."""
    library = importlib.import_module("tokenizers")
    tokens, kinds, ids = vocabulary.tokens, vocabulary.kinds, vocabulary.ids
    named = {f"{name}_token": tokens[i] for name, i in ids.items()}
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        whole = [t for t, k in zip(tokens, kinds, strict=True) if k == kind]
        backend.add_tokens([library.AddedToken(t, special=special, normalized=False) for t in whole])
    if vocabulary.begins:
        bos = named["bos_token"]
        backend.post_processor = library.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, ids["bos"])]
        )
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL and t not in named.values()]
    return transformers_library().PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **named,
        additional_special_tokens=control,
        chat_template=fields.get("tokenizer.chat_template"),
    )
