"""Logins for single connections: a name and a secret of their own, made before the transaction that needs them."""

from __future__ import annotations

from dataclasses import dataclass

from shared.resource import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """What is not part of it is empty."""

    protocol: Protocol
    username: str
    secret: str = ""  # as the nodes get it
    fingerprint: bytes = b""  # SHA-256 of the client's certificate
    certificate: str = ""  # PEM
    password: str = ""
    private_key: str = ""  # PEM
    tls_crypt: str = ""  # PEM

    def __repr__(self) -> str:
        return f"Login({self.protocol}/{self.username})"
