"""What our rendered files mean to the programs that read them: each is read back by that program's rules."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from ipaddress import IPv4Network, ip_address
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.drivers.l2tp.files import (
    chap_secrets,
    connection,
    hooks,
    ppp_options,
    read_chap_secrets,
    refusal,
    ruleset,
    strongswan_conf,
    xl2tpd_conf,
)
from shared.access import Credential
from shared.resource import Protocol
from shared.services import L2tpServer

PRINTABLE = "".join(chr(code) for code in range(32, 127))
_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "s": " ", "t": "\t"}

names = st.from_regex(r"[a-z_][a-z0-9_-]{0,30}", fullmatch=True)
passwords = st.text(PRINTABLE, min_size=1, max_size=255)
pools = st.integers(0, 2**32 - 1).flatmap(
    lambda number: st.integers(8, 28).map(lambda prefix: str(IPv4Network((number, prefix), strict=False)))
)
servers = st.builds(
    L2tpServer,
    psk=st.text(PRINTABLE, min_size=8, max_size=255),
    ipv4_pool=pools,
    dns=st.lists(st.ip_addresses().map(str), max_size=4).map(tuple),
    mtu=st.integers(576, 1460),
)


def words(text: str) -> Iterator[list[str]]:
    """The lines of a file as words, by the rules that pppd(8) gives for its files."""
    line: list[str] = []
    word: str | None = None
    quote = ""
    at = 0
    while at < len(text):
        char = text[at]
        at += 1
        if char == "\\":
            value, at = _escaped(text, at)
            word = (word or "") + value
        elif quote:
            if char == quote:
                quote = ""
            else:
                word = (word or "") + char
        elif char in "'\"":
            quote, word = char, word or ""
        elif char == "#" or char.isspace():
            if word is not None:
                line.append(word)
                word = None
            if char == "#":
                at = text.find("\n", at)
                at = len(text) if at < 0 else at
            elif char == "\n":
                if line:
                    yield line
                line = []
        else:
            word = (word or "") + char
    if word is not None:
        line.append(word)
    if line:
        yield line


def _escaped(text: str, at: int) -> tuple[str, int]:
    char = text[at]
    if char == "\n":
        return "", at + 1
    if char in _ESCAPES:
        return _ESCAPES[char], at + 1
    for first, digits, base, most in ((0, string.octdigits, 8, 3), (1, string.hexdigits, 16, 2)):
        if (char == "x") if first else (char in digits):
            end = at + first
            while end < len(text) and end < at + first + most and text[end] in digits:
                end += 1
            return chr(int(text[at + first : end] or "0", base)), end
    return char, at + 1


def test_the_reader_knows_the_rules_of_pppd() -> None:
    text = 'a \'b c\' "d\\"e" f\\sg # h\n\n  \\#i\\061\\x41 j\\\nk\n'
    assert list(words(text)) == [["a", "b c", 'd"e', "f g"], ["#i1A", "jk"]]


@given(st.dictionaries(names, passwords, max_size=5))
@example({"a": '"', "b": "\\", "c": "\\\\n", "d": "# x", "e": "'", "f": " ", "g": '\\"'})
@example({"a": PRINTABLE, "b": "\\" * 255, "c": '"' * 255})
def test_pppd_and_we_read_back_every_password(secrets: dict[str, str]) -> None:
    text = chap_secrets(secrets)
    assert list(words(text)) == [[name, "skynetvpn", secrets[name], "*"] for name in sorted(secrets)]
    assert read_chap_secrets(text) == secrets


@given(st.text(PRINTABLE + "\n\t", max_size=300))
def test_lines_of_somebody_else_are_no_logins(text: str) -> None:
    ours = chap_secrets({"alice": "her password"})
    assert read_chap_secrets(ours + text)["alice"] == "her password"
    assert "" not in read_chap_secrets(text)


@given(names, passwords)
def test_a_password_that_pppd_would_take_for_a_file_is_refused(name: str, password: str) -> None:
    Credential(protocol=Protocol.L2TP, username=name, account=1, secret=password).check()
    assert (refusal(password) is not None) == password.startswith("@/")
    assert refusal("@/etc/shadow")
    assert not refusal("/@")


@given(servers)
def test_pppd_reads_the_options_of_the_server(spec: L2tpServer) -> None:
    spec.check()
    options = list(words(ppp_options(spec)))
    assert ["require-mschap-v2"] in options
    assert [line[1] for line in options if line[0] in ("mtu", "mru")] == [str(spec.mtu)] * 2
    v4 = [server for server in spec.dns if ip_address(server).version == 4]
    assert [line[1] for line in options if line[0] == "ms-dns"] == v4[:2]
    assert all(line[0].replace("-", "").isalnum() and len(line) <= 2 for line in options)


@given(servers)
def test_xl2tpd_gives_clients_addresses_of_the_pool(spec: L2tpServer) -> None:
    lines = [line.partition(" = ") for line in xl2tpd_conf(spec).splitlines() if not line.startswith("[")]
    assert all(separator for _, separator, _ in lines)
    values = {key: value for key, _, value in lines}
    pool = IPv4Network(spec.ipv4_pool)
    first, last = (ip_address(text) for text in values["ip range"].split("-"))
    assert ip_address(values["local ip"]) == pool[1]
    assert (first, last) == (pool[2], pool[-2])
    assert values["require authentication"] == "yes"


@given(servers)
def test_no_file_but_the_secrets_holds_a_secret(spec: L2tpServer) -> None:
    marked = L2tpServer(psk="the-pre-shared-key", ipv4_pool=spec.ipv4_pool, dns=spec.dns, mtu=spec.mtu)
    texts = [xl2tpd_conf(marked), ppp_options(marked), strongswan_conf(Path("/x")), ruleset(), *hooks().values()]
    assert not any("the-pre-shared-key" in text for text in texts)


def test_selectors_name_the_protocol_by_number() -> None:
    """A Debian without netbase has no /etc/protocols: charon would refuse a name there."""
    assert re.findall(r"dynamic\[([a-z0-9]+)", str(connection())) == ["17", "17"]


def test_only_what_is_safe_is_proposed() -> None:
    text = str(connection()).lower()
    assert not [weak for weak in ("3des", "md5", "modp1024", "modp1536", "null", "des-") if weak in text]
    assert "aes256-sha256-modp2048" in text


@pytest.mark.parametrize("name", ["ip-pre-up", "ip-down"])
def test_the_hooks_start_no_program(name: str) -> None:
    script = hooks()[name]
    assert script.startswith("#!/bin/sh\n")
    assert "`" not in script
    assert "$(" not in script
