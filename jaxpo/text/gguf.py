"""GGUF files as a source of weights: their tensors under the names of Hugging Face, their metadata as a config.json.

A GGUF is one file with metadata, vocabulary and (quantized) tensors. The ``gguf`` package dequantizes its numbers, so
every type that it knows can be read. The header is parsed once. A tensor is read on request, only the rows that are
asked for, and is not cached.
"""

import functools
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import numpy as np

from jaxpo.registry import unknown
from jaxpo.text.gguf_families import ARCHITECTURES, FACTORS, config_of, names_of, unpaired
from jaxpo.text.gguf_header import read_header

ROWS_AT_ONCE = 4096  # rows that are dequantized at a time, and held besides the result


class Tensor(NamedTuple):
    """The place of a tensor in a file.

    shape: as Hugging Face has it.
    kind: the type that the numbers are stored as.
    offset, bytes: where the tensor begins in the file, and its size.
    order: the file's row for each row of Hugging Face; None = the same order.
    plus: what is added to the file's numbers.
    """

    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    offset: int
    bytes: int
    order: np.ndarray | None = None
    plus: float = 0.0


@dataclass(frozen=True)
class GGUF:
    """An open file.

    config: the content of a config.json.
    tensors: by Hugging Face's names.
    metadata: the file's own fields.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any]

    def names(self) -> list[str]:
        """Names of the tensors, as Hugging Face calls them."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, as Hugging Face has it."""
        return self.tensors[name].shape

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """``tensor[index]`` in float32; only the rows of its first slice are dequantized."""
        tensor = self.tensors[name]
        rows = math.prod(tensor.shape[:-1])
        raw = np.memmap(self.path, np.uint8, "r", tensor.offset, (rows, tensor.bytes // rows))
        index = (slice(None), *index) if len(tensor.shape) == 1 else index or (slice(None),)
        chosen = (np.arange(rows) if tensor.order is None else tensor.order)[index[0]]
        out = np.empty((len(chosen), tensor.shape[-1]), np.float32)
        for i in range(0, len(chosen), ROWS_AT_ONCE):
            part = np.asarray(raw[chosen[i : i + ROWS_AT_ONCE]])
            out[i : i + ROWS_AT_ONCE] = _library().quants.dequantize(part, tensor.kind)
        out = out[(slice(None), *index[1:])] + np.float32(tensor.plus)
        return out[0] if len(tensor.shape) == 1 else out


def open_source(path: str | Path) -> GGUF:
    """Open a file and check all of it before any tensor is read.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is truncated or no GGUF file, the architecture is unknown, a tensor is missing or unknown to the
        architecture, or a tensor is stored in a type that cannot be dequantized.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(unknown("GGUF file", str(path), [str(p) for p in path.parent.glob("*.gguf")]))
    stat = path.stat()
    return _read(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=2)  # config, tokenizer and weights are asked for one after another
def _read(path: Path, size: int, _changed: int) -> GGUF:
    metadata, stored = _parse(path, size)
    family = metadata.get("general.architecture")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise ValueError(f"{path}: " + unknown("GGUF architecture", family, ARCHITECTURES))
    if "token_embd.weight" not in stored:
        raise ValueError(f"{path} lacks the tensor token_embd.weight: the file is not whole")
    known = ARCHITECTURES[family]
    factors = GGUF(path, {}, stored, {}).read(FACTORS) if FACTORS in stored else None
    try:
        config = config_of(family, metadata, {name: tensor.shape for name, tensor in stored.items()}, factors)
        names = names_of(family, config["num_hidden_layers"], stored)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]} if known.paired else {}
    tensors = {}
    for ours, theirs in names.items():
        tensor = stored[theirs]
        of_head = heads.get(theirs.split(".")[-2])
        if of_head is not None and tensor.shape[0] % (2 * of_head):
            raise ValueError(f"{path}: {theirs} has {tensor.shape[0]} rows, which {of_head} heads do not share")
        tensors[ours] = tensor._replace(
            order=None if of_head is None else unpaired(tensor.shape[0], of_head),
            plus=-1.0 if known.plus_one and ours.endswith("norm.weight") else 0.0,
        )
    return GGUF(path, MappingProxyType(config), MappingProxyType(tensors), MappingProxyType(metadata))


def _parse(path: Path, size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a file, under its own names."""
    library = _library()
    sizes = {int(kind): size for kind, size in library.GGML_QUANT_SIZES.items()}
    try:
        metadata, found = read_header(path, sizes.get)
    except ValueError as error:
        raise ValueError(f"{path} ({size:,} bytes) is truncated or no GGUF file ({error}): fetch it again") from error
    stored = {
        name: Tensor(tuple(reversed(t.shape)), library.GGMLQuantizationType(t.kind), t.offset, t.bytes)
        for name, t in found.items()
    }
    for name, tensor in stored.items():
        try:
            block, of_block = library.GGML_QUANT_SIZES[tensor.kind]
            library.quants.dequantize(np.zeros((1, of_block), np.uint8), tensor.kind)
        except NotImplementedError:
            raise ValueError(
                f"{path}: the gguf package cannot dequantize {name}, which is stored as {tensor.kind.name}: "
                "choose a file with another quantization"
            ) from None
    return metadata, stored


def _library() -> ModuleType:
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("reading GGUF files needs the gguf package: pip install 'jaxpo[gguf]'")
    import gguf

    return gguf
