"""Paths in a config, as they are typed."""

from ml_collections import ConfigDict

from jaxpo.storage.paths import expanded

FIELDS = ("path", "directory", "init_from", "compilation_cache")  # hold a path, in whatever block they are


def expand_paths(config: ConfigDict) -> ConfigDict:
    """Replace ``~`` by the home folder in every field of a config that holds a path; the config is changed in place.

    Raises:
      ValueError: ``~name`` of a user who is not there.
    """
    with config.unlocked():
        for field, value in config.items():
            if field == "soup":
                value.of = tuple(map(_path, value.of))
            elif field == "references" and isinstance(value, ConfigDict):
                for name, path in value.items():
                    value[name] = _path(path)
            elif isinstance(value, ConfigDict):
                expand_paths(value)
            elif field in FIELDS:
                config[field] = _path(value)
    return config


def _path(value: object) -> object:
    return expanded(value) if isinstance(value, str) and value.startswith("~") else value
