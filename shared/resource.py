"""What all desired resources have in common: their kinds, how they are refused, and the hash for the digest."""

from __future__ import annotations

from enum import StrEnum
from hashlib import blake2b

import msgspec

DIGEST_BYTES = 16
_encoder = msgspec.msgpack.Encoder()


class Protocol(StrEnum):
    WIREGUARD = "wireguard"
    OPENVPN = "openvpn"
    SSH = "ssh"
    L2TP = "l2tp"


class Kind(StrEnum):
    WIREGUARD_INTERFACE = "wireguard.interface"
    WIREGUARD_PEER = "wireguard.peer"
    OPENVPN_SERVER = "openvpn.server"
    SSH_SERVER = "ssh.server"
    L2TP_SERVER = "l2tp.server"
    CREDENTIAL = "credential"
    LEASE = "lease"
    SESSION_END = "session.end"


class InvalidResource(ValueError):
    """A payload that no host should apply; the text says what is wrong with it, and names no secret."""


def resource_hash(*parts: object) -> int:
    """One resource's share of the digest."""
    return int.from_bytes(blake2b(_encoder.encode(parts), digest_size=DIGEST_BYTES).digest())


def check_port(port: int) -> None:
    if not 1 <= port <= 65535:
        raise InvalidResource(f"port {port} is not between 1 and 65535")
