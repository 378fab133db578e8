"""Whose run is it? A run directory is data, but its config may name code: modules to import, functions to call.

Such names are used only if this user has written them. A run that this user trains is signed: `sign` puts a code
(HMAC-SHA256) of the names into the folder, made with a key that lies in the user's own state folder. `check` makes it
again. So one's own runs can be moved, copied and opened without a question, a run that came from elsewhere is refused,
and so is one whose names were changed. What has to be kept is one key, not a list of runs.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

FUNCTIONS = ("reward", "embed")  # fields of a task, at any depth, that may name a function
NAMED = re.compile(r"[\w.]+:[\w.]+")  # an option of a protocol that names a function
SIGNATURE = "signature.json"  # in a run directory
FLAG = {"trust": (False, "use the code that a run from elsewhere names: read it before")}
_answer = {"trust": False}  # of this process, as its command line says


def trust_runs(yes: bool) -> None:
    """Say whether this process may run code that runs from elsewhere name (``--trust``)."""
    _answer["trust"] = bool(yes)


def code_named(config: Mapping[str, Any]) -> list[str]:
    """The code that a config names: its imports, and functions given as "module:function"."""
    judge = config.get("judge") or {}
    judge = judge.get("path") if judge.get("name") == "function" else None
    protocol = [x for x in (config.get("protocol") or {}).values() if isinstance(x, str) and NAMED.fullmatch(x)]
    functions = [config.get("trace"), judge, *protocol, *_of_rewards(config.get("task") or {})]
    imports = config.get("imports") or ()
    imports = [imports] if isinstance(imports, str) else list(imports)
    return sorted({*map(str, imports), *(f for f in functions if isinstance(f, str) and ":" in f)})


def _of_rewards(block: Mapping[str, Any]) -> Iterator[Any]:
    """What may be a function in a block of rewards and their options; a reward without a field ``reward`` is called
    by its name."""
    for field, value in block.items():
        if field in FUNCTIONS:
            yield value
        if isinstance(value, Mapping | ConfigDict):
            yield from value
            yield from _of_rewards(value)


def key_file() -> Path:
    """Where this user's key lies."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "jaxpo" / "key"


def _key(make: bool) -> bytes | None:
    """The key; None if there is none, and it is not to be made or cannot be."""
    file = key_file()
    try:
        if make and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            own = file.with_name(f"key.{secrets.token_hex(8)}")
            own.touch(mode=0o600)
            own.write_text(secrets.token_hex(32))
            try:
                os.link(own, file)  # fails if another process was faster: its key counts
            except FileExistsError:
                pass
            finally:
                own.unlink()
        return file.read_text().encode()
    except OSError:
        return None


def _code(key: bytes, names: list[str]) -> str:
    return hmac.new(key, json.dumps(names).encode(), hashlib.sha256).hexdigest()


def signature(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `check` wants to find in the folder of a run of this user; None if the config names no code.

    Raises:
      OSError: there is no key, and none can be written."""
    names = code_named(config)
    if not names:
        return None
    key = _key(make=True)
    if not key:
        raise OSError(f"{key_file()}: cannot be written: set XDG_STATE_HOME to a folder that can")
    return {"code": names, "signature": _code(key, names)}


def check(folder: str | os.PathLike, config: ConfigDict | Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if a run names code, unless this user wrote it or the command line says ``--trust``."""
    names, file = code_named(config), Path(folder) / SIGNATURE
    if not names or _answer["trust"]:
        return
    try:
        said, key = json.loads(file.read_text())["signature"], _key(make=False)
        own = key is not None and hmac.compare_digest(str(said), _code(key, names))
    except (OSError, ValueError, KeyError, TypeError):
        own = False
    if not own:
        raise ValueError(
            f"{Path(folder) / 'config.json'} names code that would run: {', '.join(names)}; you did not write this run "
            "(or its names were changed): read that code, then add --trust"
        )
