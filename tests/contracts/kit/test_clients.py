"""Client addresses behind proxies, media types, moments."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from ipaddress import ip_network

import pytest

from controller.contracts.kit import best, rfc3339
from controller.contracts.kit.clients import client_address

PROXIES = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("203.0.113.7", [], "203.0.113.7"),
        ("203.0.113.7", ["1.2.3.4"], "203.0.113.7"),  # a stranger's header is worth nothing
        ("10.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6, 1.2.3.4"], "1.2.3.4"),  # what stands before the proxy's word is invented
        ("10.0.0.1", ["6.6.6.6", "1.2.3.4, 10.0.0.2"], "1.2.3.4"),
        ("10.0.0.1", ["1.2.3.4, nonsense"], "10.0.0.1"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("fd00::1", ["2001:db8::7"], "2001:db8::7"),
        ("::ffff:10.0.0.1", ["::ffff:1.2.3.4"], "1.2.3.4"),
        (None, ["1.2.3.4"], ""),
    ],
)
def test_an_address_is_believed_from_trusted_proxies_only(
    peer: str | None, forwarded: list[str], expected: str
) -> None:
    assert client_address(peer, forwarded, PROXIES) == expected


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "text/plain"),
        ("*/*", "text/plain"),
        ("application/json", "application/json"),
        ("text/*;q=0.2, application/json;q=0.1", "text/plain"),
        ("text/plain;q=0, */*", "application/json"),
        ("image/png", None),
        ("application/json;q=x", None),
    ],
)
def test_the_preferred_media_type_is_chosen(accept: str, expected: str | None) -> None:
    assert best(accept, ["text/plain", "application/json"]) == expected


def test_moments_are_written_in_utc() -> None:
    moment = datetime(2025, 1, 1, 2, 3, 4, 567_890, tzinfo=timezone(timedelta(hours=2)))
    assert rfc3339(moment) == "2025-01-01T00:03:04Z"
    assert rfc3339(moment.astimezone(UTC), "milliseconds") == "2025-01-01T00:03:04.567Z"
