"""Models and data sets of the Hugging Face hub, downloaded into the user's cache.

A hub id is ``owner/name`` or ``owner/name@revision``, where no folder ``owner`` is here; with a revision (a branch, a
tag or a commit hash) it is always one. ``pinned`` replaces the revision by its commit hash, which a run records.

``huggingface_hub`` does the work: it keeps the cache, and reads ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_HOME`` and
the user's token from the environment. The token is never read here.
"""

import errno
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

Kind = Literal["model", "dataset"]
ID = re.compile(r"([\w.-]+)/([\w.-]+)(?:@([\w./-]+))?")
COMMIT = re.compile("[0-9a-f]{40}")
TEXTS = ("*.json", "*.jinja", "*.txt", "tokenizer.model")  # config, tokenizer and chat template of a model
WEIGHTS = (*TEXTS, "*.safetensors")
IGNORED = ("*/*", "consolidated*")  # other formats of the same weights


class HubId(NamedTuple):
    """A repository of the hub; ``revision`` None = its default branch."""

    name: str
    revision: str | None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def hub_id(path: object) -> HubId | None:
    """The hub id that ``path`` is; None if it is a place on this machine."""
    found = ID.fullmatch(str(path))
    if found is None or Path(str(path)).exists():
        return None
    owner, name, revision = found.groups()
    local = owner in (".", "..") or revision is None and Path(owner).is_dir()
    return None if local else HubId(f"{owner}/{name}", revision)


def pinned(path: str, kind: Kind = "model") -> str:
    """A hub id with the commit hash of its revision; any other path as it is.

    Raises:
      ValueError: no such repository or revision, no access to it, or no network and nothing in the cache.
    """
    found = hub_id(path)
    if found is None or found.revision is not None and COMMIT.fullmatch(found.revision):
        return path
    return str(found._replace(revision=_commit(found, kind)))


def model_files(path: str | Path, patterns: Sequence[str] = TEXTS) -> Path:
    """The folder with a model's files: ``path`` itself, or a snapshot of a hub id with the files of ``patterns``.

    Raises:
      ValueError: as for `pinned`.
    """
    found = hub_id(path)
    return Path(path).expanduser() if found is None else _snapshot(found, "model", tuple(patterns), IGNORED)


def dataset_files(found: HubId, choose: Callable[[Sequence[str], str | None], Sequence[str]]) -> list[Path]:
    """Files of a data set of the hub.

    Args:
      choose: (names of all files, text of the README or None) -> names of the files to download.

    Raises:
      ValueError: as for `pinned`, and what ``choose`` raises.
    """
    pin = found._replace(revision=_commit(found, "dataset"))
    names = _names(pin)
    card = (_snapshot(pin, "dataset", ("README.md",)) / "README.md").read_text() if "README.md" in names else None
    wanted = choose(names, card)
    escaped = tuple(re.sub(r"([*?[])", r"[\1]", name) for name in wanted)
    folder = _snapshot(pin, "dataset", escaped)
    return [folder / name for name in wanted]


# ---- the library, and its errors as one line each


def _commit(found: HubId, kind: Kind) -> str:
    if found.revision is not None and COMMIT.fullmatch(found.revision):
        return found.revision
    return _asked(found, kind, lambda api: _resolved(api, found, kind))


def _resolved(api: Any, found: HubId, kind: Kind) -> str:
    return api.resolve_revision(found.name, repo_type=kind, revision=found.revision).resolved


@cache
def _names(pin: HubId) -> tuple[str, ...]:
    """The names of all files of a data set; without a network, of those in the cache."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        folder = _asked(
            pin,
            "dataset",
            lambda api: api.snapshot_download(pin.name, repo_type="dataset", revision=pin.revision, allow_patterns=[]),
        )
        return tuple(sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()))
    return tuple(
        _asked(pin, "dataset", lambda api: api.list_repo_files(pin.name, repo_type="dataset", revision=pin.revision))
    )


@cache
def _snapshot(found: HubId, kind: Kind, patterns: tuple[str, ...], ignored: tuple[str, ...] = ()) -> Path:
    def download(api: Any) -> str:
        return api.snapshot_download(
            found.name,
            repo_type=kind,
            revision=_resolved(api, found, kind),
            allow_patterns=list(patterns),
            ignore_patterns=list(ignored),
        )

    return Path(_asked(found, kind, download))


def _asked(found: HubId, kind: Kind, ask: Callable[[Any], Any]) -> Any:
    """The answer of the hub; ``ValueError`` of one line if it gives none."""
    from huggingface_hub import HfApi, constants, errors

    what, where = f"{kind.replace('dataset', 'data set')} {str(found)!r}", constants.ENDPOINT
    try:
        return ask(HfApi())
    except errors.GatedRepoError:
        line = f"is gated at {where}: ask for access on its page, then `hf auth login` or set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        line = f"does not exist at {where}, or is private: correct the name, or `hf auth login` and set HF_TOKEN"
    except errors.RevisionNotFoundError:
        line = f"has no revision {found.revision!r} at {where}: name a branch, a tag or a whole commit hash"
    except errors.HFValidationError:
        line = "is no name of a repository: it is written owner/name"
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no status")
        reason = "refuses access to it: `hf auth login` or set HF_TOKEN" if status in (401, 403) else "try again later"
        line = f"cannot be fetched: {where} answers with {status}; {reason}"
    except (errors.RevisionResolutionError, errors.EntryNotFoundError, OSError) as error:
        if constants.is_offline_mode():
            reason = "HF_HUB_OFFLINE is set: unset it, or download it first"
        elif _full(error):
            reason = f"{error.strerror}: make room, or set HF_HOME to another folder"
        else:
            reason = f"{where} cannot be reached: check the network and HF_ENDPOINT"
        line = f"is not in the cache ({constants.HF_HUB_CACHE}), and {reason}"
    except Exception as error:  # errors of the library's HTTP client, which are of no class that Python knows
        if not type(error).__module__.startswith("httpx"):
            raise
        line = f"cannot be fetched: {where} cannot be reached ({type(error).__name__}): check the network"
    raise ValueError(f"{what} {line}")


def _full(error: BaseException) -> bool:
    """Whether the machine refused to write (no room, no permission), rather than the network to answer."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT)
