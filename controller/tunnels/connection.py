"""A connection as the other rooms and the contracts see it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from controller.tunnels.status import Status


@dataclass(frozen=True, slots=True)
class Connection:
    id: str
    user_id: str
    server_id: str
    protocol: str
    device_id: str | None
    public_key: str | None  # of WireGuard's client
    addresses: tuple[str, ...]  # inside; of other protocols than WireGuard that of a session, where the node tells it
    status: Status
    created_at: datetime
    ended_at: datetime | None
    end_reason: str | None
    handshake_at: datetime | None  # of other protocols than WireGuard: the last sign of life
    rx: int  # bytes from the client
    tx: int  # bytes to the client
    applied: bool | None = None  # whether the node had acknowledged it in time; None = nobody waited
    refusal: str | None = None  # what keeps its client out now, where it is not in
