"""Paths as users type them."""

import importlib.util

import pytest

from jaxpo.storage.checkpoint import finished_steps
from jaxpo.storage.paths import expanded, local, located


def test_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/a") == f"{tmp_path}/a" and local("~/a", "out") == tmp_path / "a"
    assert str(located("~/a")) == f"{tmp_path}/a" and expanded("a~/~") == "a~/~"


def test_an_address_is_no_local_folder():
    with pytest.raises(
        ValueError, match="workdir: gs://b/run is no local folder.* set config.checkpoint.directory to it"
    ):
        local("gs://b/run", "workdir")


@pytest.mark.parametrize(("scheme", "package"), (("gs", "gcsfs"), ("s3", "s3fs"), ("az", "adlfs")))
def test_an_address_whose_package_is_missing_names_it(monkeypatch, scheme, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=f"{scheme}:// needs {package}: pip install {package}"):
        finished_steps(f"{scheme}://bucket/run")


def test_an_unknown_kind_of_address_names_the_nearest():
    with pytest.raises(ValueError, match="unknown kind of address 'gcs': did you mean 'gs'"):
        located("gcs://bucket/run")
