"""Text to token ids and back: characters for policies trained from scratch, ``transformers`` for pretrained ones.

Masks are never made from token ids: the pad id may be the same as the end-of-sequence id.
"""

import codecs
import copy
import importlib
import importlib.util
import json
import re
import string
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Protocol

from jaxpo.arguments import Domain, check
from jaxpo.files import read_object
from jaxpo.hub import model_files
from jaxpo.registry import register, unknown
from jaxpo.text.control import Encoder, Markup, any_of, mark
from jaxpo.text.conversations import (
    Question,
    Said,
    Turn,
    check_text,
    conversation_of,
    messages_of,
    question_of,
    text_said,
)
from jaxpo.text.gguf_vocabulary import gguf_tokenizer
from jaxpo.text.templates import chat_template_of
from jaxpo.text.tokenizer_files import (
    BESIDE,
    bytes_of,
    files_of,
    read_files,
    text_of,
    transformers_library,
    write_files,
)

NONE: Mapping[str, Any] = MappingProxyType({})
JSON_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("chat_template.json", "config.json"),
)


class Tokenizer(Protocol):
    """The interface of tokenizers in jaxpo.

    Attributes:
      vocab_size: ids are in [0, vocab_size).
      pad_id: fills unused positions; may equal an end-of-sequence id.
      eos_ids: any of these ends a completion; the first one ends an answer of data.
      control: the text of each control token, such as ``<|im_end|>``, and its id.
    """

    vocab_size: int
    pad_id: int
    eos_ids: tuple[int, ...]
    control: Mapping[str, int]

    def encode(self, text: str) -> list[int]:
        """The ids of a text; no special token is added. A text that spells a control token is only text, unless it is
        `jaxpo.text.templates.Markup`. ``ValueError`` for a text that has no encoding."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens (pad, end of sequence) are left out."""

    def token_bytes(self) -> list[bytes]:
        """For every id the bytes that it appends to a text; ``b""`` for special tokens."""

    def render(self, question: Question) -> str:
        """The prompt that asks a question; ``ValueError`` for messages if there is no chat template for them."""

    def turn(self, question: Question, answer: Said) -> Turn:
        """A question and its answer as tokens: where the answer begins, and how it ends.

        ``ValueError``: they have no encoding, or the chat template refuses them or does not read a part of them.
        """

    def to_json(self) -> dict[str, Any]:
        """The data from which ``from_json`` rebuilds the tokenizer."""


class _Symbols:
    """Tokens are single characters: id ``first + i`` is ``symbols[i]``, ids below ``first`` are special."""

    def __init__(self, symbols: Sequence[str], first: int, pad_id: int, eos_id: int, separator: str):
        self.pad_id, self.eos_ids, self.vocab_size = pad_id, (eos_id,), first + len(symbols)
        self.separator, self.control = separator, {}
        self._text = [""] * first + list(symbols)
        self._ids = {symbol: first + i for i, symbol in enumerate(symbols)}

    def encode(self, text: str) -> list[int]:
        """The ids of the characters; ``ValueError`` names the first one that is not in the alphabet."""
        check_text(text)
        try:
            return [self._ids[c] for c in text]
        except KeyError as error:
            raise ValueError(
                f"character {error.args[0]!r} of {text[:80]!r} is not in the alphabet {''.join(self._ids)!r}"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """The characters of the ids, special ones left out; ``ValueError`` names an id outside the vocabulary."""
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {int(i)} is outside the vocabulary of {self.vocab_size}")
        return "".join(self._text[i] for i in ids)

    def token_bytes(self) -> list[bytes]:
        return [text.encode() for text in self._text]

    def render(self, question: Question) -> str:
        """The question and the separator, which tells the policy where the question ends."""
        return question_of(question) + self.separator

    def turn(self, question: Question, answer: Said) -> Turn:
        text = text_said(answer)
        return Turn(self.encode(self.render(question)), [*self.encode(text), self.eos_ids[0]], text)


class CharTokenizer(_Symbols):
    """One token for each character: id 0 is pad, 1 is end of sequence, then comes the alphabet in sorted order.

    Args:
      alphabet: all characters that may occur; order and repetition do not matter.
      separator: the character that ends the question in ``render``; it is added to the alphabet.
    """

    def __init__(self, alphabet: Iterable[str], separator: str = "\n"):
        if len(separator) != 1:
            raise ValueError(f"separator must be one character, got {separator!r}")
        self.alphabet = "".join(sorted({*"".join(alphabet), separator}))
        super().__init__(self.alphabet, first=2, pad_id=0, eos_id=1, separator=separator)

    @classmethod
    def from_texts(cls, texts: Iterable[str], separator: str = "\n") -> "CharTokenizer":
        """The tokenizer whose alphabet is the characters of ``texts``."""
        return cls(texts, separator)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "characters", "alphabet": self.alphabet, "separator": self.separator}


Base = Annotated[int, Domain(2, 36, whole=True)]


class IntegerTokenizer(_Symbols):
    """One token for each digit of a base up to 36: id 0 is both pad and end of sequence, 1 is the separator ``=``, and
    ``2 + d`` is digit d."""

    def __init__(self, base: Base):
        self.base = check("base", base, Base)
        digits = (string.digits + string.ascii_lowercase)[:base]
        super().__init__("=" + digits, first=1, pad_id=0, eos_id=0, separator="=")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "integers", "base": self.base}


class PretrainedTokenizer:
    """A fast tokenizer of ``transformers``.

    Args:
      tokenizer: a folder, GGUF file or hub name to load it from, or the object itself.
      chat_template: ask questions through the model's chat template (instruct models). Otherwise a question is followed
        by a newline; the beginning-of-sequence token comes before it if the tokenizer adds that token to texts.
      eos: texts of further tokens that end a completion. The end of an answer comes first, then the tokenizer's own
        end-of-sequence token; those in a ``generation_config.json`` in the folder come last.
      end: the token that ends an answer. By default the one that the chat template writes after an answer; without a
        template, the tokenizer's own end-of-sequence token.
      template_arguments: arguments of the chat template (``{"enable_thinking": False}``).
      may_stay_unread: fields of messages, and arguments that data give, that the chat template need not read.
      control_tokens_in_data: texts of data that spell a control token, such as ``<|im_end|>``, are that token. By
        default they are only text.

    Raises:
      ValueError: not a fast tokenizer, no chat template, no token that ends an answer, an ``eos`` or ``end`` that is
        no token (the nearest one is named), or an argument that the template does not read.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: bool,
        eos: Sequence[str] = (),
        *,
        end: str | None = None,
        template_arguments: Mapping[str, Any] = NONE,
        may_stay_unread: Sequence[str] = (),
        control_tokens_in_data: bool = False,
    ):
        path = tokenizer if isinstance(tokenizer, (str, Path)) else None
        if path is not None:
            path = model_files(path)
            tokenizer = gguf_tokenizer(path) if Path(path).suffix == ".gguf" else without_code(path)
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"a fast tokenizer of transformers is needed, got {type(tokenizer).__name__}")
        if chat_template and not tokenizer.chat_template:
            raise ValueError("chat_template=True, but this tokenizer has no chat template: it belongs to a base model")
        self._tokenizer, self.chat_template = tokenizer, chat_template
        self._rows: int | None = None  # of the vocabulary table, where it is shorter than the vocabulary
        self._options = dict(
            end=end,
            template_arguments=dict(template_arguments),
            may_stay_unread=list(may_stay_unread),
            control_tokens_in_data=control_tokens_in_data,
        )
        self._files = read_files(path) if path is not None and Path(path).is_dir() else None
        vocabulary = tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        for text, what in (*((text, "eos token") for text in eos), (end, "token of config.tokenizer.end")):
            if text is not None and text not in vocabulary:
                raise ValueError(unknown(what, text, tokenizer.all_special_tokens))
        self._template = None
        if chat_template:
            self._template = chat_template_of(tokenizer, template_arguments, end, may_stay_unread)
            end = self._template.end
        elif template_arguments or may_stay_unread:
            name = "template_arguments" if template_arguments else "may_stay_unread"
            raise ValueError(f"config.tokenizer.{name} has no effect without config.tokenizer.chat_template")
        named = [end, self._template.own_end if self._template else None, tokenizer.eos_token, *eos]
        ends = [*(vocabulary.get(token) for token in named), *_generation_eos(path)]
        self.eos_ids = tuple(dict.fromkeys(i for i in ends if i is not None))
        if not self.eos_ids:
            raise ValueError("this tokenizer has no end-of-sequence token: name one with config.tokenizer.end")
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, self.eos_ids[0])
        self.pad_id = next(i for i in pads if i is not None)
        self._special = {self.pad_id, *self.eos_ids, *tokenizer.all_special_ids}
        added = tokenizer.added_tokens_decoder.items()
        self.control = {str(t): i for i, t in added if (t.special or i in self._special) and str(t).strip()}
        self._ends = any_of(text for text, i in self.control.items() if i in self.eos_ids)
        written = {t: vocabulary[t] for t in self._template.written} if self._template else {}
        self._encode = Encoder(tokenizer, {**self.control, **written}, control_tokens_in_data)
        if self._template:
            self._template = replace(self._template, control=self._encode.spelled)

    def encode(self, text: str) -> list[int]:
        ids = self._encode(text)
        if self._rows is not None and (at := next((i for i in ids if i >= self._rows), None)) is not None:
            token = self._tokenizer.convert_ids_to_tokens(at)
            raise ValueError(f"token {token!r} ({at}) is beyond the {self._rows} rows of the policy's vocabulary table")
        return ids

    def within(self, rows: int) -> "PretrainedTokenizer":
        """The same tokenizer, which refuses to encode tokens beyond a vocabulary table of so many rows."""
        out = copy.copy(self)
        out._rows = rows
        return out

    def decode(self, ids: Sequence[int]) -> str:
        kept = [int(i) for i in ids if int(i) not in self._special]
        return self._tokenizer.decode(kept, clean_up_tokenization_spaces=False)

    def token_bytes(self) -> list[bytes]:
        """For every id the bytes that it appends to a text; ``ValueError`` if the tokens cannot be read as bytes."""
        spec = json.loads(self._tokenizer.backend_tokenizer.to_str())
        to_bytes = _byte_reader(spec)
        table = [b""] * self.vocab_size
        added = {t["id"]: t["content"] for t in spec["added_tokens"]}  # plain text, not coded like other tokens
        for token, i in self._tokenizer.get_vocab().items():
            if i not in self._special:
                table[i] = added[i].encode() if i in added else to_bytes(token)
        return table

    def token_names(self) -> list[str]:
        """For every id what the vocabulary calls it; "" for special ones."""
        names = [""] * self.vocab_size
        for token, i in self._tokenizer.get_vocab().items():
            names[i] = "" if i in self._special else token
        return names

    def render(self, question: Question) -> Markup:
        if self._template:
            return self._template.prompt(conversation_of(question))
        bos = self._tokenizer.bos_token_id
        prefix = self._tokenizer.bos_token if bos is not None and self._tokenizer.encode("a")[0] == bos else ""
        return Markup(f"{prefix}{mark(question_of(question), self._encode.spelled)}\n")

    def turn(self, question: Question, answer: Said) -> Turn:
        """A question and its answer as tokens (see `Tokenizer`). An answer that already spells its end has one end."""
        answer = self._unended(answer if isinstance(answer, str) else messages_of(answer)[0])
        if self._template:
            asks, says = self._template.answered(conversation_of(question), answer)
        else:
            asks, says = self.render(question), Markup(mark(text_said(answer), self._encode.spelled))
        prompt, whole = self.encode(asks), self.encode(Markup(asks.marked + says.marked))
        # Where a token reaches over the border, the answer is encoded alone, as the sampler begins it.
        said = whole[len(prompt) :] if whole[: len(prompt)] == prompt else self.encode(says)
        return Turn(prompt, [*said, self.eos_ids[0]], str(says))

    def _unended(self, answer: Said) -> Said:
        """The answer without tokens that end a completion, where its text spells them at its end."""
        if not isinstance(answer, str):
            return {**answer, "content": self._unended(answer["content"])}
        found = [m.start() for m in self._ends.finditer(answer) if m.end() == len(answer.rstrip())]
        return self._unended(answer[: found[0]]) if found else answer

    @property
    def files(self) -> dict[str, bytes]:
        """The files that make this tokenizer, by name: those of its folder as they are, else what transformers
        writes."""
        if self._files is None:
            self._files = files_of(self._tokenizer)
        return self._files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files of the tokenizer into ``folder`` as they came, and a tokenizer.json if there was none."""
        backend = self._tokenizer.backend_tokenizer.to_str().encode()
        write_files({"tokenizer.json": backend, **self.files}, Path(folder), but=BESIDE)

    def to_json(self) -> dict[str, Any]:
        """All files of the tokenizer, not its path: a run must be usable when the folder or the hub is gone."""
        ends = [self._tokenizer.convert_ids_to_tokens(i) for i in self.eos_ids]
        files = {name: text_of(content) for name, content in self.files.items()}
        told = dict(chat_template=self.chat_template, eos=ends, conversations=self._options)
        return {"kind": "pretrained", "files": files, **told}


def without_code(path: str | Path) -> Any:
    """The tokenizer of transformers in a folder or under a hub name; Python that comes with it is never run. Where
    transformers asks for that Python, the tokenizer.json beside it is enough.

    Raises:
      ValueError: there is no tokenizer.json, so only the Python could read the tokenizer.
      OSError: there is no tokenizer."""
    library = transformers_library()
    for name in JSON_FILES if Path(path).is_dir() else ():
        file = Path(path) / name
        if file.is_file():
            read_object(file)
            if file.read_bytes()[:3] == codecs.BOM_UTF8:
                raise ValueError(f"{file} begins with a byte order mark: save it as plain UTF-8")
    try:
        return library.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except OSError:
        raise
    except Exception as error:  # of many kinds, by what is wrong in which file
        if "trust_remote_code" not in str(error):
            reason = next(iter(str(error).splitlines()), "")
            raise ValueError(
                f"{path}: transformers cannot read its tokenizer ({type(error).__name__}: {reason})"
            ) from None
    try:
        return library.PreTrainedTokenizerFast.from_pretrained(path)
    except (OSError, ValueError, TypeError):
        raise ValueError(
            f"config.tokenizer.path {str(path)!r} brings Python code of its own for the tokenizer, which is not run, "
            "and no tokenizer.json that does without: save one there with save_pretrained of a fast tokenizer"
        ) from None


def first_difference(a: Tokenizer, b: Tokenizer) -> int | None:
    """The first id that two tokenizers give to different tokens; None = they have the same tokens. Special tokens have
    no text, so their names may differ, and one tokenizer may have more of them."""
    both = all(isinstance(t, PretrainedTokenizer) for t in (a, b))
    ours, theirs = (t.token_names() if both else t.token_bytes() for t in (a, b))
    common = min(len(ours), len(theirs))
    differs = [i for i, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x and y and x != y]
    more = [common + i for i, x in enumerate((*ours[common:], *theirs[common:])) if x]
    return min([*differs, *more], default=None)


# ---- tokenizers by name: functions of the options that return (texts of the run) -> Tokenizer

FromTexts = Callable[[Callable[[], Iterable[str]]], Tokenizer]


@register("tokenizer")
def characters() -> FromTexts:
    """One token for each character in the task's questions and answers and in the data."""
    return lambda texts: CharTokenizer.from_texts(texts())


@register("tokenizer")
def integers(base: int = 10) -> FromTexts:
    """One token for each digit of a base up to 36."""
    return lambda texts: IntegerTokenizer(base)


@register("tokenizer")
def pretrained(
    path: str,
    chat_template: bool = True,
    end: str | None = None,
    template_arguments: Mapping[str, Any] = NONE,
    may_stay_unread: tuple[str, ...] = (),
    control_tokens_in_data: bool = False,
) -> FromTexts:
    """The tokenizer of a pretrained model.

    Args:
      path: a folder, a GGUF file or a hub id (`jaxpo.hub`).
      chat_template: ask questions through the model's chat template.
      end: the token that ends an answer; None = the one that the chat template writes after an answer.
      template_arguments: arguments of the chat template, as
        ``--config.tokenizer.template_arguments.enable_thinking=False``.
      may_stay_unread: fields of messages (``tool_call_id``), and arguments that data give (``tools``), that the chat
        template need not read.
      control_tokens_in_data: texts of data that spell a control token, such as ``<|im_end|>``, are that token.
    """
    return lambda texts: PretrainedTokenizer(
        path,
        chat_template,
        end=end,
        template_arguments=template_arguments,
        may_stay_unread=may_stay_unread,
        control_tokens_in_data=control_tokens_in_data,
    )


def from_json(spec: Mapping[str, Any]) -> Tokenizer:
    """Rebuild the tokenizer whose ``to_json`` is ``spec``. Raises ``ValueError`` for an unknown kind."""
    kinds = {
        "characters": lambda s: CharTokenizer(s["alphabet"], s["separator"]),
        "integers": lambda s: IntegerTokenizer(s["base"]),
        "pretrained": _pretrained_from_json,
    }
    if spec.get("kind") not in kinds:
        raise ValueError(unknown("kind of tokenizer", spec.get("kind"), kinds))
    return kinds[spec["kind"]](spec)


def _pretrained_from_json(spec: Mapping[str, Any]) -> PretrainedTokenizer:
    if "files" not in spec:
        raise ValueError("tokenizer.json does not hold the files of its tokenizer: an older version of jaxpo wrote it")
    files = {name: bytes_of(text) for name, text in spec["files"].items()}
    with tempfile.TemporaryDirectory() as folder:
        write_files(files, Path(folder))
        read = without_code(folder)
    tokenizer = PretrainedTokenizer(read, spec["chat_template"], spec["eos"], **spec["conversations"])
    tokenizer._files = files
    return tokenizer


def for_transformers(tokenizer: Tokenizer) -> Any:
    """The tokenizer as an object of transformers: its own if it has one, else a vocabulary of single characters."""
    if isinstance(tokenizer, PretrainedTokenizer):
        return tokenizer._tokenizer
    library = importlib.import_module("tokenizers")
    special = {tokenizer.pad_id: "<pad>"} | {i: "<eos>" for i in tokenizer.eos_ids}
    symbols = [special.get(i) or text.decode() for i, text in enumerate(tokenizer.token_bytes())]
    backend = library.Tokenizer(library.models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}))
    backend.pre_tokenizer = library.pre_tokenizers.Split(library.Regex(r"[\s\S]"), "isolated")
    backend.decoder = library.decoders.Fuse()
    pad, eos = special[tokenizer.pad_id], special[tokenizer.eos_ids[0]]
    return transformers_library().PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, eos_token=eos)


def as_pretrained(tokenizer: Tokenizer) -> PretrainedTokenizer:
    """A tokenizer of single characters in the files of transformers."""
    return PretrainedTokenizer(for_transformers(tokenizer), chat_template=False)


def _generation_eos(path: str | Path | None) -> list[int]:
    """The end-of-sequence ids of a model folder's generation_config.json (instruct models often have several)."""
    file = None if path is None else Path(path) / "generation_config.json"
    if file is None or not file.is_file():
        return []
    ids = read_object(file).get("eos_token_id")
    return ids if isinstance(ids, list) else [ids]


def _byte_reader(spec: Mapping[str, Any]) -> Callable[[str], bytes]:
    """The function that turns a token of this vocabulary into bytes, chosen by the decoder in its tokenizer.json."""
    decoder = spec.get("decoder") or {}
    steps = {step["type"] for step in decoder.get("decoders", [decoder]) if step}
    if "ByteLevel" in steps:
        table = {c: b for b, c in _bytes_to_unicode().items()}
        return lambda token: bytes(table[c] for c in token)
    if steps & {"Metaspace", "Replace", "ByteFallback"}:
        return _sentencepiece_bytes
    raise ValueError(
        "token_bytes knows byte-level and SentencePiece vocabularies; this tokenizer decodes by "
        f"{sorted(steps) or 'nothing'}"
    )


def _sentencepiece_bytes(token: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


def _bytes_to_unicode() -> dict[int, str]:
    """GPT-2's table: printable bytes stand for themselves; the others become characters from 256 up, in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)}
