"""Domain values in the words of the contract `skynet`; pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from controller.accounts.service import User
from controller.contracts.kit import Failure, rfc3339
from controller.fleet.directory import Server
from controller.tunnels.connection import Connection


def error(failure: Failure) -> dict[str, Any]:
    return {"error": failure.message, "code": failure.status}


def servers(found: Sequence[Server]) -> list[dict[str, Any]]:
    return [
        {"id": server.id, "name": server.name, "country": server.country, "ip": server.host, "status": server.status}
        for server in found
    ]


def server(found: Server) -> dict[str, Any]:
    return {
        "id": found.id,
        "name": found.name,
        "country": found.country,
        "ip": found.host,
        "status": found.status,
        "load": found.load,
    }


def connection(found: Connection) -> dict[str, Any]:
    return {
        "connection_id": found.id,
        "server_id": found.server_id,
        "status": found.status,
        "created_at": rfc3339(found.created_at),
    }


def started(found: Connection) -> dict[str, Any]:
    """A creation says `connecting`, whatever a quick client has done since."""
    return connection(found) | {"status": "connecting"}


def live_connection(found: Connection) -> dict[str, Any]:
    return connection(found) | {
        "protocol": found.protocol,
        "addresses": found.addresses,
        "rx": found.rx,
        "tx": found.tx,
        "latest_handshake": rfc3339(found.handshake_at) if found.handshake_at is not None else None,
        "refusal": found.refusal,
    }


def profile(user: User) -> dict[str, Any]:
    return _user(user) | {"created_at": rfc3339(user.created_at)}


def profile_changed(user: User) -> dict[str, Any]:
    return _user(user) | {"updated_at": rfc3339(user.updated_at)}


def _user(user: User) -> dict[str, Any]:
    return {"id": user.id, "username": user.username, "email": user.email, "plan": user.plan}
