"""What a connection's state is called, by its sessions, or by the handshakes that its node has seen."""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum

# A session key is refused after 180 s (WireGuard white paper §6.5), and a peer with traffic renews it every 120 s.
SILENT_AFTER = timedelta(seconds=180)


class Status(StrEnum):
    CONNECTING = "connecting"
    CONNECTED = "connected"
    DISCONNECTED = "disconnected"


def status(ended_at: datetime | None, handshake_at: datetime | None, now: datetime, live: bool | None = None) -> Status:
    """Connecting until the first handshake, disconnected once ended or silent; a silent one that speaks is back.

    `live`: whether a protocol that has sessions has one; None = WireGuard.
    """
    if ended_at is not None:
        return Status.DISCONNECTED
    if handshake_at is None:
        return Status.CONNECTING
    if live is None:
        live = now - handshake_at < SILENT_AFTER
    return Status.CONNECTED if live else Status.DISCONNECTED
