"""A rendered configuration says exactly what the model says, whatever the texts in it are."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.access.clientconfig import InvalidClientConfig
from controller.tunnels.clientconfig import WireGuardConfig
from shared.keys import PresharedKey, PrivateKey, PublicKey

SERVER = PrivateKey(b"s" * 32).public()
CLIENT = PrivateKey(b"c" * 32)
PLAIN = WireGuardConfig(
    name="SkynetVPN fra1",
    addresses=("10.66.0.2/32", "fd66::2/128"),
    dns=("9.9.9.9", "2620:fe::9"),
    endpoint_host="vpn.example.com",
    endpoint_port=51820,
    server_public_key=SERVER,
    client_public_key=CLIENT.public(),
    private_key=CLIENT,
    preshared_key=PresharedKey(b"p" * 32),
    mtu=1420,
)
NASTY = "\n\r\0\x85\u2028\u2029\u202e\x1b;|$()`\"'#%=[]Interface"

keys = st.binary(min_size=32, max_size=32).filter(any)
hosts = (
    st.ip_addresses(v=4).map(str)
    | st.ip_addresses(v=6).map(str)
    | st.from_regex(r"[a-z][a-z0-9]{0,10}(\.[a-z][a-z0-9]{0,10}){0,3}", fullmatch=True)
)


def is_unicast(address: IPv4Address | IPv6Address) -> bool:
    mapped = isinstance(address, IPv6Address) and address.ipv4_mapped is not None
    return not (
        mapped or address.is_unspecified or address.is_loopback or address.is_multicast or address.is_link_local
    )


def is_dialled(host: str) -> bool:
    try:
        WireGuardConfig(**{**fields(PLAIN), "endpoint_host": host})  # type: ignore[arg-type]
    except InvalidClientConfig:
        return False
    return True


def fields(config: WireGuardConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in WireGuardConfig.__slots__}


configs = st.builds(
    WireGuardConfig,
    name=st.text(max_size=200) | st.text(alphabet=NASTY, max_size=50),
    addresses=st.tuples(
        st.ip_addresses(v=4).filter(is_unicast).map(lambda address: f"{address}/32"),
        st.ip_addresses(v=6).filter(is_unicast).map(lambda address: f"{address}/128"),
    ),
    dns=st.lists(st.ip_addresses().map(str), max_size=3).map(tuple),
    endpoint_host=hosts.filter(is_dialled),
    endpoint_port=st.integers(1, 65535),
    server_public_key=keys.map(PublicKey),
    client_public_key=keys.map(PublicKey),
    private_key=st.none() | keys.map(PrivateKey),
    preshared_key=st.none() | keys.map(PresharedKey),
    mtu=st.integers(1280, 9000),
    keepalive=st.integers(0, 65535),
)


def parse(conf: str) -> dict[str, dict[str, str]]:
    """Read a wg-quick file strictly: known sections and keys once each, in a file of plain printable lines."""
    known = {
        "Interface": {"PrivateKey", "Address", "DNS", "MTU"},
        "Peer": {"PublicKey", "PresharedKey", "AllowedIPs", "Endpoint", "PersistentKeepalive"},
    }
    sections: dict[str, dict[str, str]] = {}
    assert conf.endswith("\n")
    assert conf.splitlines() == conf.removesuffix("\n").split("\n"), "another kind of line break"
    for line in conf.splitlines():
        assert all(character.isprintable() for character in line)
        line = line.partition("#")[0].strip()
        if not line:
            continue
        if line.startswith("["):
            section = line.strip("[]")
            assert section in known and section not in sections
            sections[section] = {}
            continue
        key, separator, value = line.partition(" = ")
        assert separator and key in known[section] and key not in sections[section]
        sections[section][key] = value
    return sections


@given(configs)
def test_a_rendered_file_reads_back_as_the_model(config: WireGuardConfig) -> None:
    sections = parse(config.to_conf())
    interface = {"Address": ", ".join(config.addresses), "MTU": str(config.mtu)}
    if config.private_key is not None:
        interface["PrivateKey"] = config.private_key.reveal()
    if config.dns:
        interface["DNS"] = ", ".join(config.dns)
    peer = {
        "PublicKey": str(config.server_public_key),
        "AllowedIPs": ", ".join(config.allowed_ips),
        "Endpoint": config.endpoint,
        "PersistentKeepalive": str(config.keepalive),
    }
    if config.preshared_key is not None:
        peer["PresharedKey"] = config.preshared_key.reveal()
    assert sections == {"Interface": interface, "Peer": peer}


@given(st.text(alphabet=NASTY))
def test_a_name_never_leaves_its_comment(name: str) -> None:
    assert replace(PLAIN, name=name).to_conf().splitlines()[1:] == PLAIN.to_conf().splitlines()[1:]


def test_a_client_made_key_is_asked_for_in_a_comment() -> None:
    conf = replace(PLAIN, private_key=None).to_conf()
    assert "PrivateKey" not in parse(conf)["Interface"]
    assert f"# PrivateKey = (write here the private key of {CLIENT.public()})" in conf


@pytest.mark.parametrize(
    ("host", "endpoint"),
    [("198.51.100.7", "198.51.100.7:51820"), ("2001:db8::7", "[2001:db8::7]:51820"), ("a.example", "a.example:51820")],
)
def test_an_ipv6_endpoint_stands_in_brackets(host: str, endpoint: str) -> None:
    assert replace(PLAIN, endpoint_host=host).endpoint == endpoint


@pytest.mark.parametrize(
    "change",
    [
        {"endpoint_host": "a\nPostUp = id"},
        {"endpoint_host": "a b"},
        {"endpoint_host": ""},
        {"endpoint_host": "fe80::1%eth0"},
        {"endpoint_port": 0},
        {"dns": ("9.9.9.9\nPostUp = id",)},
        {"dns": ("fe80::1%x\nPostUp = id",)},
        {"addresses": ("0.0.0.0/0",)},
        {"addresses": ("10.0.0.1/32\n",)},
        {"allowed_ips": ("0.0.0.0/0\n",)},
    ],
)
def test_a_value_with_two_meanings_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        replace(PLAIN, **change)  # type: ignore[arg-type]


def test_json_has_the_documented_keys() -> None:
    assert replace(PLAIN, preshared_key=None, private_key=None).to_json() == {
        "addresses": ["10.66.0.2/32", "fd66::2/128"],
        "dns": ["9.9.9.9", "2620:fe::9"],
        "endpoint": "vpn.example.com:51820",
        "server_public_key": str(SERVER),
        "allowed_ips": ["0.0.0.0/0", "::/0"],
        "mtu": 1420,
        "keepalive": 25,
        "preshared_key": None,
        "private_key": None,
    }
    shown = PLAIN.to_json()
    assert shown["private_key"] == CLIENT.reveal()
    assert shown["preshared_key"] == PresharedKey(b"p" * 32).reveal()


def test_wg_quick_itself_reads_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sky0.conf"
    path.write_text(replace(PLAIN, name="x\n[Peer]\nPublicKey = y").to_conf())
    path.chmod(0o600)
    shown = subprocess.run(["wg-quick", "strip", str(path)], capture_output=True, text=True, timeout=30, check=True)
    assert [line.split(" = ")[0] for line in shown.stdout.splitlines() if " = " in line and "#" not in line] == [
        "PrivateKey",
        "PublicKey",
        "PresharedKey",
        "AllowedIPs",
        "Endpoint",
        "PersistentKeepalive",
    ]


def test_secrets_do_not_show_in_the_representation() -> None:
    assert CLIENT.reveal() not in repr(PLAIN)
    assert repr(CLIENT.raw) not in repr(PLAIN)
