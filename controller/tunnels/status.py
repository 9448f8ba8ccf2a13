"""What a connection's state is called, by the handshakes that its node has seen."""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum

# A session key is refused after 180 s (WireGuard white paper §6.5), and a peer with traffic renews it every 120 s.
SILENT_AFTER = timedelta(seconds=180)


class Status(StrEnum):
    CONNECTING = "connecting"
    CONNECTED = "connected"
    DISCONNECTED = "disconnected"


def status(ended_at: datetime | None, handshake_at: datetime | None, now: datetime) -> Status:
    """Connecting until the first handshake, disconnected once ended or silent; a silent one that speaks is back."""
    if ended_at is not None:
        return Status.DISCONNECTED
    if handshake_at is None:
        return Status.CONNECTING
    return Status.CONNECTED if now - handshake_at < SILENT_AFTER else Status.DISCONNECTED
