"""Domain values in the words of the contract `irssh`; pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from controller.access.members import Member
from controller.accounts.service import User
from controller.contracts.kit import Failure, rfc3339
from controller.fleet.protocols import ProtocolState
from controller.usage.sessions import Session
from shared.protocol import Load

_WORDS = {  # as documented, whatever the reason
    401: "Invalid credentials",
    403: "Not enough permissions",
    404: "Resource not found",
    500: "Internal server error",
}


def error(failure: Failure) -> dict[str, Any]:
    return {"detail": _WORDS.get(failure.status, failure.message)}


def user(found: User) -> dict[str, Any]:
    return {
        "id": found.number,
        "username": found.username,
        "email": found.email,
        "active": found.active,
        "created_at": rfc3339(found.created_at),
    }


def created(member: Member) -> dict[str, Any]:
    return user(member.user) | {"protocols": member.protocols}


def member(found: Member) -> dict[str, Any]:
    limits = found.limits
    return created(found) | {
        "quota_bytes": limits.quota_bytes,
        "quota_period": limits.quota_period,
        "used_bytes": limits.used_bytes,
        "expires_at": rfc3339(limits.expires_at) if limits.expires_at is not None else None,
        "max_sessions": limits.max_sessions,
        "rate_up": limits.rate_up,
        "rate_down": limits.rate_down,
    }


def protocol(state: ProtocolState, active_users: Mapping[str, int]) -> dict[str, Any]:
    return {
        "name": state.name,
        "status": state.status,
        "port": state.port,
        "active_users": active_users.get(state.name, 0),
    }


def configured(state: ProtocolState, active_users: Mapping[str, int]) -> dict[str, Any]:
    return protocol(state, active_users) | {"settings": state.settings}


def system_metrics(loads: Sequence[Load]) -> dict[str, Any]:
    """The mean of the nodes that are online; zeros where none is."""
    return {
        "cpu_usage": _mean([load.cpu for load in loads]),
        "memory_usage": _mean([load.memory for load in loads]),
        "disk_usage": _mean([load.disk for load in loads]),
        "network_stats": {
            "in": _mean([load.rx_rate for load in loads]),
            "out": _mean([load.tx_rate for load in loads]),
        },
    }


def active(sessions: Sequence[Session], usernames: Mapping[str, str]) -> dict[str, Any]:
    known = [session for session in sessions if session.user_id in usernames]
    return {
        "total_users": len(usernames),
        "active_users": len({session.user_id for session in known}),
        "connections": [
            {
                "username": usernames[session.user_id],
                "protocol": session.protocol,
                "connected_since": rfc3339(session.started_at),
                "ip_address": _host(session.remote),
            }
            for session in sorted(known, key=lambda session: session.started_at)
        ],
    }


def _host(remote: str) -> str:
    """`host:port` or `[v6]:port` without the port."""
    return remote.rpartition(":")[0].removeprefix("[").removesuffix("]")


def _mean(values: Collection[float]) -> float:
    return round(sum(values) / len(values), 2) if values else 0.0
