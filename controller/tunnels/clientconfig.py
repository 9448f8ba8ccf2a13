"""The configuration of a WireGuard client: a wg-quick(8) file, or its fields as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from controller.access.clientconfig import InvalidClientConfig, check_endpoint, comment, join_port
from shared.addresses import check_client_prefix, check_name_server
from shared.keys import PresharedKey, PrivateKey, PublicKey

EVERYTHING = ("0.0.0.0/0", "::/0")
KEEPALIVE = 25  # seconds; keeps the mapping of common NAT boxes alive


@dataclass(frozen=True, slots=True)
class WireGuardConfig:
    """Every field but `name` can only hold what has one meaning in the file; `name` is only ever a comment."""

    file_name: ClassVar[str] = "skynetvpn.conf"
    media: ClassVar[str] = "text/plain"

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
            check_name_server(server)
        if not set(self.allowed_ips) <= set(EVERYTHING):
            raise InvalidClientConfig(f"allowed IPs are some of {', '.join(EVERYTHING)}")
        check_endpoint(self.endpoint_host, self.endpoint_port)

    @property
    def endpoint(self) -> str:
        return join_port(self.endpoint_host, self.endpoint_port)

    def to_conf(self) -> str:
        if self.private_key is not None:
            private_key = f"PrivateKey = {self.private_key.reveal()}"
        else:
            private_key = f"# PrivateKey = (write here the private key of {self.client_public_key})"
        lines = [
            f"# {comment(self.name)}",
            "[Interface]",
            private_key,
            f"Address = {', '.join(self.addresses)}",
            *([f"DNS = {', '.join(self.dns)}"] if self.dns else []),
            f"MTU = {self.mtu}",
            "",
            "[Peer]",
            f"PublicKey = {self.server_public_key}",
            *([f"PresharedKey = {self.preshared_key.reveal()}"] if self.preshared_key is not None else []),
            f"AllowedIPs = {', '.join(self.allowed_ips)}",
            f"Endpoint = {self.endpoint}",
            f"PersistentKeepalive = {self.keepalive}",
        ]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, object]:
        return {
            "addresses": list(self.addresses),
            "dns": list(self.dns),
            "endpoint": self.endpoint,
            "server_public_key": str(self.server_public_key),
            "allowed_ips": list(self.allowed_ips),
            "mtu": self.mtu,
            "keepalive": self.keepalive,
            "preshared_key": self.preshared_key.reveal() if self.preshared_key is not None else None,
            "private_key": self.private_key.reveal() if self.private_key is not None else None,
        }
