"""Import and export of Hugging Face weights, tensor by tensor, between safetensors files and sharded arrays.

source = open_source("path/to/model")                   # a folder, or a GGUF file
config = config_from_hf(source.config, dtype="bfloat16")
params = load(source, config, mesh)
export(params, config, "path/to/new", hf_config=source.config, tokenizer=tokenizer)
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial, reduce
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxpo import hub
from jaxpo.files import no_such, read_object
from jaxpo.hub import model_files
from jaxpo.parallel.mesh import make_mesh
from jaxpo.parallel.sharding import shardings
from jaxpo.policy.config import TransformerConfig
from jaxpo.policy.families import Slot, classifier_to_hf, config_to_hf, score_slot, tensors
from jaxpo.policy.transformer import Params, init
from jaxpo.registry import unknown
from jaxpo.text import gguf

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
IGNORED = ("rotary_emb.inv_freq",)  # buffers that old files hold; they follow from the config
FILE_BYTES = 5 * 10**9  # most bytes of an exported file (unless one tensor is larger)


class Source(Protocol):
    """A set of tensors with Hugging Face's names, in files of any format.

    config: the content of a config.json.
    """

    config: Mapping[str, Any]

    def names(self) -> list[str]:
        """The names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Read ``tensor[index]`` in floating point, and no other part of it; () = all."""


# ---- reading


class Place(NamedTuple):
    """The place of a tensor in a file: ``shape`` numbers of ``dtype`` from byte ``offset`` of ``file``."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Safetensors:
    """The safetensors files of a model folder."""

    config: Mapping[str, Any]
    places: Mapping[str, Place]

    def names(self) -> list[str]:
        return list(self.places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.places[name].shape

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        # Map the file for this read only: pages of a file that stays mapped count as memory of the process.
        place = self.places[name]
        return np.array(np.memmap(place.file, place.dtype, "r", place.offset, place.shape)[index])


def open_source(path: str | Path) -> Source:
    """Open the weights at ``path``: a folder with config.json and safetensors, a GGUF file, or a hub id.

    Raises:
      ValueError: there is neither, a file is missing or truncated, or the weights are pickled.
    """
    path = model_files(path, hub.WEIGHTS)
    if path.is_file() and path.suffix == ".gguf":
        return gguf.open_source(path)
    config = read_config(path)
    return Safetensors(config, _all_places(path, config))


def read_config(path: str | Path) -> dict[str, Any]:
    """Read the config.json of a folder or a hub id, or the config of a GGUF file; the weights are not read.

    Raises:
      ValueError: there is none, or weights beside it have other sizes than it claims.
    """
    path = model_files(path)
    if path.is_file() and path.suffix == ".gguf":
        return dict(open_source(path).config)
    if not path.is_dir():
        raise ValueError(f"{no_such('model folder or GGUF file', path)} A model of the hub is written owner/name")
    config = _json(path / CONFIG)
    if (path / WEIGHTS).is_file() or (path / INDEX).is_file():
        _all_places(path, config)
    return config


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}: it is not the folder of a model")
    return read_object(file)


def _all_places(folder: Path, config: Mapping[str, Any]) -> dict[str, Place]:
    """The tensors of a folder. What config.json and the index claim is compared with the files."""
    places: dict[str, Place] = {}
    for file in _weight_files(folder):
        places |= _places(file)
    for name, file in _weight_map(folder).items():
        if name not in places or places[name].file != folder / file:
            raise ValueError(f"{folder / INDEX}: weight_map has {name} in {file}, where it is not: fetch both again")
    _check_claims(folder / CONFIG, config, places)
    return places


def _weight_map(folder: Path) -> dict[str, str]:
    """The table of an index: tensor -> file of the folder. {} if there is no index."""
    index = folder / INDEX
    if not index.is_file():
        return {}
    names = _json(index).get("weight_map")
    well = isinstance(names, dict) and names
    if not well or not all(isinstance(n, str) and Path(n).name == n not in ("", "..") for n in names.values()):
        raise ValueError(f"{index}: weight_map must name a file of this folder for each tensor")
    return names


def _check_claims(file: Path, config: Mapping[str, Any], places: Mapping[str, Place]) -> None:
    """Check the sizes by which memory is taken before tensors are compared one by one (`check_source`)."""
    layers, embedding = config.get("num_hidden_layers"), places.get("model.embed_tokens.weight")
    if type(layers) is int and layers > len(places):
        raise ValueError(f"{file}: num_hidden_layers is {str(layers)[:40]}, but the files have {len(places):,} tensors")
    if embedding is None or len(embedding.shape) != 2:
        return
    for axis, name in enumerate(("vocab_size", "hidden_size")):
        claimed = config.get(name, embedding.shape[axis])
        if type(claimed) is int and claimed != embedding.shape[axis]:
            raise ValueError(
                f"{file}: {name} is {str(claimed)[:40]}, but model.embed_tokens.weight is {list(embedding.shape)}: one "
                "of them belongs to another model"
            )


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        files = sorted({folder / name for name in _weight_map(folder).values()})
    else:
        files = [folder / WEIGHTS]
    missing = [file.name for file in files if not file.is_file()]
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if missing and pickled:
        raise ValueError(
            f"{folder} has its weights in pickle format ({pickled[0]}), which can run any code and is not read: "
            "convert them with save_pretrained of transformers"
        )
    if missing:
        raise ValueError(f"{folder} has no {missing[0]}: fetch the missing file")
    return files


def _places(file: Path) -> dict[str, Place]:
    """The tensors of a file. The library checks that the file is whole and well formed."""
    try:
        with safe_open(file, "numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or no safetensors file ({error}): fetch it again") from None
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{file}: {name} is {entry['dtype']}, quantized or no number; known: {', '.join(DTYPES)}")
    return {
        name: Place(file, 8 + length + x["data_offsets"][0], tuple(x["shape"]), DTYPES[x["dtype"]])
        for name, x in header.items()
    }


# ---- loading


def check_source(source: Source, slots: list[Slot]) -> None:
    """Check that the source has exactly the tensors of ``slots``, with their shapes.

    Raises:
      ValueError: names the first tensor that is missing, left over or of another shape, and how many there are.
    """
    names, wanted = set(source.names()), {slot.name: slot for slot in slots}
    if missing := [name for name in wanted if name not in names]:
        tie = "; or set tie_word_embeddings, if the head is the embedding" if missing[0] == "lm_head.weight" else ""
        raise ValueError(
            f"tensor {missing[0]} is missing ({len(missing)} of {len(wanted)} are): fetch the whole model, or correct "
            f"its config.json{tie}"
        )
    extra = sorted(name for name in names - set(wanted) if not name.endswith(IGNORED))
    if extra == ["lm_head.weight"]:
        return _check_tied(source)
    if extra:
        raise ValueError(
            f"tensor {extra[0]} has no place in the model of config.json ({len(extra)} such): another architecture, or "
            "a setting of config.json is wrong"
        )
    for slot in slots:
        if source.shape(slot.name) != slot.shape:
            raise ValueError(
                f"tensor {slot.name} is {list(source.shape(slot.name))}, config.json makes it {list(slot.shape)}: one "
                "of them belongs to another model"
            )


def _check_tied(source: Source, *, rows: int = 4096) -> None:
    """Check that a tied head, if the files have one, equals the embedding."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    a, b = (source.shape(name) for name in names)
    blocks = [(slice(i, i + rows),) for i in range(0, a[0], rows)]
    if a != b or not all(np.array_equal(*(source.read(name, block) for name in names)) for block in blocks):
        raise ValueError(
            "tensor lm_head.weight differs from the embedding, to which config.json ties it: set tie_word_embeddings "
            "to false"
        )


def load(source: Source, config: TransformerConfig, mesh: Mesh | None = None) -> Params:
    """Load the parameters of ``source`` in ``config.param_dtype`` onto ``mesh`` (None = the first device).

    Each array is allocated on its devices and filled in place, one tensor at a time; every device gets its own part. So
    the memory of the host holds one tensor at a time (on CPUs, where host and device are the same, the model once).

    Raises:
      ValueError: tensors are missing, left over or of another shape; this is found before any tensor is read.
    """
    slots = tensors(config)
    check_source(source, slots)
    mesh = mesh or make_mesh({"data": 1}, jax.devices()[:1])
    shapes = jax.eval_shape(partial(init, config), jax.random.key(0))
    where = shardings(shapes, mesh)
    params = jax.tree.map(lambda _: None, shapes)
    for slot in slots:
        shape, sharding = (reduce(lambda tree, key: tree[key], slot.path, tree) for tree in (shapes, where))
        part = _part(source, slot, sharding, shape.dtype)
        parent = reduce(lambda tree, key: tree[key], slot.path[:-1], params)
        if slot.ours == shape.shape:
            parent[slot.path[-1]] = part
            continue
        if parent[slot.path[-1]] is None:
            parent[slot.path[-1]] = jnp.zeros(shape.shape, shape.dtype, device=sharding)
        start = tuple(0 if isinstance(at, slice) else at for at in slot.index)
        expand = tuple(i for i, at in enumerate(slot.index) if not isinstance(at, slice))
        # Wait, or parts would be read faster than they are stored, and pile up.
        parent[slot.path[-1]] = jax.block_until_ready(_putting(sharding)(parent[slot.path[-1]], part, start, expand))
    return jax.block_until_ready(params)


@cache
def _putting(sharding: NamedSharding) -> Callable[..., jax.Array]:
    """``(whole, part, start, axes) -> whole``: write the part, widened by ``axes``, at ``start``; in place."""

    def put(whole: jax.Array, part: jax.Array, start: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
        return jax.lax.dynamic_update_slice(whole, jnp.expand_dims(part, axes), start)

    return jax.jit(put, donate_argnums=0, static_argnums=3, out_shardings=sharding)


def _part(source: Source, slot: Slot, whole: NamedSharding, dtype: Any) -> jax.Array:
    """``params[path][index]``, sharded like the whole; each device's part is read from its rows of the tensor."""
    spec = (*whole.spec, *[None] * (len(slot.index) - len(whole.spec)))
    spec = [axis for axis, at in zip(spec, slot.index, strict=True) if isinstance(at, slice)]
    sharding = whole if len(spec) == len(slot.index) else NamedSharding(whole.mesh, PartitionSpec(*spec))

    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = [range(n)[at] for n, at in zip(slot.ours, index, strict=True)]
        theirs = []
        for group in slot.groups:  # the first axis of a group may be cut; those behind it are whole
            inner = int(np.prod([slot.ours[axis] for axis in group[1:]], dtype=np.int64))
            theirs.append(slice(bounds[group[0]].start * inner, bounds[group[0]].stop * inner))
        x = source.read(slot.name, tuple(theirs)).astype(dtype, copy=False)
        x = x.reshape([len(bounds[axis]) for axis in slot.axes])
        return x.transpose(np.argsort(slot.axes))

    return jax.make_array_from_callback(slot.ours, sharding, read)


# ---- export


def export(
    params: Params,
    config: TransformerConfig,
    directory: str | Path,
    *,
    hf_config: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    dtype: str | None = None,
    generation: Mapping[str, Any] | None = None,
    file_bytes: int = FILE_BYTES,
    head: str | None = None,
    pad_id: int | None = None,
) -> None:
    """Write a model folder that ``transformers`` loads: config.json, safetensors, tokenizer.

    Args:
      hf_config: the config.json that the model came with; None = make one from ``config``.
      tokenizer: a tokenizer (its ``save_pretrained`` is called); None = none is written.
      dtype: dtype of the files; None = the one in ``hf_config``, else ``config.param_dtype``. A model that was loaded
        in at least its own precision and not trained is written bit for bit.
      generation: content of generation_config.json, such as the ids that end a text; None = none is written.
      file_bytes: most bytes of a file, which has at least one tensor.
      head: the head of one number ("score" or "value") that takes the place of the vocabulary's, in a
        ``...ForSequenceClassification`` (`jaxpo.policy.families.classifier_to_hf`); None = a language model.
      pad_id: with ``head``: the token that is padding and nothing else; None = there is none.

    Raises:
      ValueError: no known family has the features of ``config``, or no class of transformers such a head.
      FileExistsError: ``directory`` exists already.
    """
    hf_config = dict(config_to_hf(config) if hf_config is None else hf_config)
    dtype = dtype or hf_config.get("dtype") or hf_config.get("torch_dtype") or config.param_dtype
    if dtype not in DTYPES.values():
        raise ValueError(unknown("dtype of an export", dtype, DTYPES.values()))
    hf_config["torch_dtype" if "torch_dtype" in hf_config else "dtype"] = dtype
    slots = tensors(config)
    if head is not None:
        hf_config = classifier_to_hf(hf_config, pad_id, float(params["heads"][head]["bias"]))
        slots = [slot for slot in slots if slot.path != ("head",)] + [score_slot(head, config.width)]
    with new_folder(Path(directory)) as folder:
        (folder / CONFIG).write_text(json.dumps(hf_config, indent=2) + "\n")
        if generation is not None:
            (folder / GENERATION).write_text(json.dumps(dict(generation), indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        _write(params, slots, folder, jnp.dtype(dtype), file_bytes)


def check_out(directory: str | Path) -> None:
    """Raise ``FileExistsError`` if an export would overwrite something."""
    if Path(directory).exists():
        raise FileExistsError(f"{directory} is there already: choose another folder, or remove it")


@contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """A temporary folder next to ``directory`` that is renamed at the end, so ``directory`` is never half written."""
    check_out(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():  # flush to disk before the folder gets its name
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
        temporary.chmod(0o755)  # mkdtemp's folders are for the owner only
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(params: Params, slots: list[Slot], folder: Path, dtype: np.dtype, file_bytes: int) -> None:
    """Write the tensors, one file at a time, and the index if there are several files."""
    sizes = {slot.name: int(np.prod(slot.shape, dtype=np.int64)) * dtype.itemsize for slot in slots}
    files: list[list[Slot]] = [[]]
    for slot in slots:
        if files[-1] and sum(sizes[x.name] for x in files[-1]) + sizes[slot.name] > file_bytes:
            files.append([])
        files[-1].append(slot)
    one = len(files) == 1
    names = [WEIGHTS if one else f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    for name, part in zip(names, files, strict=True):
        save_file({slot.name: _tensor(params, slot, dtype) for slot in part}, folder / name, {"format": "pt"})
        (folder / name).chmod(0o644)
    if not one:
        where = {slot.name: name for name, part in zip(names, files, strict=True) for slot in part}
        index = dict(metadata=dict(total_size=sum(sizes.values())), weight_map=where)
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _tensor(params: Params, slot: Slot, dtype: np.dtype) -> np.ndarray:
    leaf = reduce(lambda tree, key: tree[key], slot.path, params)
    x = np.asarray(leaf[slot.index]).transpose(slot.axes).reshape(slot.shape)
    return np.ascontiguousarray(x.astype(dtype, copy=False))
