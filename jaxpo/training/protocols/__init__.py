"""How data is gathered: host-side hooks around the jitted functions (`jaxpo.objectives.Protocol`)."""

from jaxpo.training.protocols import iterates, judged, outer_loop, preference_data, replay, segment, single_stream  # noqa: F401 (their registrations)
from jaxpo.training.protocols.base import (
    NothingLeft,
    Run,
    Tools,
    Verdict,
    advance,
    dynamic_sampling,
    hapo,
    on_policy,
    stacked,
)

__all__ = ["NothingLeft", "Run", "Tools", "Verdict", "advance", "dynamic_sampling", "hapo", "on_policy", "stacked"]
