"""X.509 without a library in memory: when a certificate is valid, and when to renew it (RFC 5280 §4.1)."""

from __future__ import annotations

import random
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime

_UTC_TIME, _GENERALIZED_TIME, _VERSION = 0x17, 0x18, 0xA0


class InvalidCertificate(ValueError):
    """Not a PEM certificate."""


@dataclass(frozen=True, slots=True)
class Validity:
    """Unix seconds."""

    not_before: int
    not_after: int

    def renew_at(self, jitter: float) -> float:
        """Half of the life, moved by `jitter` (-1 to 1) times a tenth, so that a fleet does not come at once."""
        return self.not_before + (self.not_after - self.not_before) * (0.5 + 0.1 * jitter)


def validity(pem: bytes) -> Validity:
    """Read notBefore and notAfter of the first certificate in the text."""
    try:
        first = pem.decode("ascii").split("-----END CERTIFICATE-----")[0] + "-----END CERTIFICATE-----"
        der = ssl.PEM_cert_to_DER_cert(first[first.index("-----BEGIN") :])
        to_be_signed = _children(_children(der)[0][1])[0][1]
        fields = _children(to_be_signed)
        # version is optional; then serial number, signature algorithm, issuer, validity
        times = _children(fields[4 if fields[0][0] == _VERSION else 3][1])
        return Validity(_time(*times[0]), _time(*times[1]))
    except (ValueError, IndexError) as error:
        raise InvalidCertificate("not a PEM certificate") from error


def jitter() -> float:
    return random.uniform(-1, 1)  # noqa: S311  spreads load, guards nothing


def _children(data: bytes) -> list[tuple[int, bytes]]:
    """The elements of a DER sequence as (tag, content)."""
    elements = []
    while data:
        tag, length, start = data[0], data[1], 2
        if length & 0x80:
            start += length & 0x7F
            length = int.from_bytes(data[2:start])
        if len(data) < start + length:
            raise ValueError("cut off")
        elements.append((tag, data[start : start + length]))
        data = data[start + length :]
    return elements


def _time(tag: int, content: bytes) -> int:
    """RFC 5280 §4.1.2.5: years 50 to 99 of a UTCTime are of the last century."""
    text = content.decode("ascii")
    if tag == _UTC_TIME:
        text = ("19" if text[:2] >= "50" else "20") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError("not a time")
    return int(datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp())
