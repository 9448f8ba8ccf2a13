"""The kernel's messages: what we pack is what another implementation reads, and every layout of a dump is read."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.generic.wireguard import wgmsg

from agent.drivers.netlink.codec import HEADER_BYTES, MalformedMessage, attribute, nested
from agent.drivers.wireguard import dump, message
from agent.drivers.wireguard.linux import GENL, header
from agent.drivers.wireguard.server import ServerPeer
from shared.desired import Peer
from shared.keys import PresharedKey, PublicKey, encode_key
from shared.protocol import PeerStats
from tests.agent.drivers.wireguard.strategies import clients, peer_lists, peers, unhurried

counters = st.integers(0, (1 << 63) - 1)


def named(attributes: Any) -> dict[str, Any]:
    return {slot[0]: slot[1] for slot in attributes}


def packed_peers(requests: Iterable[bytes]) -> list[dict[str, Any]]:
    """Read requests with an independent decoder."""
    found = []
    for request in requests:
        parsed = wgmsg(struct.pack("=IHHII", HEADER_BYTES + len(request), 0, 0, 0, 0) + request)
        parsed.decode()
        values = named(parsed["attrs"])
        assert values["WGDEVICE_A_IFNAME"] == "wg0"
        found += [named(peer["attrs"]) for peer in values["WGDEVICE_A_PEERS"]]
    return found


def allowed_ips(values: dict[str, Any]) -> list[str]:
    return [str(ip_network(entry["addr"])) for entry in values.get("WGPEER_A_ALLOWEDIPS", [])]


def check(requests: Iterable[bytes], wanted: list[Peer]) -> None:
    """Raise AssertionError where another decoder reads other peers than these."""
    found = packed_peers(requests)
    assert len(found) == len(wanted)
    for values, peer in zip(found, wanted, strict=True):
        assert values["WGPEER_A_PUBLIC_KEY"] == encode_key(peer.public_key).encode()
        assert values["WGPEER_A_PRESHARED_KEY"] == encode_key(peer.preshared_key or bytes(32)).encode()
        assert values["WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL"] == peer.keepalive
        assert values["WGPEER_A_FLAGS"] == 2
        assert allowed_ips(values) == list(peer.allowed_ips)


@unhurried
@given(peer_lists)
def test_peers_are_packed_as_another_decoder_reads_them(wanted: list[Peer]) -> None:
    check(message.set_peers("wg0", wanted), wanted)


@unhurried
@given(
    st.lists(clients(25), min_size=1, max_size=100) | st.lists(clients(0, 25), min_size=1, max_size=100),
    st.lists(peers, max_size=2),
    st.randoms(),
)
def test_peers_are_packed_alike_wherever_clients_with_one_address_of_each_family_are_many(
    many: list[Peer], others: list[Peer], shuffle: random.Random
) -> None:
    wanted = [*many, *others]
    shuffle.shuffle(wanted)
    check(message.set_peers("wg0", wanted), wanted)


@pytest.mark.parametrize(
    "prefixes",
    [
        [("32.0.0.0/3", "fd00::1/128"), ("32.0.0.1/32", "fd00::2/128")],
        [("10.0.0.1/32", "fd00::/12"), ("10.0.0.2/32", "fd00::2/128")],
        [("10.0.0.1/32", "fd00::1/128"), ("10.0.0.0/24", "fd00::2/128")],
        [("fd00::/32", "fd00::1/128"), ("10.0.0.2/32", "fd00::2/128")],
        [("10.0.0.1/32", "10.0.0.2/32"), ("10.0.0.3/32", "10.0.0.4/32")],
        [("fd00::1/128", "10.0.0.1/32"), ("fd00::2/128", "10.0.0.2/32")],
        [("10.0.0.1/32", "fd00::1/128", "10.0.0.2/32"), ("10.0.0.3/32",)],
    ],
)
def test_peers_that_only_look_like_clients_are_packed_as_they_are(prefixes: list[tuple[str, ...]]) -> None:
    many = prefixes * 4
    wanted = [Peer(public_key=bytes([number]) * 32, allowed_ips=ips) for number, ips in enumerate(many, 1)]
    found = packed_peers(message.set_peers("wg0", wanted))
    assert [tuple(allowed_ips(values)) for values in found] == many


@unhurried
@given(st.lists(st.binary(min_size=32, max_size=32), max_size=200))
def test_removals_name_every_key_once(keys: list[bytes]) -> None:
    found = packed_peers(message.remove_peers("wg0", keys))
    assert [values["WGPEER_A_PUBLIC_KEY"] for values in found] == [encode_key(key).encode() for key in keys]
    assert all(values["WGPEER_A_FLAGS"] == 1 for values in found)


def test_very_many_allowed_ips_are_split_and_only_the_first_part_replaces() -> None:
    wide = Peer(public_key=b"k" * 32, allowed_ips=tuple(f"10.{n >> 8}.{n & 255}.0/24" for n in range(3000)))
    requests = list(message.set_peers("wg0", [wide]))
    found = packed_peers(requests)
    assert [prefix for values in found for prefix in allowed_ips(values)] == list(wide.allowed_ips)
    assert [values.get("WGPEER_A_FLAGS") for values in found] == [2, None, None, None, None, None]
    assert max(map(len, requests)) < 65535


def test_many_wide_peers_never_overflow_a_message() -> None:
    wide = [
        Peer(public_key=bytes([number]) * 32, allowed_ips=tuple(f"fd{number:02x}::{n:x}/128" for n in range(1, 400)))
        for number in range(20)
    ]
    requests = list(message.set_peers("wg0", wide))
    assert max(map(len, requests)) < 65535
    assert [tuple(allowed_ips(values)) for values in packed_peers(requests)] == [peer.allowed_ips for peer in wide]


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1"])
def test_the_server_is_set_with_its_endpoint(host: str) -> None:
    server = ServerPeer(PublicKey(b"k" * 32), (ip_address(host), 51820), preshared_key=PresharedKey(b"p" * 32))
    (values,) = packed_peers(message.set_server("wg0", server))
    assert (values["WGPEER_A_ENDPOINT"]["addr"], values["WGPEER_A_ENDPOINT"]["port"]) == (host, 51820)
    assert values["WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL"] == 25
    assert allowed_ips(values) == ["0.0.0.0/0", "::/0"]
    assert str(b"p" * 32) not in repr(server)


# --- dumps ---


def endpoint_of(text: str) -> bytes:
    host, _, port = text.rpartition(":")
    if host.startswith("["):
        packed = socket.inet_pton(socket.AF_INET6, host.strip("[]"))
        return struct.pack("=H", socket.AF_INET6) + struct.pack("!HI", int(port), 0) + packed + bytes(4)
    return struct.pack("=H", socket.AF_INET) + struct.pack("!H", int(port)) + socket.inet_aton(host) + bytes(8)


def allowed_ip(prefix: str, shuffle: random.Random | None = None) -> bytes:
    network = ip_network(prefix)
    family = socket.AF_INET if network.version == 4 else socket.AF_INET6
    values = [
        attribute(3, bytes([network.prefixlen])),
        attribute(1, struct.pack("=H", family)),
        attribute(2, network.network_address.packed),
    ]
    if shuffle:
        shuffle.shuffle(values)
    return nested(0, *values)


def record(peer: Peer, stats: PeerStats, shuffle: random.Random | None = None) -> bytes:
    """A peer as the kernel writes it, or with its attributes in another order and one that nobody knows yet."""
    values = [
        attribute(1, peer.public_key),
        attribute(2, peer.preshared_key or bytes(32)),
        attribute(6, struct.pack("=qq", stats.handshake, 5)),
        attribute(5, struct.pack("=H", peer.keepalive)),
        attribute(8, struct.pack("=Q", stats.tx)),
        attribute(7, struct.pack("=Q", stats.rx)),
        attribute(10, struct.pack("=I", 1)),
        *([attribute(4, endpoint_of(stats.endpoint))] if stats.endpoint else []),
        *([nested(9, *(allowed_ip(prefix, shuffle) for prefix in peer.allowed_ips))] if peer.allowed_ips else []),
    ]
    if shuffle:
        values.append(attribute(77, b"new"))
        shuffle.shuffle(values)
    return nested(0, *values)


def part(*records: bytes) -> bytes:
    return GENL.pack(0, 1) + attribute(2, b"wg0\0") + nested(8, *records)


def stats_of(peer: Peer) -> st.SearchStrategy[PeerStats]:
    endpoints = st.sampled_from(["", "192.0.2.7:51820", "[2001:db8::7]:1"])
    return st.builds(PeerStats, st.just(peer.public_key), counters, counters, counters, endpoints)


both = peer_lists.flatmap(
    lambda found: st.tuples(*map(stats_of, found)).map(lambda stats: list(zip(found, stats, strict=True)))
)


@unhurried
@given(both, st.none() | st.randoms(), st.integers(1, 5))
def test_a_dump_is_read_whatever_its_layout_and_its_messages(
    wanted: list[tuple[Peer, PeerStats]], shuffle: random.Random | None, size: int
) -> None:
    records = [record(peer, stats, shuffle) for peer, stats in wanted]
    messages = [part(*records[start : start + size]) for start in range(0, len(records), size)]
    assert dump.parse_peers(messages) == tuple(peer for peer, _ in wanted)
    assert dump.parse_stats(messages) == [stats for _, stats in wanted]


@unhurried
@given(both, st.lists(st.booleans()), st.randoms(use_true_random=False), st.integers(1, 5))
def test_counters_read_at_fixed_places_are_those_read_one_by_one(
    wanted: list[tuple[Peer, PeerStats]], strange: list[bool], shuffle: random.Random, size: int
) -> None:
    """Peers as the kernel writes them, among others, and the rest of one that the message before has cut off."""
    odd = [*strange, *[False] * len(wanted)]
    records = [record(peer, stats, shuffle if odd[number] else None) for number, (peer, stats) in enumerate(wanted)]
    parts = [records[start : start + size] for start in range(0, len(records), size)]
    for before, after in pairwise(parts):
        key = before[-1][8:40] if before[-1][4:8] == header(1, 32) else b"r" * 32
        after.insert(0, nested(0, attribute(1, key), nested(9, allowed_ip("192.0.2.9/32"))))
    messages = [part(*records) for records in parts]
    one_by_one: list[PeerStats] = []
    for data in messages:
        for start, end in dump._nests(data):
            offset = start
            while offset < end:
                offset = dump._slow_stats(data, offset, end, one_by_one)
    assert dump.parse_stats(messages) == one_by_one == [stats for _, stats in wanted]


@pytest.mark.parametrize("endpoint", ["", "192.0.2.7:51820", "[2001:db8::7]:1"])
def test_no_peer_of_the_kernels_layout_is_read_slowly(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dump as the kernel writes it must stay cheap; the last peer of a message may be too near to its end."""
    peer = Peer(public_key=b"k" * 32, allowed_ips=("10.66.0.2/32", "fd66::2/128"))
    stats = PeerStats(peer.public_key, 1, 2, 3, endpoint)
    rest = nested(0, attribute(1, b"r" * 32), nested(9, allowed_ip("192.0.2.9/32")))
    slow = Mock(wraps=dump._slow_stats)
    monkeypatch.setattr(dump, "_slow_stats", slow)
    assert dump.parse_stats([part(rest, *[record(peer, stats)] * 50)]) == [stats] * 50
    assert slow.call_count == 1  # the rest of the peer before


@unhurried
@given(peers, st.data())
def test_a_peer_split_over_messages_is_one_peer(peer: Peer, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(peer.allowed_ips)))
    stats = PeerStats(peer.public_key, 1, 2, 3)
    first = Peer(
        public_key=peer.public_key,
        allowed_ips=peer.allowed_ips[:cut],
        preshared_key=peer.preshared_key,
        keepalive=peer.keepalive,
    )
    rest = nested(0, attribute(1, peer.public_key), nested(9, *map(allowed_ip, peer.allowed_ips[cut:])))
    messages = [part(record(first, stats)), part(rest)]
    assert dump.parse_peers(messages) == (peer,)
    assert dump.parse_stats(messages) == [stats]


@unhurried
@given(peers.flatmap(lambda peer: st.tuples(st.just(peer), stats_of(peer))), st.data())
def test_a_dump_that_was_cut_is_an_error_and_never_a_crash(both: tuple[Peer, PeerStats], data: st.DataObject) -> None:
    whole = part(record(*both))
    cut = whole[: data.draw(st.integers(GENL.size + 12, len(whole) - 1))]  # behind the interface's name
    for parse in (dump.parse_stats, dump.parse_peers):
        with pytest.raises(MalformedMessage):
            parse([cut])
