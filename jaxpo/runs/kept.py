"""What a run keeps of what it began with. So it can be resumed, evaluated, sampled and exported when the model folder
and the data files are gone.

    tokenizer.json    the tokenizer; of a pretrained one all of its files
    model/            config.json and generation_config.json of a pretrained model
    data/FIELD/       copies of the files that config.FIELD names (task.path, data.test_path, ...), if they are small
    data/places.json  where these files were, and how large

The manifest of every checkpoint holds hashes of what the run was trained on, its *origin*: the examples as they were
read, the tokenizer, and the frozen weights of a LoRA run, which are too large to be kept.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxpo.files import read_object
from jaxpo.parallel.distributed import from_first
from jaxpo.policy.hf import CONFIG, GENERATION, read_config
from jaxpo.policy.transformer import Params
from jaxpo.storage.manifest import checksums, differences, is_fixed, named_leaves
from jaxpo.storage.rundir import write_atomically
from jaxpo.tasks import Task
from jaxpo.tasks.preferences.sets import PreferenceSet
from jaxpo.text.tokenizer_files import read_files
from jaxpo.text.tokenizers import PretrainedTokenizer, Tokenizer, from_json

MODEL, DATA, TOKENIZER, CONFIGURATION = "model", "data", "tokenizer.json", "config.json"
PLACES_FILE = f"{DATA}/places.json"
KEPT_BYTES = 10**8  # of data files are copied at most; of larger ones the run knows the place and a hash


# ---- writing


def keep(folder: Path, config: ConfigDict, tokenizer: Tokenizer) -> None:
    """Keep in the run directory what a new run began with, besides its data (`keep_data`)."""
    _save_json(folder / TOKENIZER, tokenizer.to_json())
    if config.policy.name != "pretrained":
        return
    (folder / MODEL).mkdir(exist_ok=True)
    _save_json(folder / MODEL / CONFIG, read_config(config.policy.path))
    generation = Path(config.policy.path) / GENERATION
    if generation.is_file():
        shutil.copyfile(generation, folder / MODEL / GENERATION)


def keep_data(folder: Path, config: ConfigDict) -> None:
    """Copy the files and folders that the config's task and data name into the run directory, if they have at most
    `KEPT_BYTES` in all; else keep only their places and sizes. What the run holds already stays."""
    named = {field: Path(place) for field, place in data_places(config).items() if Path(place).exists()}
    sizes = {field: _bytes_of(place) for field, place in named.items()}
    around = any(place.resolve() in folder.resolve().parents for place in named.values())  # it would hold its own copy
    small, places = sum(sizes.values()) <= KEPT_BYTES and not around, {}
    for field, place in named.items():
        copy = folder / DATA / field / place.name
        if small and copy.resolve() != place.resolve():
            shutil.rmtree(copy.parent, ignore_errors=True)
            copy.parent.mkdir(parents=True)
            (shutil.copytree if place.is_dir() else shutil.copyfile)(place, copy)
        held = str(copy.relative_to(folder)) if small else None
        places[field] = dict(path=str(place.absolute()), bytes=sizes[field], copy=held)
    if places:
        (folder / DATA).mkdir(exist_ok=True)
        _save_json(folder / PLACES_FILE, places)


def _save_json(file: Path, content: Any) -> None:
    write_atomically(file, lambda out: out.write(json.dumps(content, indent=2).encode()))


def _bytes_of(place: Path) -> int:
    files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def data_places(config: ConfigDict) -> dict[str, str]:
    """{"task.path": ...}: the fields of the config's task and data that may name a file or folder."""
    blocks = {name: config[name] for name in ("task", "data")}
    named = {f"{b}.{field}": x for b, block in blocks.items() for field, x in block.items() if field.endswith("path")}
    return {field: str(x) for field, x in named.items() if x}


# ---- reading


def held_config(folder: str | Path) -> dict[str, Any] | None:
    """The config that a run directory holds; None = it holds none."""
    file = Path(folder) / CONFIGURATION
    return read_object(file) if file.is_file() else None


def paths_of(folder: str | Path) -> dict[str, str | None]:
    """{"policy.path": ...}: where the run of a directory found its model."""
    return {"policy.path": held_config(folder)["policy"].get("path")}


def model_config_of(folder: str | Path) -> dict[str, Any] | None:
    """The config.json of the pretrained model that a run started from; None = its policy was made here."""
    return read_config(Path(folder) / MODEL) if (Path(folder) / MODEL).is_dir() else None


def generation_of(folder: str | Path) -> dict[str, Any]:
    """The generation_config.json of that model; {} if it had none."""
    file = Path(folder) / MODEL / GENERATION
    return read_object(file) if file.is_file() else {}


def tokenizer_of(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of a run, in every process; None if the directory (of the first process) holds none."""
    file = Path(folder) / TOKENIZER
    spec = from_first(lambda: read_object(file) if file.is_file() else None)
    return None if spec is None else from_json(spec)


def use_kept(config: ConfigDict, folder: str | Path, *, finished: bool, examples: bool = True) -> dict[str, Any]:
    """Let the fields of a config that name places name what the run in ``folder`` keeps.

    The shape of the model, and the rank of an adapter that the run started from, are always the run's own. A finished
    run reads its data from its own copies; one that is resumed only where the files are gone.

    Args:
      examples: whether data are read at all.

    Returns:
      The fields that were changed, with what they were.

    Raises:
      ValueError: frozen weights of a LoRA run, or data of which the run has no copy, are gone.
    """
    folder, before, held = Path(folder), {}, held_config(folder) or {}

    def change(block: str, field: str, value: Any) -> None:
        before.setdefault(f"{block}.{field}", config[block][field])
        config[block][field] = value

    with config.unlocked():
        lora = held.get("lora", {})
        if config.lora.path and lora.get("path") == config.lora.path:
            change("lora", "path", None)
            for field in ("rank", "alpha", "targets"):
                config.lora[field] = tuple(lora[field]) if field == "targets" else lora[field]
        if config.policy.name == "pretrained" and (config.lora.rank or config.lora.path):
            _check_base_is_there(config.policy.get("path"), folder)
        elif config.policy.name == "pretrained" and (folder / MODEL / CONFIG).is_file():
            change("policy", "path", str(folder / MODEL))
        for field, known in _places(folder).items() if examples else ():
            block, name = field.split(".")
            here = data_places(config).get(field)
            if here is None or (Path(here).exists() and not (finished and known["copy"])):
                continue
            if not known["copy"]:
                raise ValueError(
                    f"config.{field} {here!r} is gone, and the run keeps no copy of so much ({known['bytes']:,} "
                    f"bytes): bring {known['path']} back"
                )
            if not finished:
                print(f"config.{field} {here!r} is gone: the run reads its own copy in {folder / known['copy']}")
            change(block, name, str(folder / known["copy"]))
    return before


def _places(folder: Path) -> dict[str, Any]:
    file = folder / PLACES_FILE
    return read_object(file) if file.is_file() else {}


def _check_base_is_there(path: str | None, folder: Path) -> None:
    if path and not Path(path).exists():
        raise ValueError(
            f"config.policy.path {path!r} is gone: {folder} trains adapters beside these frozen weights, which it does "
            "not keep; bring them back, or name their new place (--config.policy.path, or policy.path in "
            f"{folder / CONFIGURATION})"
        )


# ---- the origin: hashes of what a run was trained on


def fingerprint(task: Task | None, data: PreferenceSet | None) -> dict[str, Any]:
    """How many examples and rows of preferences there are to train on and to test on, and a hash of them in their
    order."""
    parts = [task.train, task.test] if task else []
    parts += [[row._replace(where="") for row in rows] for rows in (data.train, data.test)] if data else []
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}\n".encode())
        for record in part:
            fields = (record.question, record.answer, record.entry) if hasattr(record, "question") else record
            digest.update(_text_of(fields).encode(errors="surrogatepass") + b"\n")
    return dict(rows=[len(part) for part in parts], sha256=digest.hexdigest())


def _text_of(value: Any) -> str:
    """A text that is equal for equal values, in every process; objects that are no data count by their type."""
    try:
        return json.dumps(value, sort_keys=True, default=_plain)
    except (TypeError, ValueError):  # keys that are no texts
        return json.dumps(_plain(value), default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return sorted([repr(k), _text_of(x)] for k, x in value.items())
    if isinstance(value, list | tuple):
        return [_text_of(x) for x in value]
    if isinstance(value, set | frozenset):
        return sorted(map(_text_of, value))
    return value.tolist() if hasattr(value, "tolist") else f"{type(value).__module__}.{type(value).__qualname__}"


def hash_of(content: Any) -> str:
    """A hash of JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def base_hash(base: Params) -> str:
    """A hash of frozen weights as they are computed with, on any mesh. With several processes all must call it."""
    return hash_of(checksums({name: leaf for name, (_, leaf) in named_leaves(base).items()}))


def origin_of(data: Mapping[str, Any], tokenizer: Tokenizer, base: Params | None) -> dict[str, Any]:
    """What a run is trained on, for the manifests of its checkpoints. data: its `fingerprint`."""
    frozen = {} if base is None else {"base": base_hash(base)}
    return {"data": dict(data), "tokenizer": hash_of(tokenizer.to_json()), **frozen}


def check_data(was: Mapping[str, Any] | None, now: Mapping[str, Any], *, workdir: str, other_data: bool) -> None:
    """That a run goes on with the data that it was trained on.

    Args:
      was, now: a `fingerprint`; None = it is not known.
      other_data: whether it may go on with other data, which is then told and not refused.

    Raises:
      ValueError: other data."""
    if was is None or was == now:
        return
    rows = [" + ".join(map(str, x["rows"])) for x in (was, now)]
    found = f"the data are not those that the run was trained on: {rows[0]} rows then, {rows[1]} now"
    found += ", other ones" if rows[0] == rows[1] else ""
    if not other_data:
        copies = [f"--config.{f}={Path(workdir) / x['copy']}" for f, x in _places(Path(workdir)).items() if x["copy"]]
        own = f", with those that it keeps: {' '.join(copies)}" if copies else ""
        raise ValueError(f"{found}; go on with the new ones: --other_data{own}")
    print(f"WARNING: {found}; goes on with them (--other_data)")


def check_origin(was: Mapping[str, Any], now: Mapping[str, Any], workdir: str) -> None:
    """That a run goes on with the tokens and the frozen weights that it was trained on. was, now: an `origin_of`.

    Raises:
      ValueError: with others."""
    if was.get("tokenizer", now["tokenizer"]) != now["tokenizer"]:
        raise ValueError(
            f"the tokenizer is not that of the run, whose tokens have other numbers: bring {workdir}/{TOKENIZER} back"
        )
    if was.get("base", now.get("base")) != now.get("base"):
        raise ValueError(
            f"config.policy.path does not hold the frozen weights beside which {workdir} trained its adapters"
        )


def other_run(config: ConfigDict, workdir: str) -> str | None:
    """Why a config (filled) is of another run than that in ``workdir``: the first field of its policy, objective or
    protocol that has another value; None = it is of this run."""
    for field, was, now in _differences(workdir, config):
        if is_fixed(field):
            return (
                f"config.{field} is {now!r}, but the run in {workdir} has {was!r} and goes on with that; to start "
                f"another run from its parameters: --config.init_from={workdir}"
            )
    return None


def told_differences(workdir: str, config: ConfigDict) -> list[str]:
    """A line for each field in which a run goes on with another config."""
    return [f"config.{field}: {was!r} -> {now!r}" for field, was, now in _differences(workdir, config)]


def _differences(workdir: str, config: ConfigDict) -> list[tuple[str, Any, Any]]:
    held = held_config(workdir)
    return [] if held is None else differences(held, json.loads(json.dumps(config.to_dict())))


def tell_without_effect(config: ConfigDict, workdir: str, before: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Say that a model or adapter at another place, or a tokenizer that has changed at its place, has no effect.

    Args:
      config: of a run that is resumed.
      before: what `use_kept` changed in it.
      tokenizer: of the run.
    """
    held = held_config(workdir)
    for block in ("policy", "lora") if held else ():
        was = held.get(block, {}).get("path")
        now = before.get(f"{block}.path", config[block].get("path"))
        if now != was and not (block == "policy" and config.lora.rank):
            print(f"WARNING: config.{block}.path {now!r} has no effect: the run goes on from its checkpoint")
    place = config.tokenizer.get("path")
    if isinstance(tokenizer, PretrainedTokenizer) and Path(place).is_dir():
        files = read_files(place)
        if changed := sorted(name for name in {*files} - {CONFIG} if files[name] != tokenizer.files.get(name)):
            print(f"WARNING: config.tokenizer.path {place!r}: {changed[0]} has changed; the run keeps what it has")
