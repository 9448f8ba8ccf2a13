"""Desired state: the typed resources that a node must run, and the digest of what it really runs.

A resource is `(scope, kind, key)` with a payload. Payloads travel and rest as MessagePack of the structs below;
a field that a newer peer added is ignored, a missing one takes its default.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import ip_interface

import msgspec

from shared.access import Credential, Lease, Limits, SessionEnd
from shared.addresses import check_client_prefix, parse_interface
from shared.keys import KEY_BYTES, encode_key
from shared.resource import DIGEST_BYTES, check_port, resource_hash
from shared.resource import InvalidResource as InvalidResource
from shared.resource import Kind as Kind
from shared.resource import Protocol as Protocol
from shared.services import L2tpServer, OpenVpnServer, SshServer

EMPTY_DIGEST = bytes(DIGEST_BYTES)
MAX_ALLOWED_IPS = 16
_MODULUS = 1 << (8 * DIGEST_BYTES)
INTERFACE_NAME = re.compile(r"[A-Za-z0-9_-]{1,15}")


class Interface(msgspec.Struct, frozen=True, kw_only=True):
    """A WireGuard interface. Its private key is not here: the node made it, and keeps it."""

    name: str
    listen_port: int
    addresses: tuple[str, ...]
    mtu: int = 1420
    masquerade: bool = True  # source NAT of clients towards the internet
    isolate: bool = True  # clients cannot reach each other

    @property
    def key(self) -> str:
        return self.name

    def check(self) -> None:
        """Raise InvalidResource (or InvalidAddress) where the kernel would refuse it or do something else."""
        if not INTERFACE_NAME.fullmatch(self.name):
            raise InvalidResource(f"interface name {self.name!r} is not 1 to 15 of A-Z a-z 0-9 _ -")
        check_port(self.listen_port)
        if not 1280 <= self.mtu <= 9000:
            raise InvalidResource(f"MTU {self.mtu} is not between 1280 and 9000")
        if not self.addresses:
            raise InvalidResource("an interface needs at least one address")
        for address in self.addresses:
            parse_interface(address)

    def digest(self) -> int:
        addresses = sorted(str(ip_interface(address)) for address in self.addresses)
        return resource_hash(Kind.WIREGUARD_INTERFACE, self.name, self.listen_port, addresses, self.mtu)


class Peer(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A WireGuard peer as the interface has it, and the lease that the node enforces by itself."""

    public_key: bytes
    allowed_ips: tuple[str, ...]
    preshared_key: bytes | None = None
    keepalive: int = 0  # seconds, 0 = off
    not_after: int | None = None  # lease: Unix seconds; the node removes the peer then, also when cut off
    account: int = 0  # whose traffic it is; 0 = nobody's
    limits: Limits | None = None

    @property
    def key(self) -> str:
        return encode_key(self.public_key)

    def check(self) -> None:
        if len(self.public_key) != KEY_BYTES or not any(self.public_key):
            raise InvalidResource("a public key is 32 bytes and not all zero")
        if self.preshared_key is not None and len(self.preshared_key) != KEY_BYTES:
            raise InvalidResource("a preshared key is 32 bytes")
        if not 0 <= self.keepalive <= 65535:
            raise InvalidResource(f"keepalive {self.keepalive} is not between 0 and 65535 seconds")
        if not 1 <= len(self.allowed_ips) <= MAX_ALLOWED_IPS:
            raise InvalidResource(f"a peer has 1 to {MAX_ALLOWED_IPS} allowed IPs")
        for prefix in self.allowed_ips:
            check_client_prefix(prefix)
        if self.limits is not None:
            self.limits.check()

    def digest(self) -> int:
        """The hash of what a host shows of the peer; the lease is not on the host and so not in it."""
        preshared = self.preshared_key if self.preshared_key and any(self.preshared_key) else b""
        return resource_hash(Kind.WIREGUARD_PEER, self.public_key, sorted(self.allowed_ips), preshared, self.keepalive)


Payload = Interface | Peer | OpenVpnServer | SshServer | L2tpServer | Credential | Lease | SessionEnd

_TYPES: dict[Kind, type[Payload]] = {
    Kind.WIREGUARD_INTERFACE: Interface,
    Kind.WIREGUARD_PEER: Peer,
    Kind.OPENVPN_SERVER: OpenVpnServer,
    Kind.SSH_SERVER: SshServer,
    Kind.L2TP_SERVER: L2tpServer,
    Kind.CREDENTIAL: Credential,
    Kind.LEASE: Lease,
    Kind.SESSION_END: SessionEnd,
}
_KINDS = {type_: kind for kind, type_ in _TYPES.items()}
_DECODERS = {kind: msgspec.msgpack.Decoder(type_) for kind, type_ in _TYPES.items()}
_encoder = msgspec.msgpack.Encoder()


def encode(payload: Payload) -> bytes:
    return _encoder.encode(payload)


def decode(kind: str, key: str, payload: bytes) -> Payload:
    """Decode and check one resource; raise InvalidResource with the reason, naming no secret."""
    try:
        value = _DECODERS[Kind(kind)].decode(payload)
    except ValueError as error:  # an unknown kind, or msgspec's ValidationError
        raise InvalidResource(str(error)) from error
    value.check()
    if value.key != key:
        raise InvalidResource(f"{kind} {key!r} carries the key of {value.key!r}")
    return value


def kind_of(payload: Payload) -> Kind:
    return _KINDS[type(payload)]


def digest(payloads: Iterable[Payload]) -> bytes:
    """The order-free digest of a set of resources: the sum of their hashes."""
    return digest_bytes(sum(payload.digest() for payload in payloads))


def digest_bytes(total: int) -> bytes:
    """A running sum (it may be negative after removals) as the digest on the wire."""
    return (total % _MODULUS).to_bytes(DIGEST_BYTES)
