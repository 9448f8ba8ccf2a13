"""The configuration of an OpenVPN client: one file with everything inline."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

from controller.access.clientconfig import InvalidClientConfig, check_endpoint, check_username, comment

CIPHERS = ("AES-256-GCM", "CHACHA20-POLY1305", "AES-128-GCM")
_NAME = re.compile(r"[A-Za-z0-9-]{1,64}")
_BASE64 = re.compile(r"[A-Za-z0-9+/]{1,64}={0,2}")
_PRIVATE_KEY, _CERTIFICATE, _TLS_CRYPT = "PRIVATE KEY", "CERTIFICATE", "OpenVPN tls-crypt-v2 client key"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenVpnConfig:
    """Keys and certificates are one PEM block each; `name` is only ever a comment."""

    file_name: ClassVar[str] = "skynetvpn.ovpn"
    media: ClassVar[str] = "application/x-openvpn-profile"

    name: str
    host: str
    port: int
    transports: tuple[str, ...]  # of udp and tcp, the first to try first
    server_name: str  # common name of the server's certificate
    username: str  # common name of the client's
    ca: str
    certificate: str
    private_key: str = field(repr=False)
    tls_crypt: str = field(repr=False)

    def __post_init__(self) -> None:
        check_endpoint(self.host, self.port)
        check_username(self.username)
        if not self.transports or not set(self.transports) <= {"udp", "tcp"}:
            raise InvalidClientConfig("transports are one or both of udp and tcp")
        if not _NAME.fullmatch(self.server_name):
            raise InvalidClientConfig(f"{self.server_name!r} is not the name of a server's certificate")
        _check_pem("CA", self.ca, _CERTIFICATE)
        _check_pem("certificate", self.certificate, _CERTIFICATE)
        _check_pem("private key", self.private_key, _PRIVATE_KEY)
        _check_pem("tls-crypt-v2 key", self.tls_crypt, _TLS_CRYPT)

    def to_conf(self) -> str:
        """Options of openvpn(8). What the tunnel is like (addresses, routes, name servers) the server pushes."""
        inline = {
            "ca": self.ca,
            "cert": self.certificate,
            "key": self.private_key,
            "tls-crypt-v2": self.tls_crypt,
        }
        lines = [
            f"# {comment(self.name)}",
            "client",
            "dev tun",
            "nobind",
            "persist-tun",
            *(f"remote {self.host} {self.port} {transport}" for transport in self.transports),
            "server-poll-timeout 5",
            *(["explicit-exit-notify 1"] if "udp" in self.transports else []),
            "remote-cert-tls server",
            f"verify-x509-name {self.server_name} name",
            "tls-version-min 1.3",
            f"data-ciphers {':'.join(CIPHERS)}",
            "auth-nocache",
            *(f"<{tag}>\n{pem.strip()}\n</{tag}>" for tag, pem in inline.items()),
        ]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, object]:
        return {
            "protocol": "openvpn",
            "host": self.host,
            "port": self.port,
            "transports": list(self.transports),
            "server_name": self.server_name,
            "username": self.username,
            "ca": self.ca,
            "certificate": self.certificate,
            "private_key": self.private_key,
            "tls_crypt_v2": self.tls_crypt,
        }


def _check_pem(name: str, text: str, label: str) -> None:
    first, *body, last = text.removesuffix("\n").split("\n") if text.count("\n") > 1 else ["", ""]
    whole = first == f"-----BEGIN {label}-----" and last == f"-----END {label}-----"
    if not whole or not body or not all(_BASE64.fullmatch(line) for line in body):
        raise InvalidClientConfig(f"the {name} is not one PEM block of a {label}")
