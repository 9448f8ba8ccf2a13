from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import desired
from shared.addresses import InvalidAddress
from shared.desired import EMPTY_DIGEST, Interface, InvalidResource, Kind, Peer, digest, digest_bytes

hosts = st.ip_addresses(v=4, network="10.0.0.0/8").map(lambda a: f"{a}/32") | st.ip_addresses(
    v=6, network="fd00::/8"
).map(lambda a: f"{a}/128")
peers = st.builds(
    Peer,
    public_key=st.binary(min_size=32, max_size=32).filter(any),
    allowed_ips=st.lists(hosts, min_size=1, max_size=4, unique=True).map(tuple),
    preshared_key=st.none() | st.binary(min_size=32, max_size=32),
    keepalive=st.integers(0, 65535),
    not_after=st.none() | st.integers(0, 2**40),
)


@given(peers)
def test_a_resource_survives_the_wire(peer: Peer) -> None:
    assert desired.decode(Kind.WIREGUARD_PEER, peer.key, desired.encode(peer)) == peer


@given(st.lists(peers, max_size=8), st.randoms())
def test_the_digest_has_no_order_and_can_be_kept_running(some: list[Peer], rng: random.Random) -> None:
    shuffled = some[:]
    rng.shuffle(shuffled)
    assert digest(some) == digest(shuffled)
    total = sum(peer.digest() for peer in some)
    for peer in some:
        total -= peer.digest()
    assert digest_bytes(total) == EMPTY_DIGEST


@given(peers, st.integers(1, 65535))
def test_the_digest_covers_every_attribute_of_the_host_and_not_the_lease(peer: Peer, other: int) -> None:
    assert msgspec.structs.replace(peer, not_after=other).digest() == peer.digest()
    reordered = msgspec.structs.replace(peer, allowed_ips=tuple(reversed(peer.allowed_ips)))
    assert reordered.digest() == peer.digest()
    for change in (
        {"keepalive": (peer.keepalive + other) % 65536},
        {"allowed_ips": (*peer.allowed_ips, "192.0.2.1/32")},
        {"preshared_key": bytes([1]) * 32 if peer.preshared_key != bytes([1]) * 32 else bytes([2]) * 32},
        {"public_key": bytes(32)},
    ):
        changed = msgspec.structs.replace(peer, **change)
        if changed != peer:
            assert changed.digest() != peer.digest()


def test_a_newer_peers_fields_are_ignored_and_missing_ones_have_defaults() -> None:
    peer = Peer(public_key=b"k" * 32, allowed_ips=("10.0.0.1/32",))
    fields = {"public_key": b"k" * 32, "allowed_ips": ["10.0.0.1/32"], "from_the_future": 7}
    assert desired.decode(Kind.WIREGUARD_PEER, peer.key, msgspec.msgpack.encode(fields)) == peer


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_ips": ["0.0.0.0/0"]},
        {"allowed_ips": []},
        {"allowed_ips": [f"10.0.0.{i}/32" for i in range(17)]},
        {"allowed_ips": ["::ffff:10.0.0.1/128"]},
        {"public_key": bytes(32)},
        {"public_key": b"short"},
        {"preshared_key": b"short"},
        {"keepalive": -1},
        {"keepalive": 65536},
        {"allowed_ips": "10.0.0.1/32"},
        {"public_key": "text"},
    ],
)
def test_a_peer_that_no_host_should_have_is_refused(fields: dict[str, object]) -> None:
    payload = {"public_key": b"k" * 32, "allowed_ips": ["10.0.0.1/32"]} | fields
    with pytest.raises((InvalidResource, InvalidAddress)):
        desired.decode(
            Kind.WIREGUARD_PEER, "a2tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2s=", msgspec.msgpack.encode(payload)
        )


def test_a_resource_under_a_wrong_name_is_refused() -> None:
    peer = Peer(public_key=b"k" * 32, allowed_ips=("10.0.0.1/32",))
    with pytest.raises(InvalidResource):
        desired.decode(Kind.WIREGUARD_PEER, "another", desired.encode(peer))
    with pytest.raises(InvalidResource):
        desired.decode("carrier.pigeon", peer.key, desired.encode(peer))


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "a" * 16},
        {"name": "../x"},
        {"name": ""},
        {"name": "wg0\n"},
        {"listen_port": 0},
        {"listen_port": 65536},
        {"mtu": 100},
        {"addresses": ()},
        {"addresses": ("10.0.0.1",)[:0]},
        {"addresses": ("nonsense",)},
    ],
)
def test_an_interface_that_no_host_should_have_is_refused(fields: dict[str, object]) -> None:
    good = Interface(name="wg0", listen_port=51820, addresses=("10.66.0.1/16", "fd66::1/64"))
    good.check()
    with pytest.raises((InvalidResource, InvalidAddress)):
        msgspec.structs.replace(good, **fields).check()


@given(st.binary(max_size=200))
def test_garbage_is_refused_cleanly(data: bytes) -> None:
    with pytest.raises(InvalidResource):
        desired.decode(Kind.WIREGUARD_PEER, "k", data)
