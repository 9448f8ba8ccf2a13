"""Answers of the kernel's WireGuard; pure.

The kernel writes the values of a peer in one order and at fixed sizes, so they are read at fixed offsets, after a check
that the attribute headers are the expected ones; a peer that looks different is read attribute by attribute.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from agent.drivers.netlink.codec import NLA_F_NESTED, NLA_TYPE_MASK, MalformedMessage, attributes
from agent.drivers.wireguard import allowedips
from agent.drivers.wireguard.linux import (
    CTRL_ATTR_FAMILY_ID,
    DEVICE_LISTEN_PORT,
    DEVICE_PEERS,
    DEVICE_PRIVATE_KEY,
    DEVICE_PUBLIC_KEY,
    GENL,
    HEADER,
    NO_KEY,
    PEER_ALLOWED_IPS,
    PEER_ENDPOINT,
    PEER_KEEPALIVE,
    PEER_LAST_HANDSHAKE,
    PEER_PRESHARED_KEY,
    PEER_PROTOCOL_VERSION,
    PEER_PUBLIC_KEY,
    PEER_RX,
    PEER_TX,
    header,
)
from shared.desired import Peer
from shared.keys import KEY_BYTES
from shared.protocol import PeerStats

# Nest, public key, preshared key, last handshake (seconds, nanoseconds), keepalive, sent, received, protocol version.
_PEER = struct.Struct("=HH 4s32s 4s32s 4sq8x 4sHxx 4sQ 4sQ 4s4x")
_PEER_HEADERS = (
    header(PEER_PUBLIC_KEY, KEY_BYTES),
    header(PEER_PRESHARED_KEY, KEY_BYTES),
    header(PEER_LAST_HANDSHAKE, 16),
    header(PEER_KEEPALIVE, 2),
    header(PEER_TX, 8),
    header(PEER_RX, 8),
    header(PEER_PROTOCOL_VERSION, 4),
)
# What the counters need of the same, and what an IPv4 endpoint begins with if one follows: header, port, address.
_COUNTERS = struct.Struct("=H2x 4s32s 4s32x 4sq8x 4s4x 4sQ 4sQ 4s4x 4s2xBB4s")
_IPV4_ENDPOINT = header(PEER_ENDPOINT, 16)
_IPV6_ENDPOINT = header(PEER_ENDPOINT, 28)
_IPV4_AT = struct.Struct("!4s2xH4s")  # header, family, port, address
# What traffic moves in a peer (handshake, sent and received, endpoint), around what it does not.
_TRAFFIC = re.compile(
    b"%b.{16}(%b.{4})%b.{8}%b.{8}(%b.{4})(?:%b.{16}|%b.{28})?"
    % tuple(map(re.escape, (*_PEER_HEADERS[2:], _IPV4_ENDPOINT, _IPV6_ENDPOINT))),
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Settings:
    """The interface's own part of a dump."""

    public_key: bytes  # b"" where no private key is set
    listen_port: int
    private_key: bytes = field(default=b"", repr=False)


def parse_family(payload: bytes) -> int:
    values = dict(attributes(memoryview(payload)[GENL.size :]))
    return int(struct.unpack("=H", values[CTRL_ATTR_FAMILY_ID])[0])


def parse_settings(dump: Sequence[bytes]) -> Settings:
    """Read the interface's own part, which only the first message has."""
    values = dict(attributes(memoryview(dump[0])[GENL.size :]))
    empty = memoryview(b"")
    return Settings(
        public_key=bytes(values.get(DEVICE_PUBLIC_KEY, empty)),
        listen_port=int(struct.unpack("=H", values[DEVICE_LISTEN_PORT])[0]),
        private_key=bytes(values.get(DEVICE_PRIVATE_KEY, empty)),
    )


def fingerprint(dump: Sequence[bytes]) -> bytes:
    """A hash of the dump without what traffic moves. A first endpoint of a peer changes it too: its record grows."""
    found = blake2b(digest_size=16)
    for data in dump:
        found.update(b"".join(_TRAFFIC.split(data)))
    return found.digest()


def parse_stats(dump: Sequence[bytes]) -> list[PeerStats]:
    found: list[PeerStats] = []
    for data in dump:
        for offset, end in _nests(data):
            start = _fast_stats(data, offset, end, found)
            while start < end:
                start = _fast_stats(data, _slow_stats(data, start, end, found), end, found)
    return found


def _fast_stats(data: bytes, start: int, end: int, found: list[PeerStats]) -> int:
    """Read peers up to one that looks different; return where it begins."""
    unpack, add, last = _COUNTERS.unpack_from, found.append, len(data) - _COUNTERS.size
    key_, preshared_, handshake_, keepalive_, tx_, rx_, version_ = _PEER_HEADERS
    while start < end and start <= last:
        length, a, key, b, c, seconds, d, e, tx, f, rx, g, endpoint, high, low, ip = unpack(data, start)
        if not (a == key_ and b == preshared_ and c == handshake_ and d == keepalive_):
            break
        if not (e == tx_ and f == rx_ and g == version_ and _PEER.size <= length <= end - start):
            break
        if endpoint == _IPV4_ENDPOINT:
            add(PeerStats(key, rx, tx, seconds, f"{socket.inet_ntoa(ip)}:{high << 8 | low}"))
        elif endpoint == _IPV6_ENDPOINT:
            add(PeerStats(key, rx, tx, seconds, _endpoint_at(data, start + _PEER.size)))
        elif length == _PEER.size or endpoint == HEADER.pack(length - _PEER.size, PEER_ALLOWED_IPS | NLA_F_NESTED):
            add(PeerStats(key, rx, tx, seconds))  # allowed IPs and nothing else: it was never seen
        else:
            break
        start += (length + 3) & ~3
    return start


def _slow_stats(data: bytes, start: int, end: int, found: list[PeerStats]) -> int:
    """Read one peer, whatever the order of its attributes; return where the next one begins."""
    length = _length(data, start, end)
    values = dict(attributes(memoryview(data)[start + HEADER.size : start + length]))
    if PEER_LAST_HANDSHAKE in values:  # the rest of a peer that was split has none of this
        found.append(_stats(values))
    return start + ((length + 3) & ~3)


def parse_peers(dump: Sequence[bytes]) -> tuple[Peer, ...]:
    """Read all peers; the parts of one that was split over messages are joined."""
    found: list[Peer] = []
    for data in dump:
        for start, end in _peers(data):
            peer = _peer(data, start, end)
            if found and found[-1].public_key == peer.public_key:
                first = found.pop()
                peer = Peer(
                    public_key=first.public_key,
                    allowed_ips=first.allowed_ips + peer.allowed_ips,
                    preshared_key=first.preshared_key,
                    keepalive=first.keepalive,
                )
            found.append(peer)
    return tuple(found)


def _nests(data: bytes) -> Iterator[tuple[int, int]]:
    """The span of all peers in one message."""
    return (
        (start + HEADER.size, end) for start, end, type_ in _walk(data, GENL.size, len(data)) if type_ == DEVICE_PEERS
    )


def _peers(data: bytes) -> Iterator[tuple[int, int]]:
    """The span of each peer's nest in one message."""
    for start, end in _nests(data):
        offset = start
        while offset < end:
            length = _length(data, offset, end)
            yield offset, offset + length
            offset += (length + 3) & ~3


def _length(data: bytes, offset: int, end: int) -> int:
    """The bytes of the peer's nest that begins here."""
    if offset + HEADER.size > end:
        raise MalformedMessage("a peer does not fit")
    length, _ = HEADER.unpack_from(data, offset)
    if length < HEADER.size or offset + length > end:
        raise MalformedMessage(f"a peer of {length} bytes does not fit")
    return int(length)


def _walk(data: bytes, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Attributes as (start with the header, end, type)."""
    while offset + HEADER.size <= end:
        length, type_ = HEADER.unpack_from(data, offset)
        if length < HEADER.size or offset + length > end:
            raise MalformedMessage(f"an attribute of {length} bytes does not fit")
        yield offset, offset + length, type_ & NLA_TYPE_MASK
        offset += (length + 3) & ~3


def _peer(data: bytes, start: int, end: int) -> Peer:
    if end - start >= _PEER.size:
        _, _, a, key, b, preshared_key, c, _, d, keepalive, e, _, f, _, g = _PEER.unpack_from(data, start)
        if (a, b, c, d, e, f, g) == _PEER_HEADERS:
            ips: tuple[str, ...] = ()
            offset = start + _PEER.size
            while offset < end:  # an endpoint may come before; a generator would cost as much as all the rest
                length, type_ = HEADER.unpack_from(data, offset)
                if type_ & NLA_TYPE_MASK == PEER_ALLOWED_IPS:
                    ips = allowedips.decode(data, offset + HEADER.size, offset + length)
                offset += max(length + 3 & ~3, HEADER.size)
            return _made(key, preshared_key, keepalive, ips)
    view = memoryview(data)
    spans = {type_: (first + HEADER.size, last) for first, last, type_ in _walk(data, start + HEADER.size, end)}
    values = {type_: view[first:last] for type_, (first, last) in spans.items()}
    return _made(
        bytes(values[PEER_PUBLIC_KEY]),
        bytes(values.get(PEER_PRESHARED_KEY, NO_KEY)),
        int(struct.unpack("=H", values.get(PEER_KEEPALIVE, bytes(2)))[0]),
        allowedips.decode(data, *spans[PEER_ALLOWED_IPS]) if PEER_ALLOWED_IPS in spans else (),
    )


def _made(key: bytes, preshared_key: bytes, keepalive: int, allowed_ips: tuple[str, ...]) -> Peer:
    secret = preshared_key if preshared_key != NO_KEY else None
    return Peer(public_key=key, allowed_ips=allowed_ips, preshared_key=secret, keepalive=keepalive)


def _stats(values: dict[int, memoryview]) -> PeerStats:
    endpoint = values.get(PEER_ENDPOINT, memoryview(b""))
    return PeerStats(
        public_key=bytes(values[PEER_PUBLIC_KEY]),
        rx=int(struct.unpack("=Q", values[PEER_RX])[0]),
        tx=int(struct.unpack("=Q", values[PEER_TX])[0]),
        handshake=int(struct.unpack("=q", values[PEER_LAST_HANDSHAKE][:8])[0]),
        endpoint=_endpoint_at(header(PEER_ENDPOINT, len(endpoint)) + bytes(endpoint), 0),
    )


def _endpoint_at(data: bytes, offset: int) -> str:
    """The endpoint where one stands at this offset (the next attribute may be another), as host:port."""
    if len(data) < offset + _IPV4_AT.size:
        return ""
    head, port, address = _IPV4_AT.unpack_from(data, offset)
    if head == _IPV4_ENDPOINT:
        return f"{socket.inet_ntoa(address)}:{port}"
    if head == _IPV6_ENDPOINT:  # family, port, flow, address, scope
        return f"[{socket.inet_ntop(socket.AF_INET6, data[offset + 12 : offset + 28])}]:{port}"
    return ""
