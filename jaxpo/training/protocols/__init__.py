"""How data is gathered: host-side hooks around the jitted functions (`jaxpo.objectives.Protocol`)."""

from jaxpo.training.protocols import outer_loop, replay, segment, single_stream  # noqa: F401 (their registrations)
from jaxpo.training.protocols.base import NothingLeft, Run, Tools, advance, dynamic_sampling, hapo, on_policy, stacked

__all__ = ["NothingLeft", "Run", "Tools", "advance", "dynamic_sampling", "hapo", "on_policy", "stacked"]
