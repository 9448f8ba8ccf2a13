"""Requests to the kernel's WireGuard, many peers in one; pure.

Headers are constants, and addresses are packed for many peers at once: hardly visible beside the kernel's work.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import repeat

from agent.drivers.netlink.codec import NLA_F_NESTED, attribute, text, u32
from agent.drivers.wireguard import allowedips
from agent.drivers.wireguard.linux import (
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
    HEADER,
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
_PEERS_PER_MESSAGE = 64
_PACKED_AT_ONCE = 1024
_MANY = 8  # to see whether peers are alike costs more than it saves for fewer
# An attribute's length has 16 bits: some 2,300 allowed IPs in one nest would wrap it around.
_IPS_PER_RECORD = 500
_MAX_BYTES = 48_000

_PUBLIC_KEY = header(PEER_PUBLIC_KEY, KEY_BYTES)
_PRESHARED_KEY = header(PEER_PRESHARED_KEY, KEY_BYTES)
_REPLACE_ALLOWED_IPS = u32(PEER_FLAGS, FLAG_REPLACE_ALLOWED_IPS)
_REMOVE_ME = u32(PEER_FLAGS, FLAG_REMOVE_ME)
_KEEPALIVE = struct.Struct("=4sHxx")
_CLIENT = struct.Struct(f"=8s{KEY_BYTES}s4s{KEY_BYTES}s20s{allowedips.TWO_HOSTS}")
_TWO_HOSTS_BYTES = struct.calcsize(f"={allowedips.TWO_HOSTS}")


def family_request() -> bytes:
    return GENL.pack(CTRL_CMD_GETFAMILY, VERSION) + text(CTRL_ATTR_FAMILY_NAME, FAMILY)


def get_device(name: str) -> bytes:
    return GENL.pack(CMD_GET_DEVICE, VERSION) + text(DEVICE_IFNAME, name)


def set_private_key(name: str, key: PrivateKey) -> bytes:
    return _set_device(name) + attribute(DEVICE_PRIVATE_KEY, key.raw)


def set_listen_port(name: str, port: int) -> bytes:
    return _set_device(name) + attribute(DEVICE_LISTEN_PORT, struct.pack("=H", port))


def set_peers(name: str, peers: Sequence[Peer]) -> Iterator[bytes]:
    """Add the peers, or make those that exist exactly these; endpoint and counters stay."""
    for start in range(0, len(peers), _PACKED_AT_ONCE):
        part = peers[start : start + _PACKED_AT_ONCE]
        yield from _messages(name, _clients(part) or [_record(peer) for peer in part])
        for peer in part:
            if len(peer.allowed_ips) > _IPS_PER_RECORD:
                yield from _messages(name, _more_allowed_ips(peer))


def set_server(name: str, server: ServerPeer) -> Iterator[bytes]:
    host, port = server.endpoint
    if host.version == 4:
        endpoint = struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + host.packed + bytes(8)
    else:
        endpoint = struct.pack("=H", socket.AF_INET6) + struct.pack("!HI", port, 0) + host.packed + bytes(4)
    return _messages(name, [_record(server.peer, attribute(PEER_ENDPOINT, endpoint))])


def remove_peers(name: str, public_keys: Sequence[bytes]) -> Iterator[bytes]:
    return _messages(name, [_nest(0, _PUBLIC_KEY + key + _REMOVE_ME) for key in public_keys])


@lru_cache(maxsize=16)
def _set_device(name: str) -> bytes:
    return GENL.pack(CMD_SET_DEVICE, VERSION) + text(DEVICE_IFNAME, name)


def _messages(name: str, records: list[bytes]) -> Iterator[bytes]:
    done = 0
    while done < len(records):
        part = records[done : done + _PEERS_PER_MESSAGE]
        while (size := sum(map(len, part))) > _MAX_BYTES and len(part) > 1:
            part = part[: len(part) // 2]
        yield b"".join((_set_device(name), header(DEVICE_PEERS | NLA_F_NESTED, size), *part))
        done += len(part)


def _record(peer: Peer, endpoint: bytes = b"") -> bytes:
    ips = allowedips.encode(peer.allowed_ips[:_IPS_PER_RECORD])
    before, after = _frame(len(ips), len(endpoint), peer.keepalive)
    preshared_key = peer.preshared_key or NO_KEY
    return b"".join((before, peer.public_key, _PRESHARED_KEY, preshared_key, after, ips, endpoint))


def _clients(peers: Sequence[Peer]) -> list[bytes] | None:
    """The records of many that have one address of each family and one keepalive, or None: in a third of the time."""
    if len(peers) < _MANY:
        return None
    keepalives = {peer.keepalive for peer in peers}
    hosts = allowedips.hosts([peer.allowed_ips for peer in peers])
    if hosts is None or len(keepalives) > 1:
        return None
    before, after = _frame(_TWO_HOSTS_BYTES, 0, keepalives.pop())
    columns = (
        repeat(before),
        [peer.public_key for peer in peers],
        repeat(_PRESHARED_KEY),
        [peer.preshared_key or NO_KEY for peer in peers],
        repeat(after),
        repeat(allowedips.IPV4_HOST),
        hosts[0],
        repeat(allowedips.IPV6_HOST),
        hosts[1],
    )
    return list(map(_CLIENT.pack, *columns))


@lru_cache(maxsize=256)
def _frame(ips: int, endpoint: int, keepalive: int) -> tuple[bytes, bytes]:
    """What is before a record's public key, and between its preshared key and its allowed IPs; lengths in bytes."""
    after = _REPLACE_ALLOWED_IPS + _KEEPALIVE.pack(header(PEER_KEEPALIVE, 2), keepalive)
    after += HEADER.pack(HEADER.size + ips, PEER_ALLOWED_IPS | NLA_F_NESTED)
    before = HEADER.size + len(_PUBLIC_KEY) + KEY_BYTES + len(_PRESHARED_KEY) + KEY_BYTES
    return HEADER.pack(before + len(after) + ips + endpoint, NLA_F_NESTED) + _PUBLIC_KEY, after


def _more_allowed_ips(peer: Peer) -> list[bytes]:
    """What did not fit into the peer's record, in further ones that replace nothing."""
    parts = [
        allowedips.encode(peer.allowed_ips[start : start + _IPS_PER_RECORD])
        for start in range(_IPS_PER_RECORD, len(peer.allowed_ips), _IPS_PER_RECORD)
    ]
    return [_nest(0, _PUBLIC_KEY + peer.public_key + _nest(PEER_ALLOWED_IPS, part)) for part in parts]


def _nest(type_: int, content: bytes) -> bytes:
    """A nest of content that is aligned already."""
    return HEADER.pack(4 + len(content), type_ | NLA_F_NESTED) + content
