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

from agent.drivers.netlink.codec import NLA_TYPE_MASK, MalformedMessage, attributes
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
        for start, end in _peers(data):
            if end - start >= _PEER.size:
                _, _, a, key, b, _, c, seconds, d, _, e, tx, f, rx, g = _PEER.unpack_from(data, start)
                if (a, b, c, d, e, f, g) == _PEER_HEADERS:
                    found.append(PeerStats(key, rx, tx, seconds, _endpoint_at(data, start + _PEER.size)))
                    continue
            values = dict(attributes(memoryview(data)[start + HEADER.size : end]))
            if PEER_LAST_HANDSHAKE in values:  # the rest of a peer that was split has none of this
                found.append(_stats(values))
    return found


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


def _peers(data: bytes) -> Iterator[tuple[int, int]]:
    """The span of each peer's nest in one message."""
    for start, end, type_ in _walk(data, GENL.size, len(data)):
        if type_ == DEVICE_PEERS:
            offset = start + HEADER.size
            while offset < end:
                length, _ = HEADER.unpack_from(data, offset)
                if length < HEADER.size or offset + length > end:
                    raise MalformedMessage(f"a peer of {length} bytes does not fit")
                yield offset, offset + length
                offset += (length + 3) & ~3


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
