"""How a tunnel of each protocol is brought up here, watched and taken down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol as Port

from agent.client import l2tp, openvpn, ssh, tunnel
from agent.client.api import Api
from agent.client.profile import LocalTunnel
from agent.client.tunnel import Counters
from shared.resource import Protocol


class Means(Port):
    """What the module of a protocol has. All functions raise Failure or DriverError."""

    async def up(
        self, local: LocalTunnel, api: Api, *, routes: bool, save: Callable[[LocalTunnel], None]
    ) -> LocalTunnel:
        """Bring it up, noted down (`save`) before it is there; return the tunnel with what was decided."""
        ...

    async def down(self, local: LocalTunnel) -> None:
        """Take it down with all that was made for it; what is gone already is no error."""
        ...

    async def counters(self, local: LocalTunnel) -> Counters | None:
        """What it has counted, or None where it is not there any more."""
        ...

    async def latency(self, local: LocalTunnel) -> float | None:
        """The round trip to the server in milliseconds, or None where it answers no ping."""
        ...


_MEANS: dict[str, Means] = {
    Protocol.WIREGUARD: tunnel,
    Protocol.OPENVPN: openvpn,
    Protocol.SSH: ssh,
    Protocol.L2TP: l2tp,
}


def of(local: LocalTunnel) -> Means:
    return _MEANS[local.protocol]
