"""The files that a pretrained tokenizer is read from: as a run keeps them, and as they go out again."""

import base64
import importlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from jaxpo.registry import unknown

# What transformers and others read a tokenizer from. Of these, BESIDE is read where the others do not name a class, and
# belongs to the model.
BESIDE = ("config.json",)
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *BESIDE,
)


def read_files(folder: str | Path) -> dict[str, bytes]:
    """The files of a folder that a tokenizer is read from, by their names in it."""
    found = [file for pattern in TOKENIZER_FILES for file in sorted(Path(folder).glob(pattern)) if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


def files_of(tokenizer: Any) -> dict[str, bytes]:
    """The files that transformers writes of a tokenizer. Its version 5 names a class and a list of special tokens that
    version 4 and other programs refuse: they get the names that both know."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = read_files(folder)
    settings = json.loads(files["tokenizer_config.json"])
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return files | {"tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False).encode()}


def write_files(files: Mapping[str, bytes], folder: Path, but: Sequence[str] = ()) -> None:
    """Write files of a tokenizer, but those called ``but``; ``ValueError`` for a name that no such file has."""
    for name, content in files.items():
        if not any(PurePosixPath(name).match(pattern) for pattern in TOKENIZER_FILES) or ".." in name or name[0] == "/":
            raise ValueError(unknown("file of a tokenizer", name, TOKENIZER_FILES))  # a run may come from elsewhere
        if name not in but:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)


def text_of(content: bytes) -> str | dict[str, str]:
    """The content of a file as JSON can hold it."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}


def bytes_of(text: str | Mapping[str, str]) -> bytes:
    """The inverse of `_text_of`."""
    return text.encode() if isinstance(text, str) else base64.b64decode(text["base64"])


def transformers_library() -> ModuleType:
    """Import transformers without our ``kernels``. It looks for a library of that name; in a checkout of this project
    it would find our folder, and load all of its modules a second time."""
    spec = importlib.util.find_spec("kernels") if "kernels" not in sys.modules else None
    if spec is not None and spec.origin and (Path(spec.origin).parent / "token_logprob").is_dir():
        sys.modules["kernels"] = None  # importing it fails: transformers takes it for not installed
    return importlib.import_module("transformers")
