"""The server resources that a node gets, and the ports that they take. Pure."""

from __future__ import annotations

from controller.fleet.layers import (
    L2tpSettings,
    Layers,
    OpenVpnSettings,
    Settings,
    SshSettings,
    WireGuardSettings,
)
from controller.fleet.settings import FleetSettings
from controller.fleet.vpnkeys import VpnKeys
from shared.desired import Interface
from shared.resource import InvalidResource, Kind, Protocol
from shared.services import L2tpServer, OpenVpnServer, Server, SshServer

KINDS = {
    Protocol.WIREGUARD: Kind.WIREGUARD_INTERFACE,
    Protocol.OPENVPN: Kind.OPENVPN_SERVER,
    Protocol.SSH: Kind.SSH_SERVER,
    Protocol.L2TP: Kind.L2TP_SERVER,
}
PROTOCOLS = {kind: protocol for protocol, kind in KINDS.items()}
_IPSEC_PORTS = (500, 4500)  # IKE, and IKE with ESP through NAT (RFC 3947)


def interface(fleet: FleetSettings, layers: Layers, node_id: str, name: str, port: int) -> Interface:
    settings = layers.settings(Protocol.WIREGUARD, node_id, fleet)
    assert isinstance(settings, WireGuardSettings)
    pools = [pool for pool in (fleet.ipv4_pool, fleet.ipv6_pool) if pool is not None]
    return Interface(
        name=name,
        listen_port=port,
        addresses=tuple(f"{pool[1]}/{pool.prefixlen}" for pool in pools),
        mtu=settings.mtu,
        masquerade=settings.masquerade,
        isolate=settings.isolate,
    )


def server(fleet: FleetSettings, layers: Layers, keys: VpnKeys, protocol: Protocol, node_id: str) -> Server:
    """The node's server of a protocol beside WireGuard. Raises InvalidResource for what no field's type can say."""
    port, settings = layers.port(protocol, node_id, fleet), layers.settings(protocol, node_id, fleet)
    match settings:
        case OpenVpnSettings():
            return _openvpn(fleet, keys, port, settings)
        case SshSettings():
            return SshServer(
                port=port,
                tcp_forwarding=settings.tcp_forwarding,
                tun=settings.tun,
                ipv4_pool=fleet.pools.ssh_ipv4,
                dns=fleet.dns,
                keepalive=settings.keepalive,
            )
        case L2tpSettings():
            return _l2tp(fleet, port, settings)
        case WireGuardSettings():
            raise ValueError("a WireGuard server is an interface")


def ports_of(protocol: Protocol, port: int, settings: Settings) -> frozenset[tuple[str, int]]:
    """The (transport, port) pairs that the server listens on."""
    match protocol:
        case Protocol.WIREGUARD:
            return frozenset({("udp", port)})
        case Protocol.SSH:
            return frozenset({("tcp", port)})
        case Protocol.L2TP:
            return frozenset(("udp", number) for number in (port, *_IPSEC_PORTS))
        case Protocol.OPENVPN:
            assert isinstance(settings, OpenVpnSettings)
            return frozenset((transport, port) for transport in settings.transports)


def _openvpn(fleet: FleetSettings, keys: VpnKeys, port: int, settings: OpenVpnSettings) -> OpenVpnServer:
    return OpenVpnServer(
        port=port,
        transports=tuple(transport for transport in ("udp", "tcp") if transport in settings.transports),
        ipv4_pool=fleet.pools.openvpn_ipv4,
        ipv6_pool=fleet.pools.openvpn_ipv6,
        dns=settings.dns,
        mtu=settings.mtu,
        keepalive=settings.keepalive,
        max_clients=settings.max_clients,
        masquerade=settings.masquerade,
        isolate=settings.isolate,
        ca=keys.ca,
        tls_crypt=keys.tls_crypt_server_key,
    )


def _l2tp(fleet: FleetSettings, port: int, settings: L2tpSettings) -> L2tpServer:
    if any(":" in address for address in settings.dns):
        raise InvalidResource("L2TP tells its clients IPv4 addresses of DNS servers only (RFC 1877)")
    return L2tpServer(
        port=port,
        psk=settings.psk,
        ipv4_pool=fleet.pools.l2tp_ipv4,
        dns=settings.dns,
        mtu=settings.mtu,
        masquerade=settings.masquerade,
        isolate=settings.isolate,
    )
