"""The words for a connection's state."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from controller.tunnels.status import Status, status

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("ended_at", "handshake_at", "expected"),
    [
        (None, None, Status.CONNECTING),
        (None, ago(0), Status.CONNECTED),
        (None, ago(179.9), Status.CONNECTED),
        (None, ago(180), Status.DISCONNECTED),
        (ago(1), ago(2), Status.DISCONNECTED),
        (ago(1), None, Status.DISCONNECTED),
    ],
)
def test_status(ended_at: datetime | None, handshake_at: datetime | None, expected: Status) -> None:
    assert status(ended_at, handshake_at, NOW) is expected
