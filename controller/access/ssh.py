"""The configuration of an SSH client: a fragment of ssh_config(5), with what else it needs in comments."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

from controller.access.clientconfig import InvalidClientConfig, check_endpoint, check_typed, check_username, comment
from shared.access import parse_ssh_key
from shared.addresses import check_name_server
from shared.services import SshTunnel

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
    tunnel: SshTunnel | None = None  # the login's own, where the server has one for it
    dns: tuple[str, ...] = ()  # by the tunnel
    keepalive: int  # seconds

    def __post_init__(self) -> None:
        check_endpoint(self.host, self.port)
        check_username(self.username)
        check_typed("password", self.password)
        for key in self.host_keys:
            if parse_ssh_key(key) != key:
                raise InvalidClientConfig("a host key is `type base64`")
        for server in self.dns:
            check_name_server(server)
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
            *self._tunnel_commands(),
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
            *self._tunnel_options(),
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
            "tunnel": None
            if self.tunnel is None
            else {
                "number": self.tunnel.number,
                "address": str(self.tunnel.client),
                "server_address": str(self.tunnel.server),
                "dns": list(self.dns),
            },
        }

    def _tunnel_options(self) -> list[str]:
        """Of the same number at both ends: the name of the client's device is known, and nobody else's."""
        if self.tunnel is None:
            return []
        device = f"    TunnelDevice {self.tunnel.number}:{self.tunnel.number}"
        return [device] if self.tcp_forwarding else [device, "    Tunnel point-to-point"]

    def _tunnel_commands(self) -> list[str]:
        if self.tunnel is None:
            return []
        device = self.tunnel.device
        option = "-o Tunnel=point-to-point " if self.tcp_forwarding else ""
        return [
            "# As a tunnel for all of IPv4, by root; it ends with the process of ssh:",
            f"# $ ssh -f {option}{self.alias}",
            f"# $ ip address add {self.tunnel.client} peer {self.tunnel.server} dev {device}",
            f"# $ ip link set {device} up",
            "# $ ip route add ADDRESS-OF-THE-SERVER via GATEWAY    (yours: ip route show default)",
            f"# $ ip route add 0.0.0.0/1 dev {device} && ip route add 128.0.0.0/1 dev {device}",
            *([f"# Name servers: {', '.join(self.dns)}"] if self.dns else []),
        ]
