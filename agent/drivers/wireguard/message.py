"""Requests to the kernel's WireGuard, many peers in one; pure.

A peer is one `bytes.join` of constant headers and its own values: encoding is then invisible beside the kernel's work.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

from agent.drivers.netlink.codec import NLA_F_NESTED, attribute, text, u32
from agent.drivers.wireguard.linux import (
    ALLOWED_IP_ADDRESS,
    ALLOWED_IP_FAMILY,
    ALLOWED_IP_MASK,
    CMD_GET_DEVICE,
    CMD_SET_DEVICE,
    CTRL_ATTR_FAMILY_NAME,
    CTRL_CMD_GETFAMILY,
    DEVICE_IFNAME,
    DEVICE_LISTEN_PORT,
    DEVICE_PEERS,
    DEVICE_PRIVATE_KEY,
    FAMILY,
    FLAG_REMOVE_ME,
    FLAG_REPLACE_ALLOWED_IPS,
    GENL,
    NO_KEY,
    PEER_ALLOWED_IPS,
    PEER_ENDPOINT,
    PEER_FLAGS,
    PEER_KEEPALIVE,
    PEER_PRESHARED_KEY,
    PEER_PUBLIC_KEY,
    VERSION,
    header,
)
from agent.drivers.wireguard.server import ServerPeer
from shared.desired import Peer
from shared.keys import KEY_BYTES, PrivateKey

# The kernel holds its network lock (RTNL) for a whole message, about 30 µs per new peer: others wait less with few
# peers in one, and the round trips cost less with many.
_PEERS_PER_MESSAGE = 48
# An attribute's length has 16 bits: some 2,300 allowed IPs in one nest would wrap it around.
_IPS_PER_RECORD = 500
_MAX_BYTES = 48_000

_PUBLIC_KEY = header(PEER_PUBLIC_KEY, KEY_BYTES)
_PRESHARED_KEY = header(PEER_PRESHARED_KEY, KEY_BYTES)
_REPLACE_ALLOWED_IPS = u32(PEER_FLAGS, FLAG_REPLACE_ALLOWED_IPS)
_REMOVE_ME = u32(PEER_FLAGS, FLAG_REMOVE_ME)
_KEEPALIVE = header(PEER_KEEPALIVE, 2)


def family_request() -> bytes:
    return GENL.pack(CTRL_CMD_GETFAMILY, VERSION) + text(CTRL_ATTR_FAMILY_NAME, FAMILY)


def get_device(name: str) -> bytes:
    return GENL.pack(CMD_GET_DEVICE, VERSION) + text(DEVICE_IFNAME, name)


def set_private_key(name: str, key: PrivateKey) -> bytes:
    return _set_device(name) + attribute(DEVICE_PRIVATE_KEY, key.raw)


def set_listen_port(name: str, port: int) -> bytes:
    return _set_device(name) + attribute(DEVICE_LISTEN_PORT, struct.pack("=H", port))


def set_peers(name: str, peers: Iterable[Peer]) -> Iterator[bytes]:
    """Add the peers, or make those that exist exactly these; endpoint and counters stay."""
    return _in_messages(name, (record for peer in peers for record in _records(peer)))


def set_server(name: str, server: ServerPeer) -> Iterator[bytes]:
    host, port = server.endpoint
    if host.version == 4:
        endpoint = struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + host.packed + bytes(8)
    else:
        endpoint = struct.pack("=H", socket.AF_INET6) + struct.pack("!HI", port, 0) + host.packed + bytes(4)
    return _in_messages(name, _records(server.peer, attribute(PEER_ENDPOINT, endpoint)))


def remove_peers(name: str, public_keys: Iterable[bytes]) -> Iterator[bytes]:
    return _in_messages(name, (_nest(0, _PUBLIC_KEY + key + _REMOVE_ME) for key in public_keys))


def _set_device(name: str) -> bytes:
    return GENL.pack(CMD_SET_DEVICE, VERSION) + text(DEVICE_IFNAME, name)


def _in_messages(name: str, records: Iterable[bytes]) -> Iterator[bytes]:
    head = _set_device(name)
    batch: list[bytes] = []
    size = 0
    for record in records:
        if batch and (len(batch) == _PEERS_PER_MESSAGE or size + len(record) > _MAX_BYTES):
            yield head + _nest(DEVICE_PEERS, b"".join(batch))
            batch, size = [], 0
        batch.append(record)
        size += len(record)
    if batch:
        yield head + _nest(DEVICE_PEERS, b"".join(batch))


def _records(peer: Peer, endpoint: bytes = b"") -> Iterator[bytes]:
    """One record, or several where there are very many allowed IPs: only the first replaces those that were there."""
    values = (
        _PUBLIC_KEY,
        peer.public_key,
        _PRESHARED_KEY,
        peer.preshared_key or NO_KEY,
        _REPLACE_ALLOWED_IPS,
        endpoint,
        _KEEPALIVE,
        struct.pack("=Hxx", peer.keepalive),
        _allowed_ips(peer.allowed_ips[:_IPS_PER_RECORD]),
    )
    yield _nest(0, b"".join(values))
    for start in range(_IPS_PER_RECORD, len(peer.allowed_ips), _IPS_PER_RECORD):
        part = _allowed_ips(peer.allowed_ips[start : start + _IPS_PER_RECORD])
        yield _nest(0, _PUBLIC_KEY + peer.public_key + part)


def _allowed_ips(prefixes: Sequence[str]) -> bytes:
    return _nest(PEER_ALLOWED_IPS, b"".join([_allowed_ip(prefix) for prefix in prefixes]))


def _allowed_ip(prefix: str) -> bytes:
    address, _, length = prefix.partition("/")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return _allowed_ip_head(family, int(length)) + socket.inet_pton(family, address)


@cache
def _allowed_ip_head(family: int, length: int) -> bytes:
    """An allowed IP up to its address, which comes last and has a fixed size."""
    address_bytes = 4 if family == socket.AF_INET else 16
    fixed = (
        attribute(ALLOWED_IP_MASK, bytes([length]))
        + attribute(ALLOWED_IP_FAMILY, struct.pack("=H", family))
        + header(ALLOWED_IP_ADDRESS, address_bytes)
    )
    return header(NLA_F_NESTED, len(fixed) + address_bytes) + fixed


def _nest(type_: int, content: bytes) -> bytes:
    """A nest of content that is aligned already."""
    return header(type_ | NLA_F_NESTED, len(content)) + content
