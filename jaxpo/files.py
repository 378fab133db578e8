"""Reading of files whose errors name them."""

import difflib
import json
from pathlib import Path
from typing import Any


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
      ValueError: it is no JSON; the line names the file.
      OSError: it cannot be read.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): it may be truncated") from None


def read_object(path: str | Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object.

    Raises:
      ValueError: it is no JSON, or something else; the line names the file.
      OSError: it cannot be read.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object: it may be another file, fetch it again")
    return found


def no_such(what: str, path: str | Path) -> str:
    """The message for a path where nothing is: it names at most three things beside it with the nearest names."""
    path = Path(path)
    names = {entry.name for entry in path.parent.iterdir()} if path.parent.is_dir() else set()
    near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)]
    hint = f": did you mean {' or '.join(map(repr, near))}?" if near else ": there is nothing of a similar name"
    if not path.parent.is_dir():
        hint = f": there is no folder {str(path.parent)!r}"
    return f"unknown {what} {str(path)!r}{hint}"
