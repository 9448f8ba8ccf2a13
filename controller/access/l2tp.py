"""The configuration of an L2TP/IPsec client: what its user types into the telephone's settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from controller.access.clientconfig import check_endpoint, check_typed, check_username, comment
from shared.services import L2TP_PORT


@dataclass(frozen=True, slots=True, kw_only=True)
class L2tpConfig:
    file_name: ClassVar[str] = "skynetvpn-l2tp.txt"
    media: ClassVar[str] = "text/plain"

    name: str
    host: str
    psk: str = field(repr=False)
    username: str
    password: str = field(repr=False)

    def __post_init__(self) -> None:
        check_endpoint(self.host, L2TP_PORT)
        check_username(self.username)
        check_typed("password", self.password)
        check_typed("pre-shared key", self.psk)

    def to_conf(self) -> str:
        lines = [
            f"# {comment(self.name)}",
            "# L2TP/IPsec with a pre-shared key",
            f"server: {self.host}",
            f"pre-shared key: {self.psk}",
            f"username: {self.username}",
            f"password: {self.password}",
        ]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, object]:
        return {
            "protocol": "l2tp",
            "host": self.host,
            "psk": self.psk,
            "username": self.username,
            "password": self.password,
        }
