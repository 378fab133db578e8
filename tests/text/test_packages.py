"""Files of models in packages: located, put together and checked, and never imported."""

import hashlib

import pytest

from jaxpo.text import packages


def test_a_package_is_located_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "a_model_in_a_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds 0 GGUF files, not one: make it"):
        packages.of_package(package.name, "make it")
    (package / "m.gguf").write_bytes(b"")
    assert packages.of_package(package.name, "make it") == package / "m.gguf"
    with pytest.raises(FileNotFoundError, match="the package no_such_model is not installed: make smollm2"):
        packages.of_package("no_such_model", "make smollm2")


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Two packages that hold the parts of a file."""
    monkeypatch.syspath_prepend(tmp_path)
    names = ("half_a_model", "the_other_half")
    for name, text in zip(names, (b"abc", b"def"), strict=True):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')")
        (tmp_path / name / "data" / f"m.gguf.part{name[0]}").write_bytes(text)
    return packages.Parts(names, "data/*.gguf.part*", hashlib.sha256(b"abcdef").hexdigest(), "m.gguf", "make m")


def test_the_parts_of_a_file_are_put_together_once(parts, tmp_path):
    whole = packages.whole_of(parts)
    assert whole == tmp_path / "m.gguf" and whole.read_bytes() == b"abcdef"
    (tmp_path / "half_a_model" / "data" / "m.gguf.parth").unlink()
    assert packages.whole_of(parts) == whole


def test_parts_that_are_not_the_file_are_refused(parts, tmp_path):
    with pytest.raises(ValueError, match="m.gguf: the parts make a file of sha256 .* not 0000"):
        packages.whole_of(parts._replace(sha256="0000"))
    assert not [*tmp_path.glob("m.*")]
    (tmp_path / "the_other_half" / "data" / "m.gguf.partt").unlink()
    with pytest.raises(FileNotFoundError, match="the package the_other_half holds 0 parts, not one: make m"):
        packages.whole_of(parts)
