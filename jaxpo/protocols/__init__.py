"""Protocols gather the data: host-side hooks around the compiled functions (`jaxpo.protocols.protocol.Protocol`)."""

from jaxpo.protocols import (  # noqa: F401 (their registrations)
    demonstrations,
    dno,
    dynamic_sampling,
    flaws,
    hints,
    iterates,
    judged,
    on_policy,
    outer_loop,
    preference_data,
    repair,
    replay,
    segments,
    single_stream,
)
