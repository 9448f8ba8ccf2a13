"""The text protocol of userspace WireGuard (wireguard.com/xplatform); pure."""

from __future__ import annotations

import os
import re
from binascii import unhexlify
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from agent.drivers.wireguard.server import ServerPeer
from shared.desired import Peer
from shared.keys import KEY_BYTES, PrivateKey
from shared.protocol import PeerStats

T = TypeVar("T")

GET = (b"get=1\n\n",)
_ITEMS_PER_PIECE = 250
_NO_KEY = "0" * (2 * KEY_BYTES)
# How wireguard-go writes a peer; another program may order its lines differently and is read line by line.
_STATS = re.compile(
    r"public_key=(.{64})\n"
    r"preshared_key=.{64}\n"
    r"protocol_version=1\n"
    r"(?:endpoint=(.+)\n)?"
    r"last_handshake_time_sec=(.+)\n"
    r"last_handshake_time_nsec=.+\n"
    r"tx_bytes=(.+)\n"
    r"rx_bytes=(.+)\n"
)
_PEER = re.compile(
    r"public_key=(.{64})\n"
    r"preshared_key=(.{64})\n"
    r"protocol_version=1\n"
    r"(?:endpoint=.+\n)?"
    r"last_handshake_time_sec=.+\n"
    r"last_handshake_time_nsec=.+\n"
    r"tx_bytes=.+\n"
    r"rx_bytes=.+\n"
    r"persistent_keepalive_interval=(.+)\n"
    r"((?:allowed_ip=.+\n)*)"
)
# What traffic moves in a peer; it begins with fixed words, or the search would stop at every letter.
_TRAFFIC = re.compile(
    r"protocol_version=1\n"
    r"(?:endpoint=.+\n)?"
    r"last_handshake_time_sec=.+\n"
    r"last_handshake_time_nsec=.+\n"
    r"tx_bytes=.+\n"
    r"rx_bytes=.+\n"
)


class MalformedAnswer(ValueError):
    """Text that is not an answer of this protocol."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The interface's own part of a `get` answer."""

    private_key: bytes = field(default=b"", repr=False)  # 32 bytes, or b"" where none is set
    listen_port: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class SetOperation(Generic[T]):
    """A set operation on any number of items. Each iteration makes its text anew, in pieces: the program acts on one
    while the next is made."""

    items: Sequence[T]
    lines: Callable[[T], str]

    def __iter__(self) -> Iterator[bytes]:
        last = max(len(self.items) - 1, 0) // _ITEMS_PER_PIECE
        for number in range(last + 1):
            part = self.items[number * _ITEMS_PER_PIECE : (number + 1) * _ITEMS_PER_PIECE]
            first, end = "" if number else "set=1\n", "\n" if number == last else ""
            yield f"{first}{''.join(map(self.lines, part))}{end}".encode()


def set_private_key(key: PrivateKey) -> SetOperation[PrivateKey]:
    return SetOperation([key], lambda key: f"private_key={key.raw.hex()}\n")


def set_listen_port(port: int) -> SetOperation[int]:
    return SetOperation([port], lambda port: f"listen_port={port}\n")


def set_peers(peers: Sequence[Peer]) -> SetOperation[Peer]:
    """Add the peers, or make those that exist exactly these; endpoint and counters stay."""
    return SetOperation(peers, _peer)


def set_server(server: ServerPeer) -> SetOperation[ServerPeer]:
    return SetOperation([server], _server)


def remove_peers(public_keys: Sequence[bytes]) -> SetOperation[bytes]:
    return SetOperation(public_keys, lambda key: f"public_key={key.hex()}\nremove=true\n")


def parse_error(answer: str) -> str | None:
    """The last line's errno as words, or None where the operation succeeded."""
    _, found, number = answer.rstrip("\n").rpartition("errno=")
    try:
        code = abs(int(number))
    except ValueError as error:
        raise MalformedAnswer("an answer without errno") from error
    if not found:
        raise MalformedAnswer("an answer without errno")
    return os.strerror(code) if code else None


def parse_settings(answer: str) -> Settings:
    head = answer[: max(answer.find("public_key="), 0) or None]
    values = dict(_pairs(head))
    private_key = values.get("private_key", _NO_KEY)
    return Settings(
        private_key=unhexlify(private_key) if private_key != _NO_KEY else b"",
        listen_port=int(values.get("listen_port", "0")),
    )


def parse(answer: str) -> tuple[Settings, tuple[Peer, ...]]:
    return parse_settings(answer), parse_peers(answer)


def parse_peers(answer: str) -> tuple[Peer, ...]:
    # One match after the other: all their texts at once would be as much memory as everything else the agent has.
    found = tuple([_made(*match.groups()) for match in _PEER.finditer(answer)])
    if len(found) != answer.count("public_key="):
        return tuple(map(_parse_peer, _blocks(answer)))
    return found


def fingerprint(answer: str) -> bytes:
    """A hash of the answer without what traffic moves, and without the order of the peers, which is any.

    It compares within this process only: str's own hash is another one in each.
    """
    lasting = _TRAFFIC.sub("", answer.rpartition("errno=")[0])
    return hash(frozenset(lasting.split("public_key="))).to_bytes(8, signed=True)


def parse_stats(answer: str) -> list[PeerStats]:
    found = _STATS.findall(answer)
    if len(found) != answer.count("public_key="):
        return list(map(_parse_stats, _blocks(answer)))
    return [
        PeerStats(unhexlify(key), int(rx), int(tx), int(seconds), endpoint) for key, endpoint, seconds, tx, rx in found
    ]


def _peer(peer: Peer) -> str:
    preshared_key = peer.preshared_key.hex() if peer.preshared_key else _NO_KEY
    allowed_ips = "".join([f"allowed_ip={prefix}\n" for prefix in peer.allowed_ips])
    return (
        f"public_key={peer.public_key.hex()}\npreshared_key={preshared_key}\n"
        f"persistent_keepalive_interval={peer.keepalive}\nreplace_allowed_ips=true\n{allowed_ips}"
    )


def _server(server: ServerPeer) -> str:
    host, port = server.endpoint
    return f"{_peer(server.peer)}endpoint={f'[{host}]' if host.version == 6 else host}:{port}\n"


def _blocks(answer: str) -> list[str]:
    """One text for each peer: its public key, then its lines."""
    return ("\n" + answer).split("\npublic_key=")[1:]


def _parse_peer(block: str) -> Peer:
    key, _, lines = block.partition("\n")
    values = dict(_pairs(lines))
    allowed_ips = "".join([f"allowed_ip={value}\n" for name, value in _pairs(lines) if name == "allowed_ip"])
    keepalive = values.get("persistent_keepalive_interval", "0")
    return _made(key, values.get("preshared_key", _NO_KEY), keepalive, allowed_ips)


def _made(key: str, preshared_key: str, keepalive: str, allowed_ips: str) -> Peer:
    return Peer(
        public_key=unhexlify(key),
        allowed_ips=tuple(allowed_ips[len("allowed_ip=") : -1].split("\nallowed_ip=")) if allowed_ips else (),
        preshared_key=unhexlify(preshared_key) if preshared_key != _NO_KEY else None,
        keepalive=int(keepalive),
    )


def _parse_stats(block: str) -> PeerStats:
    key, _, lines = block.partition("\n")
    values = dict(_pairs(lines))
    return PeerStats(
        public_key=unhexlify(key),
        rx=int(values.get("rx_bytes", "0")),
        tx=int(values.get("tx_bytes", "0")),
        handshake=int(values.get("last_handshake_time_sec", "0")),
        endpoint=values.get("endpoint", ""),
    )


def _pairs(lines: str) -> Iterator[tuple[str, str]]:
    for line in lines.split("\n"):
        name, found, value = line.partition("=")
        if found:
            yield name, value
        elif line:
            raise MalformedAnswer("a line without =")
