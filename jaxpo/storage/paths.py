"""Paths as users type them: with ``~``, or as the address of a bucket."""

import importlib.util
import os
from pathlib import Path

from etils import epath

from jaxpo.registry import unknown

PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}  # what etils.epath opens an address with


def expanded(path: str | os.PathLike) -> str:
    """The path with the home folder in the place of ``~``.

    Raises:
      ValueError: ``~name`` of a user who is not there.
    """
    path = os.fspath(path)
    out = os.path.expanduser(path)
    if out.startswith("~") and not os.path.lexists(out):
        raise ValueError(f"{path}: there is no home folder of {out.split('/')[0][1:] or 'this user'}")
    return out


def local(path: str | os.PathLike, name: str) -> Path:
    """A folder or file of this machine, ``~`` expanded.

    Args:
      name: of the flag or argument, for the error.

    Raises:
      ValueError: it is the address of a bucket.
    """
    if "://" in os.fspath(path):
        raise ValueError(
            f"{name}: {path} is no local folder, and logs are written to one; set config.checkpoint.directory to it, "
            "where checkpoints are kept"
        )
    return Path(expanded(path))


def located(directory: str | os.PathLike) -> epath.Path:
    """A folder that may be in a bucket, ``~`` expanded.

    Raises:
      ValueError: an unknown kind of address. ModuleNotFoundError: the package that opens it is not installed.
    """
    scheme, colon, _ = os.fspath(directory).partition("://")
    if not colon:
        return epath.Path(expanded(directory))
    if scheme not in PACKAGES:
        raise ValueError(f"{directory}: {unknown('kind of address', scheme, PACKAGES)}")
    if importlib.util.find_spec(PACKAGES[scheme]) is None:
        raise ModuleNotFoundError(f"{directory}: {scheme}:// needs {PACKAGES[scheme]}: pip install {PACKAGES[scheme]}")
    return epath.Path(directory)
