"""What the operator's settings say about all nodes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from shared.addresses import Network


@dataclass(frozen=True, slots=True)
class ProtocolPools:
    """Clients' networks, the same on every node; WireGuard's is beside them."""

    openvpn_ipv4: str = "10.67.0.0/16"
    openvpn_ipv6: str | None = None
    ssh_ipv4: str = "10.68.0.0/16"
    l2tp_ipv4: str = "10.69.0.0/16"


_POOLS = ProtocolPools()


@dataclass(frozen=True, slots=True)
class FleetSettings:
    channel_address: str  # host:port that nodes dial; goes into join tokens
    ipv4_pool: Network
    ipv6_pool: Network | None = None
    wireguard_port: int = 51820
    mtu: int = 1420
    dns: tuple[str, ...] = ()
    pools: ProtocolPools = _POOLS
    join_token_lifetime: timedelta = timedelta(minutes=10)
    certificate_lifetime: timedelta = timedelta(days=30)
    promotion_grace: timedelta = timedelta(minutes=10)  # a host that lost the answer to its first use may fall back
