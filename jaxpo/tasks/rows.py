"""Rows of data: records with a place each, from a file, a folder, or a data set of the hub.

``read_rows(path)`` reads what ``path`` is:

  a file      JSON lines (also of any other ending), ``.json`` (a list of objects), ``.csv``, ``.parquet``
  a folder    with such files, or written by ``save_to_disk`` of Hugging Face ``datasets``
  a hub id    ``owner/name``, ``owner/name@revision``: its files of these kinds

Of a folder or a hub id, the files of one subset and one split are read. The README's ``configs`` say which these are;
without them, the names of folders and files do.
"""

import csv
import fnmatch
import importlib
import io
import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from jaxpo.files import no_such, read_json
from jaxpo.hub import dataset_files, hub_id
from jaxpo.registry import unknown

SPLITS = {"train": "train|training", "validation": "validation|valid|val|dev", "test": "test|testing|eval|evaluation"}
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
DESCRIBES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "package.json")
QUIET = 3.0  # seconds before a progress bar appears


class Unreadable(ValueError):
    """A row that is no record: it stands in the record's place, so that the reader can go on."""


class Part(NamedTuple):
    """Rows of one file or split.

    Attributes:
      name: of the file, for messages.
      unit: what its rows are: "line" or "row".
      records: the records; an `Unreadable` stands for one that cannot be read.
      numbers: the number of each row in the file.
    """

    name: str
    unit: str
    records: Sequence[Any]
    numbers: Sequence[int]


class Rows(NamedTuple):
    """The rows of a source. ``name``: for messages; ``parts``: of its files, in order."""

    name: str
    parts: tuple[Part, ...]

    def count(self) -> int:
        """How many rows there are."""
        return sum(len(part.records) for part in self.parts)

    def at(self, i: int) -> Any:
        """The record of row i."""
        for part in self.parts:
            if i < len(part.records):
                return part.records[i]
            i -= len(part.records)
        raise IndexError(i)

    def place(self, i: int) -> str:
        """Where row i stands, for messages."""
        for part in self.parts:
            if i < len(part.records):
                return f"{part.name}, {part.unit} {part.numbers[i]}"
            i -= len(part.records)
        raise IndexError(i)

    def places(self) -> Iterator[tuple[str, str, int, Any]]:
        """(name of the file, unit, number, record) of every row, with a progress bar if it takes long."""
        rows = (
            (part.name, part.unit, number, record)
            for part in self.parts
            for number, record in zip(part.numbers, part.records, strict=True)
        )
        how = dict(desc=self.name, unit=" rows", delay=QUIET, leave=False, disable=None)
        return iter(tqdm(rows, total=self.count(), **how))


class JsonLines(Sequence):
    """The records of JSON lines. The file's bytes are kept, and a line is parsed when it is asked for."""

    def __init__(self, content: bytes):
        self._content, self._starts, self.numbers = content, array("q"), array("q")
        at = 0
        for number, line in enumerate(io.BytesIO(content), start=1):
            if line.strip():
                self._starts.append(at)
                self.numbers.append(number)
            at += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Any:
        start = self._starts[i]
        end = self._content.find(b"\n", start)
        return parsed(self._content[start : None if end < 0 else end])


def parsed(line: bytes) -> Any:
    """The value of a line of JSON, or `Unreadable`."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except RecursionError:
        return Unreadable("not JSON: too many brackets inside each other")
    except ValueError as error:  # not JSON, or not UTF-8
        return Unreadable(f"not JSON: {error}")


def read_rows(path: Any, split: str | None = None, subset: str | None = None) -> Rows:
    """Read the rows at a path: a file, a folder or a hub id.

    Args:
      split: the split of a folder or hub id; None = "train", or all rows where there are no splits.
      subset: its subset; None = the only one, or the one called default or main.

    Raises:
      ValueError: no such subset or split (with the nearest), a file that cannot be read, or as `jaxpo.hub` raises.
      FileNotFoundError: no such file or folder.
      ModuleNotFoundError: Parquet without pyarrow, a folder of ``datasets`` without that library.
    """
    found, choose = hub_id(path), partial(choose_files, split=split, subset=subset)
    if found is not None:
        files = dataset_files(found, partial(choose, str(found)))
        return Rows(str(found), tuple(part for file in files for part in read_file(file)))
    path = Path(path).expanduser()
    if path.is_dir():
        names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
        saved = {"dataset_dict.json", "state.json"} & set(names)
        if saved or not any(is_data(name) for name in names):
            return Rows(str(path), (saved_part(path, split, subset),))
        readme = path / "README.md"
        chosen = choose(str(path), names, readme.read_text() if readme.is_file() else None)
        return Rows(str(path), tuple(part for name in chosen for part in read_file(path / name)))
    if not path.exists():
        raise FileNotFoundError(f"{no_such('data file', path)}; a data set of the hub is written owner/name")
    if split or subset:
        raise ValueError(f"{path} is one file, without splits and subsets: leave split and subset out")
    return Rows(str(path), tuple(read_file(path)))


# ---- files


def read_file(file: Path) -> list[Part]:
    """The rows of a file, by its ending; anything else is read as JSON lines."""
    reader = {".json": json_records, ".csv": csv_records, ".parquet": parquet_records}.get(file.suffix.lower())
    content = None if reader is parquet_records else file.read_bytes()
    if content is not None and content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{file} is in UTF-16: save it as UTF-8")
    if reader is None or reader is json_records and not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        lines = JsonLines(content)
        return [Part(str(file), "line", lines, lines.numbers)]
    records = reader(file)
    return [Part(str(file), "row", records, range(1, len(records) + 1))]


def json_records(file: Path) -> Sequence[Any]:
    """The members of a JSON list."""
    return read_json(file)


def csv_records(file: Path) -> Sequence[Any]:
    """The rows of a CSV file as texts by the names in its first row; `Unreadable` for rows of another length."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.reader(stream, strict=True))
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{file} is no CSV in UTF-8: {error}") from None
    if not rows:
        return []
    names, rows = rows[0], [row for row in rows[1:] if row]
    if len(set(names)) < len(names):
        raise ValueError(f"{file}: its first row names a column twice: {', '.join(names)}")
    wrong = f"found {{}} values, and the first row names {len(names)} columns"
    same = len(names)
    return [dict(zip(names, r, strict=True)) if len(r) == same else Unreadable(wrong.format(len(r))) for r in rows]


class ParquetRecords(Sequence):
    """The rows of a table of pyarrow."""

    def __init__(self, table: Any):
        self._table = table

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, i: int) -> Any:
        return self._table.slice(range(len(self))[i], 1).to_pylist()[0]

    def __iter__(self) -> Iterator[Any]:
        for batch in self._table.to_batches(max_chunksize=1024):
            yield from batch.to_pylist()


def parquet_records(file: Path) -> Sequence[Any]:
    """The rows of a Parquet file."""
    try:
        parquet, errors = importlib.import_module("pyarrow.parquet"), importlib.import_module("pyarrow").ArrowException
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{file} is Parquet, which needs pyarrow: pip install 'jaxpo[data]'") from None
    try:
        return ParquetRecords(parquet.read_table(file))
    except (errors, OSError) as error:
        raise ValueError(f"{file} is no Parquet, or truncated: {str(error).splitlines()[0]}") from None


def saved_part(path: Path, split: str | None, subset: str | None) -> Part:
    """The rows of a folder that ``save_to_disk`` of a ``datasets.Dataset`` or ``DatasetDict`` wrote."""
    try:
        library = importlib.import_module("datasets")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path} is a data set of the library 'datasets', which is not installed: pip install 'jaxpo[datasets]' "
            "or write the rows as JSON lines"
        ) from None
    held = library.load_from_disk(str(path))
    if subset:
        raise ValueError(f"{path} has no subsets: leave subset out")
    if not isinstance(held, Mapping):
        if split:
            raise ValueError(f"{path} has no splits: leave split and test_split out")
        return Part(str(path), "row", held, range(1, len(held) + 1))
    split = split or "train"
    if split not in held:
        raise ValueError(f"{path}: {unknown('split', split, held)}")
    return Part(f"{path}[{split}]", "row", held[split], range(1, len(held[split]) + 1))


# ---- subsets and splits


def choose_files(
    source: str, names: Sequence[str], card: str | None, split: str | None, subset: str | None
) -> list[str]:
    """The data files of one subset and split.

    Args:
      source: what has the files, for messages.
      names: all files, relative to it.
      card: the text of its README; None = it has none.

    Raises:
      ValueError: no data files, an unknown subset or split (with the nearest), or several subsets and none chosen.
    """
    data = [name for name in names if is_data(name)]
    if not data:
        raise ValueError(
            f"{source} has no data files ({', '.join(ENDINGS)}); the hub keeps copies in Parquet of many data sets at "
            "the revision refs/convert/parquet"
        )
    subsets = by_card(card, data) or by_name(data)
    if subset is None:
        named = [s for s in ("default", "main") if s in subsets]
        if len(subsets) > 1 and not named:
            raise ValueError(f"{source} has several subsets: set subset to one of {', '.join(sorted(subsets))}")
        subset = next(iter(subsets)) if len(subsets) == 1 else named[0]
    if subset not in subsets:
        raise ValueError(f"{source}: {unknown('subset', subset, subsets)}")
    splits = subsets[subset]
    if split is None:
        return splits.get("train") or next(iter(splits.values()))
    if split not in splits:
        raise ValueError(f"{source}: {unknown('split', split, splits)}")
    return splits[split]


def is_data(name: str) -> bool:
    """Whether a file of a data set holds rows: by its ending, and none that is hidden or describes the others."""
    hidden = any(part.startswith((".", "_")) for part in Path(name).parts)
    return name.lower().endswith(ENDINGS) and Path(name).name not in DESCRIBES and not hidden


Chosen = dict[str, dict[str, list[str]]]  # subset -> split -> files


def by_card(card: str | None, names: Sequence[str]) -> Chosen:
    """Subsets and splits as the README's front matter gives them under ``configs``; {} if it gives none."""
    found = re.match(r"---\s*\n(.*?)\n---", card or "", re.DOTALL)
    if not found:
        return {}
    yaml = importlib.import_module("yaml")
    try:
        head = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return {}
    out: Chosen = {}
    for config in (head.get("configs") if isinstance(head, dict) else None) or []:
        files = config.get("data_files") or []
        if isinstance(files, dict) and "path" not in files:  # split -> files
            files = [{"split": name, "path": path} for name, path in files.items()]
        entries = files if isinstance(files, list) else [files]
        for entry in entries:
            entry = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
            patterns = entry.get("path", [])
            patterns = [patterns] if isinstance(patterns, str) else patterns
            chosen = [n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in patterns)]
            if chosen:
                out.setdefault(config.get("config_name", "default"), {})[entry.get("split", "train")] = chosen
    return out


def by_name(names: Sequence[str]) -> Chosen:
    """Subsets and splits by the names of files and folders.

    The last part of a path that names a split is it; files that name none are "train". A folder above that is neither a
    split nor called ``data`` is a subset.
    """
    out: Chosen = {}
    for name in names:
        path = Path(name)
        split = next((s for part in reversed(path.parts) if (s := split_in(part))), "train")
        folders = [f for f in path.parts[:-1] if f != "data" and not split_in(f)]
        out.setdefault("/".join(folders) or "default", {}).setdefault(split, []).append(name)
    return out


def split_in(name: str) -> str | None:
    """The split that a part of a path names: ``train-00000-of-00001.parquet`` is of "train"."""
    for split, words in SPLITS.items():
        if re.search(rf"(?<![a-z])({words})(?![a-z])", name.lower()):
            return split
    return None
