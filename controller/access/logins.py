"""Logins for single connections: a name and a secret of their own, made before the transaction that needs them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from controller.access.secrets import make_secrets, new_password
from controller.access.usernames import new_login
from controller.accounts.passwords import Passwords
from controller.fleet.vpnkeys import VpnKeys
from shared.crypt import LEAST_COST
from shared.resource import Protocol

# Nodes know a client's certificate by its fingerprint, and forget it when the connection ends: it need not run out.
_CERTIFICATE_LIFETIME = timedelta(days=3650)


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
    tunnel: int = 0  # the number of the tun device

    def __repr__(self) -> str:
        return f"Login({self.protocol}/{self.username})"


class Logins:
    def __init__(self, passwords: Passwords, keys: VpnKeys) -> None:
        self._passwords = passwords
        self._keys = keys

    async def make(self, protocol: Protocol) -> Login:
        """A new login of any protocol but WireGuard; raise PasswordsBusy, PasswordHashUnavailable."""
        username = new_login()
        if protocol == Protocol.OPENVPN:
            made = self._keys.client_certificate(username, _CERTIFICATE_LIFETIME)
            return Login(
                protocol=protocol,
                username=username,
                fingerprint=made.fingerprint,
                certificate=made.certificate,
                private_key=made.private_key,
                tls_crypt=self._keys.tls_crypt_client_key(),
            )
        secrets = await make_secrets(self._passwords, new_password(), hashed=protocol == Protocol.SSH, cost=LEAST_COST)
        return Login(protocol=protocol, username=username, secret=secrets.of(protocol), password=secrets.password)
