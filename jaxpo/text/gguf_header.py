"""The header of a GGUF file: its fields, and where its tensors lie. Every size that the file claims is checked against
the file before anything is allocated.

A file is a header (magic, version, how many tensors and fields), the fields (name, type, value), the tensors' names,
shapes, types and offsets, and their numbers. Every count and length is a claim of whoever wrote the file.
"""

import math
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAGIC, VERSIONS = b"GGUF", (2, 3)
NUMBERS = {  # by the number of the type
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"},
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}
STRING, ARRAY = 8, 9
LONGEST_NAME, MOST_AXES, ALIGNMENT = 256, 4, 32
SizeOf = Callable[[int], tuple[int, int] | None]


class Stored(NamedTuple):
    """A tensor in a file.

    shape: its axes, the last one first.
    kind: the number of its type.
    offset, bytes: where it begins in the file, and its size.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int
    bytes: int


class _Walk:
    """A place in a file, which never goes beyond its end."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, n: int, what: str) -> memoryview:
        """The next n bytes."""
        if n > self.left:
            raise ValueError(f"{what} claims {n:,} bytes where {self.left:,} are left")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, form: str, what: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def text(self, what: str) -> str:
        try:
            return str(self.take(self.number("<Q", what), what), "utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{what} is no UTF-8 text") from None

    def name(self, what: str) -> str:
        """A text that can stand in a message."""
        name = self.text(what)
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise ValueError(f"{what} is {name[:40]!a}, which is no name")
        return name

    def value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.text(what)
        if kind == ARRAY:
            return self.array(what)
        if kind not in NUMBERS:
            raise ValueError(f"{what} has the unknown type {kind}")
        return self.numbers(kind, 1, what)[0]

    def numbers(self, kind: int, n: int, what: str) -> list[Any]:
        form = np.dtype(NUMBERS[kind])
        return np.frombuffer(self.take(n * form.itemsize, what), form).tolist()

    def array(self, what: str) -> list[Any]:
        kind, n = self.number("<I", what), self.number("<Q", what)
        if kind in NUMBERS:
            return self.numbers(kind, n, what)
        if kind != STRING:
            raise ValueError(f"{what} is an array of the unknown type {kind}")
        if n > self.left // 8:
            raise ValueError(f"{what} claims {n:,} texts where {self.left:,} bytes are left")
        return [self.text(what) for _ in range(n)]


def read_header(path: Path, size_of: SizeOf) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The fields of a file by name, and its tensors by name, all of which lie inside it.

    Args:
      size_of: number of a type -> (numbers of a block, bytes of a block); None = an unknown type.

    Raises:
      ValueError: what the file claims is not there; the line says what.
    """
    if not path.stat().st_size:
        raise ValueError("it is empty")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        walk = _Walk(memoryview(whole))
        try:
            return _read(walk, size_of)
        finally:
            walk.data.release()


def _read(walk: _Walk, size_of: SizeOf) -> tuple[dict[str, Any], dict[str, Stored]]:
    if bytes(walk.take(4, "the header")) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = walk.number("<I", "the version")
    if version not in VERSIONS:
        raise ValueError(f"version {version} of the format is not known, {' and '.join(map(str, VERSIONS))} are")
    tensors, fields = walk.number("<Q", "the header"), walk.number("<Q", "the header")
    for what, n, least in (("fields", fields, 13), ("tensors", tensors, 24)):
        if n > walk.left // least:
            raise ValueError(f"it claims {n:,} {what} where {walk.left:,} bytes are left")
    found: dict[str, Any] = {}
    for i in range(fields):
        name = walk.name(f"the name of field {i}")
        if name in found:
            raise ValueError(f"the field {name} is there twice")
        found[name] = walk.value(walk.number("<I", f"the field {name}"), f"the field {name}")
    align = found.get("general.alignment", ALIGNMENT)
    if not isinstance(align, int) or not 1 <= align <= 1 << 20 or align & (align - 1):
        raise ValueError(f"general.alignment is {align!r}, which is no power of 2")
    described = [_tensor(walk, i, size_of) for i in range(tensors)]
    start, stored = -(-walk.at // align) * align, {}
    for name, t in described:
        if name in stored:
            raise ValueError(f"the tensor {name} is there twice")
        stored[name] = t._replace(offset=start + t.offset)
        if stored[name].offset + t.bytes > len(walk.data):
            raise ValueError(
                f"the tensor {name} ends at byte {start + t.offset + t.bytes:,}, beyond the end of the file"
            )
    check_places(stored, align)
    return found, stored


def check_places(stored: dict[str, Stored], align: int) -> None:
    """Check that every tensor begins where one may, and none in another. ``ValueError`` names it."""
    end, before = 0, ""
    for name, t in sorted(stored.items(), key=lambda item: item[1].offset):
        if t.offset % align:
            raise ValueError(f"the tensor {name} begins at byte {t.offset:,}, which is no multiple of {align}")
        if t.offset < end:
            raise ValueError(f"the tensor {name} begins within the tensor {before}")
        end, before = t.offset + t.bytes, name


def _tensor(walk: _Walk, i: int, size_of: SizeOf) -> tuple[str, Stored]:
    name = walk.name(f"the name of tensor {i}")
    axes = walk.number("<I", f"the tensor {name}")
    if not 1 <= axes <= MOST_AXES:
        raise ValueError(f"the tensor {name} claims {axes} axes")
    shape = tuple(walk.number("<Q", f"the tensor {name}") for _ in range(axes))
    kind, offset = walk.number("<I", f"the tensor {name}"), walk.number("<Q", f"the tensor {name}")
    if (known := size_of(kind)) is None:
        raise ValueError(f"the tensor {name} has the unknown type {kind}")
    block, size = known
    if min(shape) < 1 or shape[0] % block:
        raise ValueError(f"the tensor {name} claims the shape {shape}, in blocks of {block} numbers")
    return name, Stored(shape, kind, offset, math.prod(shape) // block * size)
