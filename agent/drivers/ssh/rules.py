"""The text of our nftables table (nft(8)), and what its counters say (linux/netfilter/nf_tables.h); pure.

A session is one TCP connection to our sshd, known by the client's address and port: its bytes are counted there, one
counter for each session and direction, so that two sessions of a user are told apart, and his total is their sum.
The counters are in sets that outlive the agent. What is counted are IP packets, as WireGuard and OpenVPN count theirs.
Only answered connections are (ct status assured): a flood of forged SYNs fills no set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from agent.drivers.netlink.codec import attributes, text
from agent.drivers.ssh.passwd import UIDS

FAMILY, TABLE = "inet", "skynetvpn_ssh"
SETS = ("rx4", "rx6", "tx4", "tx6")
GET_ELEMENTS = 10 << 8 | 13  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETSETELEM
_NFPROTO_INET = 1
_HEADER_BYTES = 4  # struct nfgenmsg
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS = 1, 2, 3
_KEY, _EXPRESSION, _EXPRESSIONS = 1, 7, 11
_DATA_VALUE = 1
_EXPRESSION_NAME, _EXPRESSION_DATA = 1, 2
_COUNTER_BYTES = 1

# Not the networks of the node's provider, nor the tunnels' own pools; 169.254.169.254 tells a machine's secrets.
_PRIVATE4 = "0.0.0.0/8, 10.0.0.0/8, 100.64.0.0/10, 169.254.0.0/16, 172.16.0.0/12, 192.168.0.0/16, 224.0.0.0/3"
_PRIVATE6 = "::/96, ::ffff:0:0/96, 64:ff9b::/96, 64:ff9b:1::/48, fc00::/7, fe80::/10, fec0::/10, ff00::/8"

Address = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True, order=True)
class Client:
    """The far end of a connection."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def render(ports: Iterable[int], resolvers: Sequence[Address]) -> str:
    """One transaction that makes the table, or sets its rules anew; its counters stay.

    A port once given stays in the set, so that sessions that began there are counted to their end.
    """
    table = f"{FAMILY} {TABLE}"
    timed = "flags dynamic,timeout; size 262144; timeout 2h;"
    lines = [
        f"add table {table}",
        f"add set {table} ports {{ type inet_service; }}",
        *(f"add set {table} {each}4 {{ type ipv4_addr . inet_service; {timed} }}" for each in ("rx", "tx")),
        *(f"add set {table} {each}6 {{ type ipv6_addr . inet_service; {timed} }}" for each in ("rx", "tx")),
        f"add chain {table} input {{ type filter hook input priority filter; policy accept; }}",
        f"add chain {table} output {{ type filter hook output priority filter; policy accept; }}",
        f"add chain {table} denied",
        f"flush chain {table} denied",
        f"flush chain {table} input",
        f"flush chain {table} output",
        f"add element {table} ports {{ {', '.join(map(str, ports))} }}",
        f"add rule {table} denied meta l4proto tcp reject with tcp reset",
        f"add rule {table} denied reject",
        *(f"add rule {table} input {rule}" for rule in _received()),
        *(f"add rule {table} output {rule}" for rule in (*_sent(), *_denied(resolvers))),
    ]
    return "".join(f"{line}\n" for line in lines)


def render_forget(clients: Iterable[Client]) -> str:
    """Take the counters of these away. Deleting one that is not there is an error: adding it first is none."""
    lines: list[str] = []
    for client in clients:
        version = ip_address(client.host).version
        for name in (f"rx{version}", f"tx{version}"):
            element = f"{FAMILY} {TABLE} {name} {{ {client.host} . {client.port} }}"
            lines += (f"add element {element}", f"delete element {element}")
    return "".join(f"{line}\n" for line in lines)


def request(name: str) -> bytes:
    """The payload that asks for all elements of a set."""
    header = bytes((_NFPROTO_INET, 0, 0, 0))
    return header + text(_LIST_TABLE, TABLE) + text(_LIST_SET, name)


def parse(payloads: Iterable[bytes]) -> dict[Client, int]:
    """Bytes by client, of the answer to `request`."""
    counted: dict[Client, int] = {}
    for payload in payloads:
        for type_, value in attributes(memoryview(payload)[_HEADER_BYTES:]):
            if type_ == _LIST_ELEMENTS:
                counted.update(_element(element) for _, element in attributes(value))
    return counted


def _received() -> Iterator[str]:
    yield "tcp dport @ports ct status assured update @rx4 { ip saddr . tcp sport counter }"
    yield "tcp dport @ports ct status assured update @rx6 { ip6 saddr . tcp sport counter }"


def _sent() -> Iterator[str]:
    yield "tcp sport @ports ct status assured update @tx4 { ip daddr . tcp dport counter }"
    yield "tcp sport @ports ct status assured update @tx6 { ip6 daddr . tcp dport counter }"


def _denied(resolvers: Sequence[Address]) -> Iterator[str]:
    """What a user's connections must not reach; PermitOpen only knows what is allowed.

    The connection that carries a session is root's, who accepted it: these rules see what was forwarded only. Names
    are resolved by the user's own process, so that the host's resolver stays in reach, wherever it is.
    """
    user = f"meta skuid {UIDS.start}-{UIDS.stop - 1}"
    for resolver in resolvers:
        keyword = "ip" if resolver.version == 4 else "ip6"
        yield f"{user} {keyword} daddr {resolver} meta l4proto {{ tcp, udp }} th dport 53 accept"
    yield f"{user} fib daddr type != unicast jump denied"
    yield f"{user} ip daddr {{ {_PRIVATE4} }} jump denied"
    yield f"{user} ip6 daddr {{ {_PRIVATE6} }} jump denied"


def _element(element: memoryview) -> tuple[Client, int]:
    key, count = b"", 0
    for type_, value in attributes(element):
        if type_ == _KEY:
            key = b"".join(bytes(data) for kind, data in attributes(value) if kind == _DATA_VALUE)
        elif type_ == _EXPRESSION:
            count = _counter(value)
        elif type_ == _EXPRESSIONS:
            count = sum(_counter(each) for _, each in attributes(value))
    # Each part of a key is filled up to 4 bytes.
    host, port = key[:-4], key[-4:-2]
    return Client(str(ip_address(host)), int.from_bytes(port)), count


def _counter(expression: memoryview) -> int:
    parts = dict(attributes(expression))
    if bytes(parts.get(_EXPRESSION_NAME, b"")) != b"counter\0":
        return 0
    return int.from_bytes(dict(attributes(parts[_EXPRESSION_DATA]))[_COUNTER_BYTES])
