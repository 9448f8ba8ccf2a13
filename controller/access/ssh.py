"""The configuration of an SSH client: a fragment of ssh_config(5), with what else it needs in comments."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

from controller.access.clientconfig import InvalidClientConfig, check_endpoint, check_typed, check_username, comment
from shared.access import parse_ssh_key

PROXY = "127.0.0.1:1080"  # where the client's SOCKS proxy listens
_LOST_KEEPALIVES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SshConfig:
    file_name: ClassVar[str] = "skynetvpn-ssh.conf"
    media: ClassVar[str] = "text/plain"

    name: str
    host: str
    port: int
    username: str
    password: str = field(repr=False)
    host_keys: tuple[str, ...]  # bare `type base64`
    tcp_forwarding: bool
    tun: bool
    keepalive: int  # seconds

    def __post_init__(self) -> None:
        check_endpoint(self.host, self.port)
        check_username(self.username)
        check_typed("password", self.password)
        for key in self.host_keys:
            if parse_ssh_key(key) != key:
                raise InvalidClientConfig("a host key is `type base64`")
        if not 1 <= self.keepalive <= 3600:
            raise InvalidClientConfig(f"keepalive {self.keepalive} is not between 1 and 3600 seconds")

    @property
    def alias(self) -> str:
        """What the user types after `ssh`."""
        return "skynetvpn" + re.sub(r"[^a-z0-9]+", "-", f"-{self.name.removeprefix('SkynetVPN').lower()}").rstrip("-")

    def to_conf(self) -> str:
        place = self.host if self.port == 22 else f"[{self.host}]:{self.port}"
        lines = [
            f"# {comment(self.name)}",
            f"# Password: {self.password}",
            "# The server's keys, for ~/.ssh/known_hosts:",
            *(f"#   {place} {key}" for key in self.host_keys),
            f"# With the lines below in ~/.ssh/config, connect by: ssh {self.alias}",
            f"Host {self.alias}",
            f"    HostName {self.host}",
            f"    Port {self.port}",
            f"    User {self.username}",
            "    StrictHostKeyChecking yes",
            "    PubkeyAuthentication no",
            "    PreferredAuthentications password",
            "    IgnoreUnknown SessionType",  # before OpenSSH 8.7, which has to be told by -N
            "    SessionType none",
            "    RequestTTY no",
            "    ForwardAgent no",
            "    ForwardX11 no",
            f"    ServerAliveInterval {self.keepalive}",
            f"    ServerAliveCountMax {_LOST_KEEPALIVES}",
            "    ExitOnForwardFailure yes",
            *([f"    DynamicForward {PROXY}"] if self.tcp_forwarding else []),
            *(["    Tunnel point-to-point"] if self.tun and not self.tcp_forwarding else []),
        ]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, object]:
        return {
            "protocol": "ssh",
            "host": self.host,
            "port": self.port,
            "username": self.username,
            "password": self.password,
            "host_keys": list(self.host_keys),
            "tcp_forwarding": self.tcp_forwarding,
            "tun": self.tun,
        }
