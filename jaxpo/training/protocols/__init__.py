"""How data is gathered: host-side hooks around the jitted functions (`jaxpo.objectives.Protocol`)."""

from jaxpo.training.protocols import (  # noqa: F401 (their registrations)
    graded,
    iterates,
    judged,
    outer_loop,
    preference_data,
    replay,
    segment,
    single_stream,
)
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
