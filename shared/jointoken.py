"""Join tokens: one opaque line that carries all that a host needs to enrol, and lets it pin the controller's CA."""

from __future__ import annotations

import base64
import binascii
from hashlib import blake2b
from typing import Annotated

import msgspec

_PREFIX = "skyjoin1_"
_CHECK_BYTES = 4


class InvalidJoinToken(ValueError):
    """Text that is not a whole join token; the message never repeats it."""


class JoinToken(msgspec.Struct, frozen=True, array_like=True):
    address: Annotated[str, msgspec.Meta(max_length=300)]  # host:port of the node channel
    id: Annotated[str, msgspec.Meta(max_length=64)]
    secret: bytes  # 32 random bytes; the controller keeps only their SHA-256
    ca_pin: bytes  # SHA-256 of the CA's SubjectPublicKeyInfo (DER)

    def __repr__(self) -> str:
        return f"JoinToken(address={self.address!r}, id={self.id!r})"

    def encode(self) -> str:
        body = msgspec.msgpack.encode(self)
        return _PREFIX + base64.urlsafe_b64encode(body + _check(body)).rstrip(b"=").decode()


def decode(text: str) -> JoinToken:
    """Parse a token; raise InvalidJoinToken for anything mistyped, cut or from elsewhere."""
    text = text.strip()
    if not text.startswith(_PREFIX):
        raise InvalidJoinToken(f"a join token starts with {_PREFIX}")
    body = text[len(_PREFIX) :]
    try:
        data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        if len(data) <= _CHECK_BYTES or _check(data[:-_CHECK_BYTES]) != data[-_CHECK_BYTES:]:
            raise InvalidJoinToken("the join token is incomplete or mistyped")
        token = msgspec.msgpack.decode(data[:-_CHECK_BYTES], type=JoinToken)
    except (binascii.Error, ValueError) as error:
        raise InvalidJoinToken("the join token is incomplete or mistyped") from error
    if len(token.secret) != 32 or len(token.ca_pin) != 32:
        raise InvalidJoinToken("the join token is incomplete or mistyped")
    return token


def _check(body: bytes) -> bytes:
    return blake2b(body, digest_size=_CHECK_BYTES).digest()
