"""Every type of numbers that the gguf package dequantizes is read from a file: the K-quants among them."""

import gguf as library
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from jaxpo.text import gguf


def dequantizable():
    for kind, (block, size) in library.GGML_QUANT_SIZES.items():
        try:
            library.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        yield kind, block, size


KINDS = list(dequantizable())


def test_all_k_quants_are_among_the_types():
    assert {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q5_0", "Q8_0", "BF16"} <= {kind.name for kind, *_ in KINDS}


@pytest.mark.parametrize(("kind", "block", "size"), KINDS, ids=[kind.name for kind, *_ in KINDS])
def test_every_type_of_numbers(tmp_path, kind, block, size):
    rows, columns = 6, 256
    raw = np.random.default_rng(1).integers(0, 256, (rows, columns // block * size), np.uint8)
    if kind in (Kind.F16, Kind.F32):  # the writer has arrays of these, not bytes
        raw = raw.view(np.float16 if kind == Kind.F16 else np.float32)
    writer = library.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=kind)
    for write_ in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write_()
    writer.close()
    file = tmp_path / "x.gguf"
    _, stored = gguf._parse(file, file.stat().st_size)
    source = gguf.GGUF(file, {}, stored, {})
    assert source.shape("x") == (rows, columns)
    with np.errstate(all="ignore"):
        wanted = library.dequantize(raw.view(np.uint8) if kind not in (Kind.F16, Kind.F32) else raw, kind)
        assert np.array_equal(source.read("x"), wanted.astype(np.float32), equal_nan=True)
        assert np.array_equal(source.read("x", (slice(2, 4),)), wanted[2:4].astype(np.float32), equal_nan=True)
