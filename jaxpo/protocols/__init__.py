"""Protocols gather the data: host-side hooks around the compiled functions (`jaxpo.protocols.protocol.Protocol`)."""

from jaxpo.protocols import (  # noqa: F401 (their registrations)
    dno,
    dynamic_sampling,
    iterates,
    judged,
    on_policy,
    outer_loop,
    preference_data,
    replay,
    segments,
    single_stream,
)
