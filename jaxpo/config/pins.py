"""Models and data sets of the hub in a config: each gets the commit hash that it is read at, which the run records."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxpo.hub import Kind, hub_id, pinned

# Fields that may hold a hub id -> what it names there.
PLACES: Mapping[tuple[str, str], Kind] = {
    ("policy", "path"): "model",
    ("tokenizer", "path"): "model",
    ("references", "teacher"): "model",
    ("task", "path"): "dataset",
    ("data", "path"): "dataset",
}


def pin(config: ConfigDict) -> None:
    """Write the commit hash into every hub id of a filled config: ``owner/name`` becomes ``owner/name@hash``.

    A revision that a block gives in a field of its own becomes part of the path.

    Raises:
      ValueError: as for `jaxpo.hub.pinned`, with the field; or a revision of something that is not on the hub.
    """
    for (block, field), kind in PLACES.items():
        path, revision = config[block].get(field), config[block].get("revision")
        if path is None:
            continue
        try:
            found = hub_id(path if revision is None or "@" in str(path) else f"{path}@{revision}")
            if revision is not None and (found is None or "@" in str(path)):
                raise ValueError("the revision is in the path already" if found else "only hub ids have a revision")
            if found is not None:
                config[block][field] = pinned(str(found), kind)
        except ValueError as error:
            raise ValueError(f"config.{block}.{'revision' if revision else field}: {error}") from None
        if revision is not None:
            config[block].revision = None


def keep_pins(config: ConfigDict, held: Mapping[str, Any]) -> None:
    """Give the hub ids of a config that name no revision those of ``held``, the config of the run that goes on."""
    for block, field in PLACES:
        ours, theirs = config[block].get(field), (held.get(block) or {}).get(field)
        found, kept = hub_id(ours), hub_id(theirs)
        if None not in (found, kept) and found.name == kept.name and found.revision is None:
            if config[block].get("revision") is None:
                config[block][field] = theirs
