"""A client's configuration as a value, and how it is written as a wg-quick file and as JSON."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from ipaddress import ip_address

from controller.fleet.nodes import is_host
from shared.addresses import check_client_prefix
from shared.keys import PresharedKey, PrivateKey, PublicKey

EVERYTHING = ("0.0.0.0/0", "::/0")
KEEPALIVE = 25  # seconds; keeps the mapping of common NAT boxes alive
_MAX_LABEL = 100


class InvalidClientConfig(ValueError):
    """A value that a client could misread."""


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """Every field but `name` can only hold what has one meaning in the file; `name` is only ever a comment."""

    name: str
    addresses: tuple[str, ...]
    dns: tuple[str, ...]
    endpoint_host: str
    endpoint_port: int
    server_public_key: PublicKey
    client_public_key: PublicKey
    private_key: PrivateKey | None  # None = the client made the key
    preshared_key: PresharedKey | None
    mtu: int
    allowed_ips: tuple[str, ...] = EVERYTHING
    keepalive: int = KEEPALIVE

    def __post_init__(self) -> None:
        for address in self.addresses:
            check_client_prefix(address)
        for server in self.dns:
            ip_address(server)
        if not set(self.allowed_ips) <= set(EVERYTHING):
            raise InvalidClientConfig(f"allowed IPs are some of {', '.join(EVERYTHING)}")
        if not 1 <= self.endpoint_port <= 65535:
            raise InvalidClientConfig(f"port {self.endpoint_port} is not between 1 and 65535")
        if not is_host(self.endpoint_host):
            raise InvalidClientConfig(f"{self.endpoint_host!r} is neither an address nor a host name")

    @property
    def endpoint(self) -> str:
        host = f"[{self.endpoint_host}]" if ":" in self.endpoint_host else self.endpoint_host
        return f"{host}:{self.endpoint_port}"


def to_conf(config: ClientConfig) -> str:
    """Write a wg-quick(8) file."""
    if config.private_key is not None:
        private_key = f"PrivateKey = {config.private_key.reveal()}"
    else:
        private_key = f"# PrivateKey = (write here the private key of {config.client_public_key})"
    lines = [
        f"# {_comment(config.name)}",
        "[Interface]",
        private_key,
        f"Address = {', '.join(config.addresses)}",
        *([f"DNS = {', '.join(config.dns)}"] if config.dns else []),
        f"MTU = {config.mtu}",
        "",
        "[Peer]",
        f"PublicKey = {config.server_public_key}",
        *([f"PresharedKey = {config.preshared_key.reveal()}"] if config.preshared_key is not None else []),
        f"AllowedIPs = {', '.join(config.allowed_ips)}",
        f"Endpoint = {config.endpoint}",
        f"PersistentKeepalive = {config.keepalive}",
    ]
    return "\n".join(lines) + "\n"


def to_json(config: ClientConfig) -> dict[str, object]:
    return {
        "addresses": list(config.addresses),
        "dns": list(config.dns),
        "endpoint": config.endpoint,
        "server_public_key": str(config.server_public_key),
        "allowed_ips": list(config.allowed_ips),
        "mtu": config.mtu,
        "keepalive": config.keepalive,
        "preshared_key": config.preshared_key.reveal() if config.preshared_key is not None else None,
        "private_key": config.private_key.reveal() if config.private_key is not None else None,
    }


def _comment(text: str) -> str:
    """Free text that stays on its line: no control, format, surrogate or separator character survives."""
    printable = (character if unicodedata.category(character)[0] not in "CZ" else " " for character in text)
    return " ".join("".join(printable).split())[:_MAX_LABEL]
