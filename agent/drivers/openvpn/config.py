"""The server's configuration file (openvpn(8)): settings to text, and the text back to settings; pure.

A line of this file may start programs as root, so every value is built from parsed numbers, addresses and PEM blocks;
`parse` reads a text as OpenVPN does, and gives the settings back that it was made from, or nothing.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Final, TypeVar

from shared.services import OpenVpnServer

Pool = TypeVar("Pool", IPv4Network, IPv6Network)

TRANSPORTS: Final = ("udp", "tcp")
_LOST_PINGS = 6
DEVICES = "skyovpn"  # what the names of devices for offloaded data begin with
_WIDEST_IPV4, _WIDEST_IPV6 = 16, 64  # OpenVPN's own limits of a pool
_FIXED: Final = (
    ("dh", "none"),
    ("tls-version-min", "1.3"),
    ("tls-cert-profile", "preferred"),
    ("data-ciphers", "AES-256-GCM:AES-128-GCM:CHACHA20-POLY1305"),
    ("allow-compression", "no"),
    # The agent decides who gets in: by certificate, by password, or by both.
    ("verify-client-cert", "optional"),
    ("auth-user-pass-optional",),
    ("remote-cert-tls", "client"),
    ("duplicate-cn",),
    ("management-client-auth",),
    ("management-hold",),
    ("verb", "1"),
)
_LAST: Final = ("script-security", "0")
_PEM = re.compile(
    r"-----BEGIN ([A-Za-z0-9 -]{1,60})-----\n"
    r"((?:[A-Za-z0-9+/]{1,76}\n)*[A-Za-z0-9+/]{0,76}={0,2}\n)"
    r"-----END \1-----(?:\n|\Z)"
)
_PEM_LABELS = {"ca": "CERTIFICATE", "tls-crypt-v2": "OpenVPN tls-crypt-v2 server key"}
_TLS_CRYPT_BYTES = 128
_CERTIFICATE = re.compile(r"server\.[0-9a-f]{16}\.pem")


class UnsafeSettings(ValueError):
    """No file that means just this can be written; the text names no secret."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What one process runs with."""

    transport: str
    port: int
    ipv4: IPv4Network
    ipv6: IPv6Network | None
    dns: tuple[str, ...]
    mtu: int
    keepalive: int
    max_clients: int
    ca: str  # PEM blocks only
    tls_crypt: str
    certificate: str  # name of the file with the server's certificate and key
    dual_stack: bool  # the host has IPv6, and the server takes clients by both
    dco: bool = False  # the kernel passes the data, where it can

    def __repr__(self) -> str:
        return f"Settings({self.transport!r}, {self.port}, {str(self.ipv4)!r})"

    @property
    def patience(self) -> int:
        """Seconds without a packet of a client until its session ends."""
        return _LOST_PINGS * self.keepalive

    @property
    def device(self) -> str:
        """Of these settings alone where the kernel passes the data: it outlives a process that dies."""
        return DEVICES + token(render(replace(self, dco=False)))[:8] if self.dco else ""

    def with_certificate(self, name: str) -> Settings:
        return replace(self, certificate=name)


def settings(spec: OpenVpnServer, transport: str, certificate: str, *, dual_stack: bool, dco: bool = False) -> Settings:
    """UDP has the lower half of the pools and TCP the upper one, whether or not both run.

    TCP is never offloaded: a client that resets its connection takes the kernel's counters along.
    """
    ipv6 = None if spec.ipv6_pool is None else _half(IPv6Network(spec.ipv6_pool), transport, _WIDEST_IPV6)
    return Settings(
        transport=transport,
        port=spec.port,
        ipv4=_half(IPv4Network(spec.ipv4_pool), transport, _WIDEST_IPV4),
        ipv6=ipv6,
        dns=tuple(str(ip_address(server)) for server in spec.dns),
        mtu=spec.mtu,
        keepalive=spec.keepalive,
        max_clients=spec.max_clients,
        ca=_pem("ca", spec.ca),
        tls_crypt=_pem("tls-crypt-v2", spec.tls_crypt),
        certificate=certificate,
        dual_stack=dual_stack,
        dco=dco and transport == "udp",
    )


def render(wanted: Settings) -> str:
    lines = "".join(f"{' '.join(map(quote, line))}\n" for line in _lines(wanted))
    return f"{lines}<ca>\n{wanted.ca}</ca>\n<tls-crypt-v2>\n{wanted.tls_crypt}</tls-crypt-v2>\n"


def token(text: str) -> str:
    """The name that a process and its files have from its settings."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse(text: str) -> Settings:
    """Read a file that `render` wrote; raise UnsafeSettings for any other."""
    lines, blocks = read(text)
    told = {line[0]: line[1:] for line in lines}
    pushed = [line[1] for line in lines if line[0] == "push"]
    try:
        protocol = told["proto"][0]
        found = Settings(
            transport=protocol[:3],
            port=int(told["port"][0]),
            ipv4=IPv4Network("/".join(told["server"])),
            ipv6=IPv6Network(told["server-ipv6"][0]) if "server-ipv6" in told else None,
            dns=tuple(option.split()[2] for option in pushed if option.startswith("dhcp-option")),
            mtu=int(told["tun-mtu"][0]),
            keepalive=int(told["ping"][0]),
            max_clients=int(told["max-clients"][0]),
            ca=blocks["ca"],
            tls_crypt=blocks["tls-crypt-v2"],
            certificate=told["cert"][0],
            dual_stack=protocol[3] == "6",
            dco="disable-dco" not in told,
        )
        again = render(found)
    except (KeyError, IndexError, ValueError) as error:
        raise UnsafeSettings("not a file of ours") from error
    if again != text:
        raise UnsafeSettings("not a file of ours")
    return found


def read(text: str) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    """The options and the inline blocks of a configuration file, as OpenVPN's own reader takes them."""
    options: list[tuple[str, ...]] = []
    blocks: dict[str, str] = {}
    lines = iter(text.split("\n"))
    for line in lines:
        words = _words(line)
        if len(words) == 1 and words[0].startswith("<") and words[0].endswith(">"):
            name, body = words[0][1:-1], []
            for inner in lines:
                if inner.lstrip().startswith(f"</{name}>"):
                    break
                body.append(f"{inner}\n")
            blocks[name] = "".join(body)
        elif words:
            options.append(tuple(words))
    return options, blocks


def quote(word: str) -> str:
    """One word for the configuration file or the management socket, which share a reader."""
    if not word.isprintable():
        raise UnsafeSettings("a value has a control character in it")
    if re.fullmatch(r"[A-Za-z0-9_./:-]+", word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _lines(wanted: Settings) -> Iterator[tuple[str, ...]]:
    yield from _data_path(wanted)
    yield from _FIXED
    if wanted.transport not in TRANSPORTS or not _CERTIFICATE.fullmatch(wanted.certificate):
        raise UnsafeSettings("an unknown transport or certificate file")
    family = "6" if wanted.dual_stack else "4"
    yield "proto", {"udp": f"udp{family}", "tcp": f"tcp{family}-server"}[wanted.transport]
    yield "port", str(wanted.port)
    yield "cert", wanted.certificate
    yield "key", wanted.certificate
    yield "server", str(wanted.ipv4.network_address), str(wanted.ipv4.netmask)
    if wanted.ipv6 is not None:
        yield "server-ipv6", str(wanted.ipv6)
    yield "tun-mtu", str(wanted.mtu)
    yield "max-clients", str(wanted.max_clients)
    yield from _pings(wanted)
    yield "push", f"redirect-gateway def1{' ipv6' if wanted.ipv6 is not None else ''}"
    for server in wanted.dns:
        yield "push", f"dhcp-option {'DNS6' if ip_address(server).version == 6 else 'DNS'} {server}"
    if wanted.transport == "udp":
        yield ("multihome",)  # it answers from the address that it was asked at
        yield "explicit-exit-notify", "1"
    yield _LAST


def _data_path(wanted: Settings) -> Iterator[tuple[str, ...]]:
    if wanted.dco:
        yield "dev", wanted.device
        yield "dev-type", "tun"
    else:
        yield "dev", "tun"
    yield "topology", "subnet"
    if not wanted.dco:
        yield ("disable-dco",)


def _pings(wanted: Settings) -> Iterator[tuple[str, ...]]:
    """Not `keepalive`, with which a server waits for twice the time that it is told."""
    yield "ping", str(wanted.keepalive)
    if not wanted.dco:  # the kernel would forget what it counted: then `Server` ends silent sessions
        yield "ping-restart", str(wanted.patience)
    yield "push", f"ping {wanted.keepalive}"
    yield "push", f"ping-restart {wanted.patience}"


def _half(pool: Pool, transport: str, widest: int) -> Pool:
    lower, upper = pool.subnets()
    half = lower if transport == "udp" else upper
    return half if half.prefixlen >= widest else next(half.subnets(new_prefix=widest))


def _pem(name: str, text: str) -> str:
    """The PEM blocks of a text alone: what is around them never reaches a file."""
    label = _PEM_LABELS[name]
    found = [block for block in _PEM.finditer(text) if block[1] == label]
    # OpenVPN looks at the frame of its key alone, and would serve with what it finds behind a short one.
    if not found or (name != "ca" and any(_size(block[2]) != _TLS_CRYPT_BYTES for block in found)):
        raise UnsafeSettings(f"{name} is not a PEM block of a {label}")
    return "".join(block[0].rstrip("\n") + "\n" for block in found)


def _size(base64: str) -> int | None:
    try:
        return len(b64decode(base64))
    except ValueError:
        return None


def _words(line: str) -> list[str]:
    """One line as OpenVPN splits it: blanks, single and double quotes, backslashes, comments."""
    words: list[str] = []
    word: list[str] = []
    inside, closing = False, ""
    characters = iter(line)
    for character in characters:
        if closing and character == closing:
            closing = ""
        elif character == "\\" and closing != "'":
            inside = True
            word.append(next(characters, ""))
        elif closing:
            word.append(character)
        elif character in "\"'":
            inside, closing = True, character
        elif character.isspace():
            if inside:
                words.append("".join(word))
            inside, word = False, []
        elif not inside and character in "#;":
            return words
        else:
            inside = True
            word.append(character)
    if closing:
        raise UnsafeSettings("a quote is not closed")
    return [*words, "".join(word)] if inside else words
