"""From a login and the server that it is for to what its client needs; pure."""

from __future__ import annotations

from controller.access.clientconfig import ClientConfig
from controller.access.l2tp import L2tpConfig
from controller.access.logins import Login
from controller.access.openvpn import OpenVpnConfig
from controller.access.ssh import SshConfig
from controller.fleet import directory
from shared.services import L2tpServer, OpenVpnServer, Server, SshServer


def client_config(node: directory.Server, server: Server, login: Login) -> ClientConfig:
    name = f"SkynetVPN {node.name}"
    match server:
        case OpenVpnServer():
            return OpenVpnConfig(
                name=name,
                host=node.host,
                port=server.port,
                transports=server.transports,
                server_name=node.id,
                username=login.username,
                ca=server.ca,
                certificate=login.certificate,
                private_key=login.private_key,
                tls_crypt=login.tls_crypt,
            )
        case SshServer():
            return SshConfig(
                name=name,
                host=node.host,
                port=server.port,
                username=login.username,
                password=login.password,
                host_keys=node.ssh_host_keys,
                tcp_forwarding=server.tcp_forwarding,
                tun=server.tun,
                tunnel=server.tunnel(login.tunnel),
                dns=tuple(address for address in server.dns if ":" not in address),  # the tunnel is of IPv4
                keepalive=server.keepalive,
            )
        case L2tpServer():
            return L2tpConfig(
                name=name, host=node.host, psk=server.psk, username=login.username, password=login.password
            )
