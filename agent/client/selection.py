"""Which server, which tunnel a person means; pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from agent.client.api import Server
from agent.client.errors import Misuse
from agent.client.profile import LocalTunnel

ONLINE = "online"


def server_by_name(servers: Sequence[Server], wanted: str) -> Server:
    """The server with this id or name (names in any case); raise Misuse where there is not exactly one."""
    matches = [server for server in servers if server.id == wanted]
    matches = matches or [server for server in servers if server.name.lower() == wanted.lower()]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise Misuse(f"several servers have the name {wanted!r}: use an id of skynetvpn servers")
    raise Misuse(f"there is no server {wanted!r}: skynetvpn servers lists them")


def least_loaded(servers: Sequence[Server]) -> Server | None:
    """The online server with the least load; name and id decide between equals, so that the choice is repeatable."""
    online = [server for server in servers if server.status == ONLINE]
    return min(online, key=_order, default=None)


def _order(server: Server) -> tuple[float, str, str]:
    return (math.inf if server.load is None else server.load, server.name, server.id)


def tunnels_by_name(tunnels: Sequence[LocalTunnel], wanted: str | None) -> list[LocalTunnel]:
    """The local tunnels meant by a connection id, an interface or a server's name; all of them for None."""
    if wanted is None:
        return list(tunnels)
    return [
        tunnel
        for tunnel in tunnels
        if wanted in (tunnel.connection_id, tunnel.interface, tunnel.server_id)
        or wanted.lower() == tunnel.server.lower()
    ]
