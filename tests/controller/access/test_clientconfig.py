"""Rendered configurations say exactly what the model says, to the programs that read them."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from agent.drivers.openvpn.config import read
from controller.access.clientconfig import InvalidClientConfig
from controller.access.l2tp import L2tpConfig
from controller.access.openvpn import OpenVpnConfig
from controller.access.ssh import SshConfig
from controller.fleet import certificates, tlscrypt
from controller.fleet.certificates import Issuer
from controller.fleet.nodes import is_host
from controller.fleet.vpnkeys import VpnKeys
from controller.store.types import now
from shared.addresses import InvalidAddress
from shared.resource import InvalidResource
from shared.services import SshServer

NASTY = "\n\r\0\x85\u2028\u2029\u202e\x1b;|$()`\"'\\#%=[]<>/ca*?! "
ED25519 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJaZfvpNVJqhSrHg9a1nxhUAYAJ9qYdfHZXBJCq2eSZs"
ECDSA = "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBEmKSENjQEezOmxkZMy7opKgwFB9"


def material(username: str = "sky-abcdefgh2345") -> OpenVpnConfig:
    key = ec.generate_private_key(ec.SECP256R1())
    authority = certificates.authority_certificate(key, now(), certificates.VPN_AUTHORITY)
    keys = VpnKeys(Issuer(authority, key), tlscrypt.new_server_key())
    client = keys.client_certificate(username, timedelta(days=3650))
    return OpenVpnConfig(
        name="SkynetVPN fra1",
        host="vpn.example.com",
        port=1194,
        transports=("udp", "tcp"),
        server_name="0197a1b2-7c3d-7e4f-8a5b-6c7d8e9f0a1b",
        username=username,
        ca=keys.ca,
        certificate=client.certificate,
        private_key=client.private_key,
        tls_crypt=keys.tls_crypt_client_key(),
    )


OPENVPN = material()
SSH = SshConfig(
    name="SkynetVPN fra1",
    host="vpn.example.com",
    port=2222,
    username="sky-abcdefgh2345",
    password="Zq3vR8tY1kLm5nPw7sXc9dFg",
    host_keys=(ED25519,),
    tcp_forwarding=True,
    tun=False,
    keepalive=15,
)
TUN = replace(
    SSH,
    tcp_forwarding=False,
    tun=True,
    tunnel=SshServer(port=2222, tun=True, ipv4_pool="10.68.0.0/16").tunnel(300),
    dns=("1.1.1.1", "2606:4700:4700::1111"),
)
L2TP = L2tpConfig(
    name="SkynetVPN fra1",
    host="vpn.example.com",
    psk="a key, with: spaces",
    username="sky-abcdefgh2345",
    password="Zq3vR8tY1kLm5nPw7sXc9dFg",
)

names = st.text(max_size=200) | st.text(alphabet=NASTY, max_size=50)
hosts = (
    st.ip_addresses(v=4).map(str)
    | st.ip_addresses(v=6).map(str)
    | st.from_regex(r"[a-z][a-z0-9]{0,10}(\.[a-z][a-z0-9]{0,10}){0,3}", fullmatch=True)
).filter(is_host)
usernames = st.from_regex(r"[a-z_][a-z0-9_-]{0,30}", fullmatch=True)
secrets = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=255)
ports = st.integers(1, 65535)
bodies = st.binary(min_size=1, max_size=400)


def pem(label: str) -> st.SearchStrategy[str]:
    return bodies.map(lambda data: tlscrypt._pem(label, data))


openvpn_configs = st.builds(
    OpenVpnConfig,
    name=names,
    host=hosts,
    port=ports,
    transports=st.sampled_from([("udp", "tcp"), ("udp",), ("tcp",), ("tcp", "udp")]),
    server_name=st.uuids().map(str),
    username=usernames,
    ca=pem("CERTIFICATE"),
    certificate=pem("CERTIFICATE"),
    private_key=pem("PRIVATE KEY"),
    tls_crypt=pem("OpenVPN tls-crypt-v2 client key"),
)
ssh_configs = st.builds(
    SshConfig,
    name=names,
    host=hosts,
    port=ports,
    username=usernames,
    password=secrets,
    host_keys=st.lists(st.sampled_from([ED25519, ECDSA]), max_size=2).map(tuple),
    tcp_forwarding=st.booleans(),
    tun=st.booleans(),
    tunnel=st.none() | st.integers(1, 60000).map(SshServer(port=1, tun=True, ipv4_pool="10.68.0.0/16").tunnel),
    dns=st.lists(st.ip_addresses().filter(lambda address: "%" not in str(address)).map(str), max_size=4).map(tuple),
    keepalive=st.integers(1, 3600),
)
l2tp_configs = st.builds(L2tpConfig, name=names, host=hosts, psk=secrets, username=usernames, password=secrets)


def plain_lines(conf: str) -> list[str]:
    """The lines of a file in which no character does anything but be read."""
    assert conf.endswith("\n")
    lines = conf.removesuffix("\n").split("\n")
    assert conf.splitlines() == lines, "another kind of line break"
    assert all(line.isprintable() for line in lines)
    return lines


@given(openvpn_configs)
def test_an_openvpn_profile_reads_back_as_the_model(config: OpenVpnConfig) -> None:
    plain_lines(config.to_conf())
    options, blocks = read(config.to_conf())
    assert blocks == {
        "ca": config.ca,
        "cert": config.certificate,
        "key": config.private_key,
        "tls-crypt-v2": config.tls_crypt,
    }
    remotes = [option[1:] for option in options if option[0] == "remote"]
    assert remotes == [(config.host, str(config.port), transport) for transport in config.transports]
    rest = {option[0]: option[1:] for option in options if option[0] != "remote"}
    assert rest.pop("explicit-exit-notify", None) == (("1",) if "udp" in config.transports else None)
    assert rest == {
        "client": (),
        "dev": ("tun",),
        "nobind": (),
        "persist-tun": (),
        "server-poll-timeout": ("5",),
        "remote-cert-tls": ("server",),
        "verify-x509-name": (config.server_name, "name"),
        "tls-version-min": ("1.3",),
        "data-ciphers": ("AES-256-GCM:CHACHA20-POLY1305:AES-128-GCM",),
        "auth-nocache": (),
    }


@given(ssh_configs)
def test_an_ssh_fragment_reads_back_as_the_model(config: SshConfig) -> None:
    lines = plain_lines(config.to_conf())
    comments = [line for line in lines if line.startswith("#")]
    assert comments[1] == f"# Password: {config.password}"
    place = config.host if config.port == 22 else f"[{config.host}]:{config.port}"
    assert [line for line in comments if line.startswith("#   ")] == [f"#   {place} {key}" for key in config.host_keys]
    first, *options = lines[len(comments) :]
    assert first == f"Host {config.alias}" and set(config.alias) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    told = dict(line.removeprefix("    ").split(" ", 1) for line in options)
    assert len(told) == len(options)
    assert (told["HostName"], told["Port"], told["User"]) == (config.host, str(config.port), config.username)
    assert told["ServerAliveInterval"] == str(config.keepalive)
    assert ("DynamicForward" in told) == config.tcp_forwarding
    assert ("Tunnel" in told) == (config.tunnel is not None and not config.tcp_forwarding)
    if config.tunnel is not None:
        device, number = config.tunnel.device, config.tunnel.number
        assert told["TunnelDevice"] == f"{number}:{number}"
        assert f"# $ ip address add {config.tunnel.client} peer {config.tunnel.server} dev {device}" in comments
    assert (told["StrictHostKeyChecking"], told["ForwardAgent"], told["ForwardX11"]) == ("yes", "no", "no")


@given(l2tp_configs)
def test_what_an_l2tp_client_asks_for_reads_back_as_the_model(config: L2tpConfig) -> None:
    _, _, *lines = plain_lines(config.to_conf())
    assert dict(line.split(": ", 1) for line in lines) == {
        "server": config.host,
        "pre-shared key": config.psk,
        "username": config.username,
        "password": config.password,
    }


@pytest.mark.parametrize("config", [OPENVPN, SSH, TUN, L2TP], ids=["openvpn", "ssh", "tun", "l2tp"])
@given(name=st.text(alphabet=NASTY))
def test_a_name_never_leaves_its_comment(config: Any, name: str) -> None:
    def rest(conf: str) -> list[str]:
        return [line for line in conf.splitlines()[1:] if "skynetvpn" not in line]  # but for the alias

    assert rest(replace(config, name=name).to_conf()) == rest(config.to_conf())


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (OPENVPN, {"host": "a\nup /bin/id"}),
        (OPENVPN, {"host": ""}),
        (OPENVPN, {"host": "fe80::1%eth0"}),
        (OPENVPN, {"port": 0}),
        (OPENVPN, {"transports": ()}),
        (OPENVPN, {"transports": ("udp\n",)}),
        (OPENVPN, {"server_name": "a b"}),
        (OPENVPN, {"username": "Alice"}),
        (OPENVPN, {"ca": ""}),
        (OPENVPN, {"ca": OPENVPN.ca + OPENVPN.ca}),
        (OPENVPN, {"ca": OPENVPN.private_key}),
        (OPENVPN, {"certificate": OPENVPN.certificate.replace("\n", "\n</cert>\nup /bin/id\n<cert>\n", 1)}),
        (OPENVPN, {"private_key": OPENVPN.private_key.replace("\n", "\r\n")}),
        (OPENVPN, {"tls_crypt": OPENVPN.tls_crypt.replace("client", "server")}),
        (SSH, {"host": "a b"}),
        (SSH, {"port": 65536}),
        (SSH, {"username": "a\nProxyCommand id"}),
        (SSH, {"password": "a\nHost *"}),
        (SSH, {"password": ""}),
        (SSH, {"host_keys": (f"{ED25519}\n",)}),
        (SSH, {"host_keys": (f"{ED25519} comment",)}),
        (SSH, {"host_keys": ('command="id" ' + ED25519,)}),
        (SSH, {"keepalive": 0}),
        (SSH, {"dns": ("1.1.1.1\nProxyCommand id",)}),
        (SSH, {"dns": ("fe80::1%x\n",)}),
        (L2TP, {"host": "a\n"}),
        (L2TP, {"psk": "a\nb"}),
        (L2TP, {"password": "é"}),
        (L2TP, {"username": ""}),
    ],
)
def test_a_value_with_two_meanings_is_refused(config: Any, change: dict[str, object]) -> None:
    with pytest.raises((InvalidClientConfig, InvalidResource, InvalidAddress)):
        replace(config, **change)


@pytest.mark.parametrize("config", [OPENVPN, SSH, TUN, L2TP], ids=["openvpn", "ssh", "tun", "l2tp"])
def test_secrets_do_not_show_in_the_representation(config: Any) -> None:
    shown = repr(config)
    for name in ("private_key", "tls_crypt", "password", "psk"):
        secret = getattr(config, name, None)
        assert secret is None or (secret not in shown and repr(secret) not in shown)


def test_json_has_what_the_file_has() -> None:
    assert OPENVPN.to_json() == {
        "protocol": "openvpn",
        "host": "vpn.example.com",
        "port": 1194,
        "transports": ["udp", "tcp"],
        "server_name": OPENVPN.server_name,
        "username": "sky-abcdefgh2345",
        "ca": OPENVPN.ca,
        "certificate": OPENVPN.certificate,
        "private_key": OPENVPN.private_key,
        "tls_crypt_v2": OPENVPN.tls_crypt,
    }
    assert SSH.to_json() == {
        "protocol": "ssh",
        "host": "vpn.example.com",
        "port": 2222,
        "username": "sky-abcdefgh2345",
        "password": "Zq3vR8tY1kLm5nPw7sXc9dFg",
        "host_keys": [ED25519],
        "tcp_forwarding": True,
        "tun": False,
        "tunnel": None,
    }
    assert (TUN.to_json()["tun"], TUN.to_json()["tunnel"]) == (
        True,
        {
            "number": 1_900_000_300,
            "address": "10.68.1.45",
            "server_address": "10.68.0.1",
            "dns": ["1.1.1.1", "2606:4700:4700::1111"],
        },
    )
    assert L2TP.to_json() == {
        "protocol": "l2tp",
        "host": "vpn.example.com",
        "psk": "a key, with: spaces",
        "username": "sky-abcdefgh2345",
        "password": "Zq3vR8tY1kLm5nPw7sXc9dFg",
    }


def test_openvpn_itself_takes_the_profile(tmp_path: Path) -> None:
    """It reads every option, loads the keys, tries both remotes where nobody listens, and gives up."""
    path = tmp_path / "client.ovpn"
    path.write_text(replace(OPENVPN, host="127.0.0.1", port=1, name="x\n</ca>\nup /bin/id").to_conf())
    path.chmod(0o600)
    quick = ["--dev", "null", "--verb", "3", "--connect-timeout", "1", "--connect-retry", "1", "1"]
    once = ["--connect-retry-max", "1"]
    ran = subprocess.run(["openvpn", "--config", str(path), *quick, *once], capture_output=True, text=True, timeout=60)
    assert "Options error" not in ran.stdout and "Error" not in ran.stdout
    assert "All connections have been connect-retry-max (1) times unsuccessful" in ran.stdout
    assert "UDPv4" in ran.stdout and "TCP" in ran.stdout


@pytest.mark.parametrize("host", ["vpn.example.com", "198.51.100.7", "2001:db8::7"])
def test_ssh_itself_takes_the_fragment(tmp_path: Path, host: str) -> None:
    config = replace(SSH, host=host, name="Frankfurt / 1\nHost *", password="#x Host * \\")
    path, known = tmp_path / "config", tmp_path / "known_hosts"
    path.write_text(config.to_conf())
    path.chmod(0o600)
    shown = subprocess.run(
        ["ssh", "-G", "-F", str(path), config.alias], capture_output=True, text=True, timeout=30, check=True
    ).stdout.splitlines()
    assert {f"hostname {host}", "port 2222", "user sky-abcdefgh2345", "stricthostkeychecking true"} <= set(shown)
    assert {"dynamicforward [127.0.0.1]:1080", "sessiontype none", "pubkeyauthentication false"} <= set(shown)
    assert config.alias == "skynetvpn-frankfurt-1-host"
    known.write_text("".join(line[4:] + "\n" for line in config.to_conf().splitlines() if line.startswith("#   ")))
    found = subprocess.run(
        ["ssh-keygen", "-F", f"[{host}]:2222", "-f", str(known)], capture_output=True, text=True, timeout=30, check=True
    )
    assert ED25519 in found.stdout


def test_ssh_itself_takes_the_tunnel(tmp_path: Path) -> None:
    def shown(config: SshConfig, *options: str) -> list[str]:
        path = tmp_path / "config"
        path.write_text(config.to_conf())
        argv = ["ssh", "-G", "-F", str(path), *options, config.alias]
        return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()

    tunnel = {"tunnel point-to-point", "tunneldevice 1900000300:1900000300"}
    assert tunnel <= set(shown(TUN)) and "dynamicforward [127.0.0.1]:1080" not in shown(TUN)
    both = replace(TUN, tcp_forwarding=True)
    assert {"tunnel false", "dynamicforward [127.0.0.1]:1080"} <= set(shown(both))
    assert tunnel <= set(shown(both, "-o", "Tunnel=point-to-point"))
    assert "# $ ssh -f -o Tunnel=point-to-point skynetvpn-fra1\n" in both.to_conf()
