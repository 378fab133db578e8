"""GGUF files as a source of weights: their tensors under the names of Hugging Face, their metadata as a config.json.

A GGUF is one file with metadata, vocabulary and (quantized) tensors. The ``gguf`` package parses the file and
dequantizes its numbers, so every type that it knows can be read; this module translates names and metadata. Metadata
are parsed once. A tensor is read on request, only the rows that are asked for, and is not cached.
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

# The file's tensor name -> Hugging Face's; {} is the block. In Llama files the rows of q and k of a head are in pairs,
# as rotary positions were first written. Hugging Face has the first row of every pair, then the second of every pair.
LLAMA = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "blk.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blk.{}.attn_q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blk.{}.attn_output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.ffn_gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": "model.layers.{}.mlp.down_proj.weight",
}
HEAD = {"output.weight": "lm_head.weight"}  # absent if the head is the embedding
ARCHITECTURES = {"llama": LLAMA}
ROWS_AT_ONCE = 4096  # rows that are dequantized at a time, and held besides the result


class Tensor(NamedTuple):
    """The place of a tensor in a file.

    shape: as Hugging Face has it.
    kind: the type that the numbers are stored as.
    offset, bytes: where the tensor begins in the file, and its size.
    order: the file's row for each row of Hugging Face; None = the same order.
    """

    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    offset: int
    bytes: int
    order: np.ndarray | None = None


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
        out = out[(slice(None), *index[1:])]
        return out[0] if len(tensor.shape) == 1 else out


def of_package(package: str, remedy: str) -> Path:
    """The path of the GGUF file in an installed package; the package itself is not imported.

    Raises:
      FileNotFoundError: the package is not installed, or has no or several such files; the error says ``remedy``.
    """
    spec = importlib.util.find_spec(package)
    files = [] if spec is None else [f for d in spec.submodule_search_locations or () for f in Path(d).glob("*.gguf")]
    if len(files) != 1:
        what = "is not installed" if spec is None else f"holds {len(files)} GGUF files, not one"
        raise FileNotFoundError(f"the package {package} {what}: {remedy}")
    return files[0]


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
    if family not in ARCHITECTURES:
        raise ValueError(f"{path}: " + unknown("GGUF architecture", family, ARCHITECTURES))
    config = _config(path, family, metadata, stored)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for ours, theirs in _expected(path, ARCHITECTURES[family], config["num_hidden_layers"], stored).items():
        tensor = stored[theirs]
        of_head = heads.get(theirs.split(".")[-2])
        tensors[ours] = tensor if of_head is None else tensor._replace(order=_unpaired(tensor.shape[0], of_head))
    return GGUF(path, MappingProxyType(config), MappingProxyType(tensors), MappingProxyType(metadata))


def _parse(path: Path, size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a file, under its own names."""
    library = _library()
    try:
        reader = library.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        found = reader.tensors
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError) as error:
        raise ValueError(
            f"{path} ({size:,} bytes) is truncated or no GGUF file ({str(error).splitlines()[0]}): fetch it again"
        ) from error
    stored = {
        t.name: Tensor(tuple(map(int, reversed(t.shape))), t.tensor_type, int(t.data_offset), int(t.n_bytes))
        for t in found
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


def _expected(path: Path, table: Mapping[str, str], blocks: int, stored: Mapping[str, Tensor]) -> dict[str, str]:
    """Hugging Face's name -> the file's name, for all tensors. ``ValueError`` if one is missing or unknown."""
    names = {}
    for theirs, ours in table.items():
        for block in range(blocks) if "{}" in theirs else (0,):
            names[ours.format(block)] = theirs.format(block)
    for theirs, ours in HEAD.items():
        if theirs in stored:
            names[ours] = theirs
    missing = [theirs for theirs in names.values() if theirs not in stored]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} tensors, the first is {missing[0]}: the file is not whole")
    extra = sorted(stored.keys() - set(names.values()))
    if extra:
        raise ValueError(
            f"{path}: {len(extra)} tensors that its architecture does not have, the first is {extra[0]}: load the "
            "model from safetensors instead"
        )
    return names


def _config(path: Path, family: str, metadata: Mapping[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Any]:
    """The metadata with the keys of a config.json."""

    def field(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{family}.{name}", default)
        if value is None:
            raise ValueError(f"{path} lacks the field {family}.{name}: the file is not whole")
        return value

    if "token_embd.weight" not in stored:
        raise ValueError(f"{path} lacks the tensor token_embd.weight: the file is not whole")
    scaling = field("rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(
            f"{path}: rope scaling {scaling!r} is not read from GGUF files: load the model from safetensors instead"
        )
    width, heads = field("embedding_length"), field("attention.head_count")
    head_dim = field("attention.key_length", width // heads)
    if field("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{path}: rotary positions on {field('rope.dimension_count')} of {head_dim} dimensions")
    ids = {
        f"{name}_token_id": metadata.get(f"tokenizer.ggml.{field_}_token_id")
        for name, field_ in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": width,
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": field("feed_forward_length"),
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": field("rope.freq_base", 10_000.0)},
        "tie_word_embeddings": "output.weight" not in stored,
        "vocab_size": stored["token_embd.weight"].shape[0],
        **{name: i for name, i in ids.items() if i is not None},
    }


def _unpaired(rows: int, heads: int) -> np.ndarray:
    """[rows]: the file's row for each row of Hugging Face: ``(h, half, i) <- (h, i, half)``."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _library() -> ModuleType:
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("reading GGUF files needs the gguf package: pip install 'jaxpo[gguf]'")
    import gguf

    return gguf
