"""WireGuard keys as values: 32 bytes inside, base64 at the edges (wg(8))."""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass, field
from typing import Self

KEY_BYTES = 32


class InvalidKey(ValueError):
    """Text that is not the base64 of exactly 32 bytes."""


def decode_key(text: str) -> bytes:
    """Return the 32 bytes of a base64 key; raise InvalidKey unless it is written canonically.

    Canonical means that encoding the bytes again gives the same text, so that one key has one spelling.
    """
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidKey("a key is 44 characters of base64") from error
    if len(raw) != KEY_BYTES or base64.b64encode(raw).decode() != text:
        raise InvalidKey("a key is the base64 of 32 bytes")
    return raw


def encode_key(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


@dataclass(frozen=True, slots=True)
class PublicKey:
    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != KEY_BYTES or not any(self.raw):
            raise InvalidKey("a public key is 32 bytes and not all zero")

    @classmethod
    def parse(cls, text: str) -> Self:
        return cls(decode_key(text))

    def __str__(self) -> str:
        return encode_key(self.raw)


@dataclass(frozen=True, slots=True)
class PrivateKey:
    """A Curve25519 private key, always clamped (RFC 7748 §5): the kernel stores it so, and an unclamped one
    would look changed at every re-apply and drop all sessions."""

    raw: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.raw) != KEY_BYTES:
            raise InvalidKey("a private key is 32 bytes")
        clamped = bytes([self.raw[0] & 248]) + self.raw[1:31] + bytes([self.raw[31] & 127 | 64])
        object.__setattr__(self, "raw", clamped)

    @classmethod
    def generate(cls) -> Self:
        return cls(os.urandom(KEY_BYTES))

    @classmethod
    def parse(cls, text: str) -> Self:
        return cls(decode_key(text))

    def public(self) -> PublicKey:
        # Imported here: an agent that only applies public keys never needs the library in memory.
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        return PublicKey(X25519PrivateKey.from_private_bytes(self.raw).public_key().public_bytes_raw())

    def reveal(self) -> str:
        """The base64 text; named so that a search finds every place where the secret leaves the value."""
        return encode_key(self.raw)

    def __str__(self) -> str:
        return "PrivateKey(…)"


@dataclass(frozen=True, slots=True)
class PresharedKey:
    raw: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.raw) != KEY_BYTES:
            raise InvalidKey("a preshared key is 32 bytes")

    @classmethod
    def generate(cls) -> Self:
        return cls(os.urandom(KEY_BYTES))

    @classmethod
    def parse(cls, text: str) -> Self:
        return cls(decode_key(text))

    def reveal(self) -> str:
        return encode_key(self.raw)

    def __str__(self) -> str:
        return "PresharedKey(…)"
