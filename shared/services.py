"""The servers of a node beside WireGuard, as the controller wants them; one of each protocol at most."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, ip_network
from typing import NamedTuple

import msgspec

from shared.access import MAX_TUNNEL, check_chap_secret
from shared.addresses import InvalidAddress, check_name_server
from shared.resource import InvalidResource, Kind, Protocol, check_port, resource_hash

L2TP_PORT = 1701  # RFC 2661; no client asks for another
# sshd opens the device `tunN` that its client asks for: ours are far from the numbers that others begin with.
_TUN_NUMBERS = 1_900_000_000
TUN_PREFIX = f"tun{_TUN_NUMBERS // (MAX_TUNNEL + 1)}"  # what the names of all of them begin with


class OpenVpnServer(msgspec.Struct, frozen=True, kw_only=True):
    """OpenVPN on one port, by UDP and TCP. Its key is not here: the node made it, and has a certificate for it."""

    port: int
    transports: tuple[str, ...] = ("udp", "tcp")  # a process each; UDP has the lower half of the pools, TCP the upper
    ipv4_pool: str  # the servers have the first address of their half
    ipv6_pool: str | None = None
    dns: tuple[str, ...] = ()
    mtu: int = 1420  # of the tunnel
    keepalive: int = 10  # seconds between two pings; six of them lost end the session
    max_clients: int = 1024  # of each transport
    masquerade: bool = True
    isolate: bool = True
    ca: str  # PEM: who signs client certificates
    tls_crypt: str  # PEM of the tls-crypt-v2 server key

    @property
    def key(self) -> str:
        return Protocol.OPENVPN

    def check(self) -> None:
        check_port(self.port)
        if not self.transports or not set(self.transports) <= {"udp", "tcp"}:
            raise InvalidResource("transports are one or both of udp and tcp")
        _check_pool(self.ipv4_pool, 4, 28)
        if self.ipv6_pool is not None:
            _check_pool(self.ipv6_pool, 6, 123)
        _check_dns(self.dns)
        _check_range("mtu", self.mtu, 1280, 9000)
        _check_range("keepalive", self.keepalive, 1, 3600)
        _check_range("max_clients", self.max_clients, 1, 65535)
        _check_pem("ca", self.ca, "CERTIFICATE")
        _check_pem("tls_crypt", self.tls_crypt, "OpenVPN tls-crypt-v2 server key")

    def digest(self) -> int:
        return resource_hash(Kind.OPENVPN_SERVER, msgspec.to_builtins(self))

    def __repr__(self) -> str:
        return f"OpenVpnServer(port={self.port}, transports={self.transports})"


class SshTunnel(NamedTuple):
    """A login's tun device on the node, and the addresses at its ends; those of the server's ends are all the same."""

    number: int  # N of its name tunN, and of the client's `ssh -w any:N`
    server: IPv4Address
    client: IPv4Address

    @property
    def device(self) -> str:
        return f"tun{self.number}"


class SshServer(msgspec.Struct, frozen=True, kw_only=True):
    """A second sshd, for tunnels only. Its host keys are not here: the node made them."""

    port: int
    tcp_forwarding: bool = True
    tun: bool = False  # tun devices (ssh -w)
    ipv4_pool: str  # of the tun devices
    dns: tuple[str, ...] = ()
    keepalive: int = 15  # seconds; three without an answer end the session

    @property
    def key(self) -> str:
        return Protocol.SSH

    def check(self) -> None:
        check_port(self.port)
        if not self.tcp_forwarding and not self.tun:
            raise InvalidResource(
                "an SSH server for tunnels forwards TCP or has tun devices: without tcp_forwarding and tun it would do "
                "nothing"
            )
        _check_pool(self.ipv4_pool, 4, 28)
        _check_dns(self.dns)
        _check_range("keepalive", self.keepalive, 1, 3600)

    def digest(self) -> int:
        return resource_hash(Kind.SSH_SERVER, msgspec.to_builtins(self))

    def tunnel(self, number: int) -> SshTunnel | None:
        """That of the login with this number; None where it has none: tun is off, or the pool is too small."""
        if not self.tun or not 0 < number <= self.most_tunnels():
            return None
        pool = IPv4Network(self.ipv4_pool)
        return SshTunnel(_TUN_NUMBERS + number, server=pool[1], client=pool[number + 1])

    def tunnel_of(self, device: str) -> SshTunnel | None:
        """That of the device with this name."""
        number = device.removeprefix("tun")
        return self.tunnel(int(number) - _TUN_NUMBERS) if number.isdecimal() else None

    def most_tunnels(self) -> int:
        """The largest number that the pool has an address for."""
        return most_tunnels(self.ipv4_pool)


def most_tunnels(ipv4_pool: str) -> int:
    """The largest number of an SSH login that the pool has an address for."""
    return min(IPv4Network(ipv4_pool).num_addresses - 3, MAX_TUNNEL)


class L2tpServer(msgspec.Struct, frozen=True, kw_only=True):
    """L2TP over IPsec with a pre-shared key (RFC 3193)."""

    port: int = L2TP_PORT
    psk: str
    ipv4_pool: str  # the server has its first address
    dns: tuple[str, ...] = ()
    mtu: int = 1400
    masquerade: bool = True
    isolate: bool = True

    @property
    def key(self) -> str:
        return Protocol.L2TP

    def check(self) -> None:
        if self.port != L2TP_PORT:
            raise InvalidResource(f"L2TP clients know port {L2TP_PORT} only")
        if len(self.psk) < 8 or not check_chap_secret(self.psk):
            raise InvalidResource("a pre-shared key is 8 to 255 printable ASCII characters")
        _check_pool(self.ipv4_pool, 4, 28)
        _check_dns(self.dns)
        _check_range("mtu", self.mtu, 576, 1460)

    def digest(self) -> int:
        return resource_hash(Kind.L2TP_SERVER, msgspec.to_builtins(self))

    def __repr__(self) -> str:
        return f"L2tpServer(port={self.port})"


Server = OpenVpnServer | SshServer | L2tpServer


def _check_pool(text: str, version: int, longest: int) -> None:
    try:
        network = ip_network(text)
    except ValueError as error:
        raise InvalidResource(f"{text!r} is not a network such as 10.66.0.0/16") from error
    if network.version != version or network.prefixlen > longest:
        raise InvalidResource(f"{text} is not an IPv{version} network of /{longest} or wider")


def _check_dns(servers: tuple[str, ...]) -> None:
    for server in servers:
        try:
            check_name_server(server)
        except InvalidAddress as error:
            raise InvalidResource(str(error)) from error


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidResource(f"{name} {value} is not between {low} and {high}")


def _check_pem(name: str, text: str, label: str) -> None:
    lines = text.splitlines()
    if f"-----BEGIN {label}-----" not in lines or not text.isascii() or "</" in text or "\r" in text:
        raise InvalidResource(f"{name} is not a PEM block of a {label}")
