"""GGUF files that claim what is not there, or whose vocabularies contradict themselves: one line, before anything is
allocated."""

import struct
import time
import tracemalloc

import gguf as library
import numpy as np
import pytest

from jaxpo.text import gguf
from jaxpo.text.gguf_vocabulary import gguf_tokenizer
from tests.policy import tiny_gguf

HUGE = 2**61


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    tiny_gguf.write(path)
    return path.read_bytes()


def text(s: str) -> bytes:
    return struct.pack("<Q", len(s)) + s.encode()


def header(*fields: bytes, tensors: list[bytes] = (), claims: tuple[int | None, int | None] = (None, None)) -> bytes:
    """A file of these fields and tensors, or one that claims other numbers of them."""
    n = [len(tensors), len(fields)]
    n = [given if claim is None else claim for given, claim in zip(n, claims, strict=True)]
    return b"GGUF" + struct.pack("<IQQ", 3, *n) + b"".join(fields) + b"".join(tensors)


def field(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)


LIES = {
    "tensors": (header(claims=(HUGE, 0)), "claims .* tensors where"),
    "fields": (header(claims=(0, HUGE)), "claims .* fields where"),
    "a name": (header(struct.pack("<Q", HUGE), b"x" * 40), "the name of field 0 claims"),
    "a text": (header(field("a", 8, struct.pack("<Q", HUGE))), "the field a claims"),
    "numbers": (header(field("a", 9, struct.pack("<IQ", 4, HUGE))), "the field a claims"),
    "texts": (header(field("a", 9, struct.pack("<IQ", 8, HUGE))), "the field a claims .* texts"),
    "nested": (header(field("a", 9, struct.pack("<IQ", 9, 1))), "the field a is an array of the unknown type 9"),
    "type": (header(field("a", 77, b"x" * 40)), "the field a has the unknown type 77"),
    "twice": (header(field("a", 0, b"1"), field("a", 0, b"1")), "the field a is there twice"),
    "alignment": (header(field("general.alignment", 4, struct.pack("<I", 3))), "alignment is 3, which is no power"),
    "axes": (header(tensors=[text("w") + struct.pack("<I", 9) + b"x" * 40]), "the tensor w claims 9 axes"),
    "shape": (header(tensors=[tensor("w", (HUGE, HUGE))]), "the tensor w ends at byte .*, beyond the end"),
    "no rows": (header(tensors=[tensor("w", (4, 0))]), r"the tensor w claims the shape \(4, 0\)"),
    "blocks": (header(tensors=[tensor("w", (33,), 8)]), r"the tensor w claims the shape \(33,\), in blocks of 32"),
    "kind": (header(tensors=[tensor("w", (4,), 999)]), "the tensor w has the unknown type 999"),
    "offset": (header(tensors=[tensor("w", (4,), 0, HUGE)]), "the tensor w ends at byte .*, beyond the end"),
    "same name": (header(tensors=[tensor("w", (4,)), tensor("w", (4,))]), "the tensor w (is there twice|ends at)"),
    "magic": (b"GGML" + b"\0" * 60, "does not begin with GGUF"),
    "version": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1 of the format is not known"),
    "other order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version .* of the format is not known"),
    "empty": (b"", "it is empty"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_size_that_is_claimed_is_checked_before_anything_is_allocated(lie, tmp_path):
    data, message = LIES[lie]
    path = tmp_path / "lie.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        gguf.open_source(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(error.value) and "lie.gguf" in str(error.value)
    assert peak < 1 << 20 and time.monotonic() - start < 1


def test_one_changed_byte_never_gives_a_traceback(whole, tmp_path):
    """Every kind of damage in the header is one line or a file that is still one."""
    path = tmp_path / "changed.gguf"
    rng = np.random.default_rng(0)
    for at in [*range(24), *rng.integers(24, 4000, 150).tolist()]:
        data = bytearray(whole)
        data[at] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        try:
            gguf.open_source(path)
            gguf_tokenizer(path)
        except ValueError as error:
            assert "\n" not in str(error) and "changed.gguf" in str(error), at


def written(path, change, **options):
    """The tiny file after ``change(writer's fields)``."""
    kept = library.GGUFWriter.write_kv_data_to_file

    def changed(writer):
        change(writer)
        return kept(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library.GGUFWriter, "write_kv_data_to_file", changed)
        tiny_gguf.write(path, **options)


def replaced(**fields):
    """Replace values of ``tokenizer.ggml.*``; None takes the field away."""

    def change(writer):
        for name, value in fields.items():
            key = f"tokenizer.ggml.{name}"
            if value is None:
                del writer.kv_data[0][key]
            else:
                writer.kv_data[0][key].value = value

    return change


N = len(tiny_gguf.vocabulary())
BROKEN = {
    "a merge of tokens that are not there": (dict(merges=["zz yy"]), "tokenizer.ggml.merges holds 'zz yy'"),
    "a merge of one": (dict(merges=["Ġt"]), "tokenizer.ggml.merges holds 'Ġt'"),
    "eos beyond": (dict(eos_token_id=N), f"tokenizer.ggml.eos_token_id is {N}, and there are {N} tokens"),
    "pad beyond": (dict(padding_token_id=10**9), "tokenizer.ggml.padding_token_id is 1000000000"),
    "no tokens": (dict(tokens=None), "tokenizer.ggml.tokens is missing"),
    "no merges": (dict(merges=None), "tokenizer.ggml.merges is missing"),
    "fewer kinds": (dict(token_type=[1, 2]), f"tokenizer.ggml.token_type has 2 entries for {N} tokens"),
    "a token twice": (dict(tokens=["a"] * N), "tokenizer.ggml.tokens holds 'a' twice"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_vocabulary_that_contradicts_itself_is_told_by_its_field(name, tmp_path):
    fields, message = BROKEN[name]
    path = tmp_path / "broken.gguf"
    count = {"tokens": -1, "merges": -1}
    with pytest.MonkeyPatch.context() as patch:
        gone = [k for k, v in fields.items() if v is None and k in count]
        header_of = library.GGUFWriter.write_header_to_file

        def fewer(writer, *args):
            for key in gone:
                writer.kv_data[0].pop(f"tokenizer.ggml.{key}")
            return header_of(writer, *args)

        patch.setattr(library.GGUFWriter, "write_header_to_file", fewer)
        written(path, replaced(**{k: v for k, v in fields.items() if v is not None}))
    with pytest.raises(ValueError, match=message) as error:
        gguf_tokenizer(path)
    assert "\n" not in str(error.value) and "broken.gguf" in str(error.value)
