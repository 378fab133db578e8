"""Control tokens, such as ``<|im_end|>``, where they are meant, and as plain text where data spell them."""

import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from jaxpo.text.conversations import MARK, check_text

UNCOMMON = "\U00012345"  # cuneiform: a vocabulary has bytes or an unknown token for it, or leaves it out


class Markup(str):
    """A text whose control tokens are meant, as a template or a config wrote it.

    Args:
      marked: the text, with `MARK` before every control token that is only text.
    """

    marked: str

    def __new__(cls, marked: str) -> "Markup":
        self = super().__new__(cls, marked.replace(MARK, ""))
        self.marked = marked
        return self


def any_of(texts: Iterable[str]) -> re.Pattern:
    """Finds any of the texts, the longest first; nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted({*texts}, key=len, reverse=True))) or "(?!)")


def mark(text: str, control: re.Pattern | None) -> str:
    """The text with `MARK` before every control token; ``ValueError`` for a text that has no encoding.

    control: finds control tokens; None = they are meant.
    """
    check_text(text)
    return control.sub(lambda found: MARK + found[0], text) if control else text


class Encoder:
    """Texts as tokens of a tokenizer of transformers.

    Args:
      tokenizer: of transformers.
      control: the text of each control token -> its id.
      in_data: control tokens that a text spells are meant; else only those of `Markup` are.
    """

    def __init__(self, tokenizer: Any, control: Mapping[str, int], in_data: bool):
        self.tokenizer, self.control = tokenizer, control
        self.spelled = None if in_data else any_of(control)

    def __call__(self, text: str) -> list[int]:
        """The ids of a text; ``ValueError`` if it has no encoding."""
        marked = text.marked if isinstance(text, Markup) else mark(text, self.spelled)
        try:
            ids = self.marking(marked) if MARK in marked else self.plain(text)
        except Exception as error:  # the library has no class of its own for it
            raise ValueError(f"{text!r:.60} cannot be encoded: {error}") from None
        if lost := self.lost(text, marked, ids):
            raise ValueError(f"{text!r:.60} cannot be encoded: the vocabulary lacks {''.join(lost)!r:.40}")
        return ids

    def plain(self, text: str) -> list[int]:
        """The ids of a text in which every control token is meant."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    @cached_property
    def marking(self) -> Callable[[str], list[int]]:
        """The ids of a text with `MARK` before what is only text."""
        return marking_encoder(self.tokenizer, self.control)

    @cached_property
    def leaves_out(self) -> bool:
        """Whether the tokenizer skips characters that it does not know."""
        try:
            return not self.plain(UNCOMMON)
        except Exception:  # it raises instead; the library has no class of its own for it
            return False

    def lost(self, text: str, marked: str, ids: Sequence[int]) -> list[str]:
        """Characters of a text that its ids leave out, or do not know."""
        missing = self.tokenizer.unk_token_id
        if missing in ids and self.tokenizer.unk_token not in marked:
            return [c for c in dict.fromkeys(text) if missing in self.plain(c)] or [text]  # a word may be unknown
        return [c for c in dict.fromkeys(text) if not c.isspace() and not self.plain(c)] if self.leaves_out else []


def marking_encoder(tokenizer: Any, control: Mapping[str, int]) -> Callable[[str], list[int]]:
    """Make a function that encodes texts in which `MARK` stands before control tokens that are only text.

    It is the tokenizer with other names for its control tokens, so that the text around them is cut and merged as
    always.

    Args:
      tokenizer: of transformers.
      control: the text of each control token -> its id.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    new = {token: MARK + token for token in control}
    spec["post_processor"] = None
    for token in spec["added_tokens"]:
        token["content"] = new.get(token["content"], token["content"])
    model, vocabulary = spec["model"], spec["model"].get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {new.get(token, token): i for token, i in vocabulary.items()}
    else:  # of a unigram model: pairs of a piece and its score
        model["vocab"] = [[new.get(piece, piece), score] for piece, score in vocabulary]
    if "merges" in model:
        model["merges"] = [m for m in model["merges"] if "".join(m if isinstance(m, list) else m.split(" ")) not in new]
    if model.get("unk_token") in new:
        model["unk_token"] = new[model["unk_token"]]
    backend = importlib.import_module("tokenizers").Tokenizer.from_str(json.dumps(spec))
    ids = {backend.token_to_id(new[token]): i for token, i in control.items()}
    found = re.compile(f"({MARK}?)({any_of(control).pattern})|{MARK}")  # a template may have cut a token off

    def encode(marked: str) -> list[int]:
        swapped = found.sub(lambda m: "" if m[2] is None else m[2] if m[1] else MARK + m[2], marked)
        return [ids.get(i, i) for i in backend.encode(swapped, add_special_tokens=False).ids]

    return encode
