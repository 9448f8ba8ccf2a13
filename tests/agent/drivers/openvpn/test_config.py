"""The configuration file means the settings and nothing else, whatever the settings hold."""

from __future__ import annotations

import subprocess
from base64 import encodebytes
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from agent.drivers.openvpn import config
from agent.drivers.openvpn.config import Settings, UnsafeSettings
from shared.resource import InvalidResource
from shared.services import OpenVpnServer

unhurried = hypothesis_settings(deadline=None)
LABEL = "OpenVPN tls-crypt-v2 server key"
KEY = encodebytes(bytes(128)).decode().strip()
IFNAMSIZ = 16  # net/if.h
CERTIFICATE = "server.0123456789abcdef.pem"


def pem(label: str, body: str = "QUJD") -> str:
    return f"-----BEGIN {label}-----\n{body}\n-----END {label}-----\n"


SPEC = OpenVpnServer(
    port=1194,
    ipv4_pool="10.70.0.0/16",
    ipv6_pool="fd70::/63",
    dns=("10.70.0.1", "fd70::1"),
    ca=pem("CERTIFICATE"),
    tls_crypt=pem(LABEL, KEY),
)


def settings(transport: str = "udp", **changes: object) -> Settings:
    return config.settings(msgspec.structs.replace(SPEC, **changes), transport, CERTIFICATE, dual_stack=True)


def test_the_transports_share_the_pools_in_halves() -> None:
    assert settings("udp").ipv4 == IPv4Network("10.70.0.0/17")
    assert settings("tcp").ipv4 == IPv4Network("10.70.128.0/17")
    assert settings("udp").ipv6 == IPv6Network("fd70::/64")
    assert settings("tcp").ipv6 == IPv6Network("fd70:0:0:1::/64")


def test_a_pool_that_is_wider_than_openvpn_takes_is_cut() -> None:
    wide = settings("tcp", ipv4_pool="10.0.0.0/8", ipv6_pool="fd70::/48")
    assert wide.ipv4 == IPv4Network("10.128.0.0/16")
    assert wide.ipv6 == IPv6Network("fd70:0:0:8000::/64")


def test_the_file_says_what_makes_the_server_safe() -> None:
    lines, blocks = config.read(config.render(settings()))
    assert {
        ("tls-version-min", "1.3"),
        ("data-ciphers", "AES-256-GCM:AES-128-GCM:CHACHA20-POLY1305"),
        ("verify-client-cert", "optional"),
        ("remote-cert-tls", "client"),
        ("management-client-auth",),
        ("management-hold",),
        ("explicit-exit-notify", "1"),
        ("ping-restart", "60"),
        ("push", "redirect-gateway def1 ipv6"),
        ("push", "dhcp-option DNS 10.70.0.1"),
        ("push", "dhcp-option DNS6 fd70::1"),
    } <= set(lines)
    assert lines[-1] == ("script-security", "0")
    names = {line[0] for line in lines}
    assert names.isdisjoint(
        {"crl-verify", "auth-gen-token", "up", "plugin", "client-connect", "tls-verify", "comp-lzo"}
    )
    assert set(blocks) == {"ca", "tls-crypt-v2"}
    tcp = {line[0] for line in config.read(config.render(settings("tcp")))[0]}
    assert "explicit-exit-notify" not in tcp


def test_the_kernel_passes_data_of_udp_alone_and_only_where_it_is_told_to() -> None:
    def lines(transport: str, *, dco: bool) -> list[tuple[str, ...]]:
        return config.read(config.render(config.settings(SPEC, transport, CERTIFICATE, dual_stack=True, dco=dco)))[0]

    assert ("disable-dco",) in lines("udp", dco=False)
    assert lines("tcp", dco=True) == lines("tcp", dco=False)
    offloaded = lines("udp", dco=True)
    assert ("disable-dco",) not in offloaded
    assert ("push", "ping-restart 60") in offloaded
    assert "ping-restart" not in {line[0] for line in offloaded}  # the kernel would take the counters along


def test_an_offloaded_servers_device_has_a_name_of_its_settings() -> None:
    first = config.settings(SPEC, "udp", CERTIFICATE, dual_stack=True, dco=True)
    other = config.settings(msgspec.structs.replace(SPEC, port=1195), "udp", CERTIFICATE, dual_stack=True, dco=True)
    assert first.device.startswith(config.DEVICES)
    assert len(first.device) == IFNAMSIZ - 1
    assert first.device != other.device
    assert ("dev", first.device) in config.read(config.render(first))[0]
    assert settings().device == ""


HOSTILE = st.text(max_size=60) | st.sampled_from(
    ["x\nscript-security 2\nup /bin/sh", 'a" up "/bin/sh', "\\", "';", "</ca>\nup /bin/sh\n<ca>", "#", "\r\nup x", "\0"]
)
NETWORKS4 = st.tuples(st.ip_addresses(v=4), st.integers(8, 28)).map(lambda x: str(IPv4Network(x, strict=False)))
NETWORKS6 = st.tuples(st.ip_addresses(v=6), st.integers(32, 123)).map(lambda x: str(IPv6Network(x, strict=False)))


@unhurried
@given(
    port=st.integers(1, 65535),
    ipv4_pool=NETWORKS4,
    ipv6_pool=st.none() | NETWORKS6,
    dns=st.lists(st.ip_addresses().map(str), max_size=4).map(tuple),
    mtu=st.integers(1280, 9000),
    keepalive=st.integers(1, 3600),
    max_clients=st.integers(1, 65535),
    transport=st.sampled_from(config.TRANSPORTS),
    dual_stack=st.booleans(),
    dco=st.booleans(),
)
def test_the_file_is_parsed_back_to_the_settings(transport: str, dual_stack: bool, dco: bool, **fields: object) -> None:
    spec = msgspec.structs.replace(SPEC, **fields)
    spec.check()
    wanted = config.settings(spec, transport, CERTIFICATE, dual_stack=dual_stack, dco=dco)
    assert config.parse(config.render(wanted)) == wanted


@unhurried
@given(
    field=st.sampled_from(["ipv4_pool", "ipv6_pool", "dns", "ca", "tls_crypt", "transports"]),
    text=HOSTILE,
    place=st.integers(0, 200),
)
def test_no_text_of_the_controller_adds_an_option(field: str, text: str, place: int) -> None:
    """Smuggled anywhere into any string, and also where `check` was not asked."""
    before = getattr(SPEC, field)
    if isinstance(before, tuple):
        value: object = (before[0][:place] + text + before[0][place:], *before[1:])
    else:
        value = before[:place] + text + before[place:]
    spec = msgspec.structs.replace(SPEC, **{field: value})
    honest = config.read(config.render(settings()))[0]
    try:
        lines, blocks = config.read(config.render(config.settings(spec, "udp", CERTIFICATE, dual_stack=True)))
    except (UnsafeSettings, InvalidResource, ValueError):
        return
    assert len(lines) == len(honest)
    assert [line[0] for line in lines] == [line[0] for line in honest]
    assert {len(line) for line in lines} == {len(line) for line in honest}
    assert set(blocks) == {"ca", "tls-crypt-v2"}
    assert blocks["ca"].startswith("-----BEGIN CERTIFICATE-----\n")


@unhurried
@given(name=HOSTILE)
def test_a_certificate_file_has_our_kind_of_name_only(name: str) -> None:
    with pytest.raises(UnsafeSettings):
        config.render(settings().with_certificate(name))


@unhurried
@given(words=st.lists(HOSTILE, min_size=1, max_size=5))
def test_what_was_quoted_is_read_back_and_nothing_with_a_line_break_is_quoted(words: list[str]) -> None:
    try:
        line = " ".join(config.quote(word) for word in words)
    except UnsafeSettings:
        assert not all(word.isprintable() for word in words)
        return
    assert config.read(f"push {line}\n")[0] == [("push", *words)]


@pytest.mark.parametrize("extra", ["up /bin/sh\n", "script-security 2\n", "# a comment\n", "\n"])
def test_a_file_that_somebody_changed_is_not_ours(extra: str) -> None:
    with pytest.raises(UnsafeSettings):
        config.parse(config.render(settings()) + extra)


def test_openvpn_reads_the_file_as_we_do(tmp_path: Path) -> None:
    """Its own reader refuses our file with a line that it does not know, and names the line: all before were read."""
    path = tmp_path / "server.conf"
    text = config.render(settings())
    path.write_text(text.replace("script-security 0\n", "no-such-option 0\n"))
    done = subprocess.run(
        ("openvpn", "--cd", str(tmp_path), "--config", str(path)),
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    number = text.split("\n").index("script-security 0") + 1
    assert f"Unrecognized option or missing or extra parameter(s) in {path}:{number}: no-such-option" in done.stdout


def test_the_name_of_the_settings_changes_with_each_of_them() -> None:
    texts = {
        config.render(each)
        for each in (
            settings(),
            settings("tcp"),
            settings(port=1195),
            settings(dns=()),
            settings(mtu=1400),
            settings(ca=pem("CERTIFICATE", "REVG")),
            settings(tls_crypt=pem(LABEL, KEY.replace("A", "B", 1))),
            settings().with_certificate("server.ffffffffffffffff.pem"),
        )
    }
    assert len({config.token(text) for text in texts}) == len(texts) == 8


@pytest.mark.parametrize("body", ["QUJD", KEY + "\nQUJD", "", "A"])
def test_a_key_of_another_length_is_refused(body: str) -> None:
    """OpenVPN itself would serve with it."""
    with pytest.raises(UnsafeSettings):
        settings(tls_crypt=pem(LABEL, body))


def test_settings_show_no_key() -> None:
    assert "QUJD" not in repr(settings())
