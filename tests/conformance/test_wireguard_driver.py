"""What every WireGuard backend must do: the same tests over the program and over the kernel."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_address

import pytest

from agent.drivers.base import Device, DeviceMissing, DriverError
from agent.drivers.wireguard import Backend, choose
from agent.drivers.wireguard.client import connect, disconnect
from agent.drivers.wireguard.kernel import KernelWireGuard
from agent.drivers.wireguard.server import ServerPeer
from agent.drivers.wireguard.userspace import UserspaceWireGuard
from shared.desired import Interface, Peer
from shared.keys import PresharedKey, PrivateKey, encode_key
from shared.protocol import PeerStats
from tests.support.netns import Namespace, unique

Driver = KernelWireGuard | UserspaceWireGuard

PORT = 51820


def a_peer(*allowed_ips: str, preshared_key: bytes | None = None, keepalive: int = 0) -> Peer:
    return Peer(public_key=os.urandom(32), allowed_ips=allowed_ips, preshared_key=preshared_key, keepalive=keepalive)


def many_peers(count: int) -> list[Peer]:
    return [a_peer(f"10.{64 + (i >> 16)}.{i >> 8 & 255}.{i & 255}/32", f"fd66::{i + 1:x}/128") for i in range(count)]


def an_interface() -> Interface:
    return Interface(name=unique("wgt"), listen_port=PORT, addresses=("10.66.0.1/16", "fd66::1/64"))


def digests(peers: tuple[Peer, ...] | list[Peer]) -> set[int]:
    return {peer.digest() for peer in peers}


async def observed(driver: Driver, name: str) -> Device:
    device = await driver.observe(name)
    assert device is not None
    return device


async def eventually(condition: Callable[[], Awaitable[bool]], timeout: float = 20) -> None:
    async with asyncio.timeout(timeout):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@pytest.fixture
async def wg(driver: Driver) -> Interface:
    spec = an_interface()
    await driver.ensure(spec, PrivateKey.generate())
    return spec


# --- the interface ---


async def test_a_missing_interface_is_observed_as_none(driver: Driver) -> None:
    assert await driver.observe(unique("wgt")) is None


async def test_a_new_interface_has_what_was_asked_for(driver: Driver) -> None:
    spec, key = an_interface(), PrivateKey.generate()

    await driver.ensure(spec, key)

    device = await observed(driver, spec.name)
    assert (device.public_key, device.listen_port, device.mtu) == (key.public().raw, PORT, 1420)
    assert set(device.addresses) == set(spec.addresses)
    assert device.peers == ()


async def test_a_second_driver_adopts_the_interface_with_its_generation_and_peers(
    driver: Driver, backend: Backend, wg: Interface
) -> None:
    peers = many_peers(3)
    await driver.apply_peers(wg.name, peers)
    before = await observed(driver, wg.name)
    await driver.close()

    second = await choose(backend)
    key = PrivateKey.generate()
    await second.ensure(wg, key)

    after = await observed(second, wg.name)
    await second.close()
    assert after.generation == before.generation
    assert after.public_key == key.public().raw
    assert digests(after.peers) == digests(peers)


async def test_an_interface_made_anew_has_another_generation(driver: Driver, wg: Interface) -> None:
    first = await observed(driver, wg.name)
    await driver.remove(wg.name)
    assert await driver.observe(wg.name) is None

    await driver.ensure(wg, PrivateKey.generate())

    assert (await observed(driver, wg.name)).generation != first.generation


async def test_an_adopted_interface_without_a_tag_gets_one_and_keeps_its_alias(
    driver: Driver, host: Namespace, wg: Interface
) -> None:
    host.run("ip", "link", "set", wg.name, "alias", "the office")

    await driver.ensure(wg, PrivateKey.generate())
    first = await observed(driver, wg.name)
    await driver.ensure(wg, PrivateKey.generate())

    assert (await observed(driver, wg.name)).generation == first.generation
    assert "the office skynetvpn:" in host.run("ip", "link", "show", wg.name)


async def test_addresses_mtu_and_port_follow_the_specification(driver: Driver, host: Namespace, wg: Interface) -> None:
    host.run("ip", "address", "add", "10.66.9.9/16", "dev", wg.name)
    changed = Interface(name=wg.name, listen_port=PORT + 1, addresses=("10.67.0.1/24", "fd66::1/64"), mtu=1380)

    await driver.ensure(changed, PrivateKey.generate())

    device = await observed(driver, wg.name)
    assert (device.listen_port, device.mtu) == (PORT + 1, 1380)
    assert set(device.addresses) == set(changed.addresses)


async def test_an_interface_that_is_down_listens_on_no_port_and_is_brought_up_again(
    driver: Driver, host: Namespace, wg: Interface
) -> None:
    host.run("ip", "link", "set", wg.name, "down")
    assert (await observed(driver, wg.name)).listen_port == 0

    await driver.ensure(wg, PrivateKey.generate())

    assert (await observed(driver, wg.name)).listen_port == PORT


async def test_a_port_in_use_is_named_and_can_be_set_when_it_is_free(driver: Driver) -> None:
    spec, key = an_interface(), PrivateKey.generate()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("0.0.0.0", PORT))
        with pytest.raises(DriverError, match=f"{PORT}.*Address already in use"):
            await driver.ensure(spec, key)
        assert (await observed(driver, spec.name)).listen_port != PORT

    await driver.ensure(spec, key)

    assert (await observed(driver, spec.name)).listen_port == PORT


async def test_something_else_with_the_name_is_left_alone(driver: Driver, host: Namespace) -> None:
    spec = an_interface()
    host.run("ip", "link", "add", spec.name, "type", "bridge")

    with pytest.raises(DriverError, match="'bridge'"):
        await driver.ensure(spec, PrivateKey.generate())
    with pytest.raises(DriverError, match="'bridge'"):
        await driver.remove(spec.name)

    assert spec.name in host.run("ip", "-br", "link")


async def test_calls_for_a_missing_interface_say_so(driver: Driver) -> None:
    name = unique("wgt")
    with pytest.raises(DeviceMissing, match=name):
        await driver.apply_peers(name, many_peers(1))
    with pytest.raises(DeviceMissing, match=name):
        await driver.remove_peers(name, [os.urandom(32)])
    with pytest.raises(DeviceMissing, match=name):
        await driver.stats(name)
    await driver.remove(name)


async def test_an_interface_that_was_deleted_behind_our_back_is_missing(
    driver: Driver, host: Namespace, wg: Interface
) -> None:
    await driver.apply_peers(wg.name, many_peers(1))
    host.run("ip", "link", "delete", wg.name)

    async def missing() -> bool:
        try:
            await driver.stats(wg.name)
        except DeviceMissing:
            return True
        return False

    await eventually(missing)
    await driver.ensure(wg, PrivateKey.generate())
    assert (await observed(driver, wg.name)).peers == ()


# --- peers ---


async def test_peers_are_read_back_as_they_were_set(driver: Driver, wg: Interface) -> None:
    peers = [
        a_peer("10.66.0.2/32"),
        a_peer("10.66.0.3/32", "fd66::3/128", preshared_key=os.urandom(32), keepalive=25),
        a_peer(*(f"10.66.1.{n}/32" for n in range(16)), keepalive=65535),
    ]

    await driver.apply_peers(wg.name, peers)

    assert digests((await observed(driver, wg.name)).peers) == digests(peers)


async def test_a_peer_becomes_exactly_what_is_applied(driver: Driver, wg: Interface) -> None:
    first = a_peer("10.66.0.2/32", "10.66.0.3/32", preshared_key=os.urandom(32), keepalive=25)
    await driver.apply_peers(wg.name, [first])
    second = Peer(public_key=first.public_key, allowed_ips=("10.66.0.4/32",))

    await driver.apply_peers(wg.name, [second])

    assert (await observed(driver, wg.name)).peers == (second,)


@pytest.mark.parametrize("taker_first", [True, False])
async def test_an_address_moves_to_another_peer(driver: Driver, wg: Interface, taker_first: bool) -> None:
    giver, taker = a_peer("10.66.0.2/32", "10.66.0.3/32"), a_peer("10.66.0.4/32")
    await driver.apply_peers(wg.name, [giver, taker])
    giver = Peer(public_key=giver.public_key, allowed_ips=("10.66.0.2/32",))
    taker = Peer(public_key=taker.public_key, allowed_ips=("10.66.0.4/32", "10.66.0.3/32"))

    await driver.apply_peers(wg.name, [taker, giver] if taker_first else [giver, taker])

    assert digests((await observed(driver, wg.name)).peers) == digests([giver, taker])


async def test_an_address_of_a_removed_peer_goes_to_the_next(driver: Driver, wg: Interface) -> None:
    leaver, comer = a_peer("10.66.0.2/32"), a_peer("10.66.0.2/32")
    await driver.apply_peers(wg.name, [leaver])

    await driver.remove_peers(wg.name, [leaver.public_key])
    await driver.apply_peers(wg.name, [comer])

    assert digests((await observed(driver, wg.name)).peers) == digests([comer])


async def test_removing_a_peer_that_is_not_there_is_no_error(driver: Driver, wg: Interface) -> None:
    peer = a_peer("10.66.0.2/32")
    await driver.apply_peers(wg.name, [peer])

    await driver.remove_peers(wg.name, [os.urandom(32), peer.public_key, peer.public_key])

    assert (await observed(driver, wg.name)).peers == ()


async def test_ten_thousand_peers_are_set_read_counted_and_removed(driver: Driver, wg: Interface) -> None:
    peers = many_peers(10_000)

    await driver.apply_peers(wg.name, peers)
    assert digests((await observed(driver, wg.name)).peers) == digests(peers)
    assert {entry.public_key for entry in await driver.stats(wg.name)} == {peer.public_key for peer in peers}

    await driver.remove_peers(wg.name, [peer.public_key for peer in peers[1:]])
    assert digests((await observed(driver, wg.name)).peers) == digests(peers[:1])


async def test_a_peer_with_more_addresses_than_one_message_holds_is_read_whole(driver: Driver, wg: Interface) -> None:
    wide = a_peer(*(f"10.80.{n >> 8}.{n & 255}/32" for n in range(4000)), preshared_key=os.urandom(32))
    peers = [*many_peers(50), wide]

    await driver.apply_peers(wg.name, peers)

    assert digests((await observed(driver, wg.name)).peers) == digests(peers)
    stats = await driver.stats(wg.name)
    assert len(stats) == len(peers)
    assert {entry.public_key for entry in stats} == {peer.public_key for peer in peers}


async def test_wide_prefixes_of_an_adopted_interface_are_seen(driver: Driver, host: Namespace, wg: Interface) -> None:
    key = os.urandom(32)
    host.run("wg", "set", wg.name, "peer", encode_key(key), "allowed-ips", "0.0.0.0/0,fd00::/8,10.1.2.0/25")

    (peer,) = (await observed(driver, wg.name)).peers

    assert peer.public_key == key
    assert set(peer.allowed_ips) == {"0.0.0.0/0", "fd00::/8", "10.1.2.0/25"}


async def test_the_fingerprint_stays_until_something_is_changed(driver: Driver, host: Namespace, wg: Interface) -> None:
    fleet = many_peers(500)
    await driver.apply_peers(wg.name, fleet)
    seen = {await driver.fingerprint(wg.name)}
    assert seen == {await driver.fingerprint(wg.name)}
    await driver.apply_peers(wg.name, fleet[:20])
    assert seen == {await driver.fingerprint(wg.name)}
    changed = Peer(public_key=fleet[7].public_key, allowed_ips=fleet[7].allowed_ips[:1])
    for peer in (
        changed,
        Peer(public_key=changed.public_key, allowed_ips=changed.allowed_ips, keepalive=5),
        Peer(public_key=changed.public_key, allowed_ips=changed.allowed_ips, preshared_key=os.urandom(32)),
        a_peer("10.99.0.1/32"),
    ):
        await driver.apply_peers(wg.name, [peer])
        found = await driver.fingerprint(wg.name)
        assert found not in seen
        seen.add(found)
    await driver.remove_peers(wg.name, [fleet[1].public_key])
    seen.add(await driver.fingerprint(wg.name))
    host.run("ip", "link", "set", wg.name, "mtu", "1300")
    seen.add(await driver.fingerprint(wg.name))
    host.run("ip", "address", "add", "10.77.0.1/32", "dev", wg.name)
    seen.add(await driver.fingerprint(wg.name))
    host.run("ip", "link", "set", wg.name, "down")
    seen.add(await driver.fingerprint(wg.name))
    assert len(seen) == 9
    assert await driver.fingerprint(unique("none")) is None


async def test_peers_are_read_while_others_come_and_go(driver: Driver, backend: Backend, wg: Interface) -> None:
    stay = many_peers(600)
    await driver.apply_peers(wg.name, stay)
    other = await choose(backend)

    async def come_and_go(peer: Peer) -> None:
        await other.apply_peers(wg.name, [peer])
        await other.remove_peers(wg.name, [peer.public_key])

    for n in range(30):  # two changes at most during one reading, which may have to be repeated for each
        device, _ = await asyncio.gather(observed(driver, wg.name), come_and_go(a_peer(f"10.90.0.{n}/32")))
        assert {peer.public_key for peer in device.peers}.issuperset(peer.public_key for peer in stay)
    await other.close()


# --- packets ---


class Client:
    """A client on the far host, with a tunnel to the interface under test."""

    def __init__(self, namespace: Namespace, backend: Backend, keepalive: int = 0) -> None:
        self.namespace = namespace
        self.name = unique("wgc")
        self.key = PrivateKey.generate()
        self.preshared = PresharedKey.generate()
        self._backend = backend
        self.peer = Peer(
            public_key=self.key.public().raw,
            allowed_ips=("10.66.0.2/32", "fd66::2/128"),
            preshared_key=self.preshared.raw,
        )

    async def connect(self, server_key: PrivateKey, endpoint: str) -> None:
        server = ServerPeer(server_key.public(), (ip_address(endpoint), PORT), preshared_key=self.preshared)

        async def inside() -> None:
            driver = await choose(self._backend)
            try:
                await connect(driver, self.name, self.key, ["10.66.0.2/32", "fd66::2/128"], 1420, server)
            finally:
                await driver.close()

        await asyncio.to_thread(self.namespace.call, inside)

    async def disconnect(self, endpoint: str) -> None:
        async def inside() -> None:
            driver = await choose(self._backend)
            try:
                await disconnect(driver, self.name, ip_address(endpoint))
            finally:
                await driver.close()

        await asyncio.to_thread(self.namespace.call, inside)

    async def ping(self, address: str, count: int = 1) -> str:
        return await asyncio.to_thread(
            self.namespace.run, "ping", "-c", str(count), "-i", "0.2", "-W", "10", address, timeout=60
        )

    def handshake(self) -> str:
        return self.namespace.run("wg", "show", self.name, "latest-handshakes").split()[1]


async def one(driver: Driver, name: str) -> PeerStats:
    (entry,) = await driver.stats(name)
    return entry


@pytest.fixture
async def client(far: Namespace, backend: Backend) -> Client:
    return Client(far, backend)


@pytest.mark.parametrize("endpoint", ["192.0.2.1", "2001:db8::1"])
async def test_packets_pass_and_are_counted(driver: Driver, client: Client, endpoint: str) -> None:
    spec, key = an_interface(), PrivateKey.generate()
    await driver.ensure(spec, key)
    await driver.apply_peers(spec.name, [client.peer])
    assert await one(driver, spec.name) == PeerStats(client.peer.public_key, 0, 0, 0, "")
    started = int(time.time())

    await client.connect(key, endpoint)
    await client.ping("10.66.0.1")
    await client.ping("fd66::1")

    entry = await one(driver, spec.name)
    assert entry.rx > 0
    assert entry.tx > 0
    assert started - 1 <= entry.handshake <= time.time() + 1
    host, _, port = entry.endpoint.rpartition(":")
    assert host == ("192.0.2.2" if endpoint == "192.0.2.1" else "[2001:db8::2]")
    assert port.isdecimal()

    fingerprint = await driver.fingerprint(spec.name)
    await client.ping("10.66.0.1")
    assert (await one(driver, spec.name)).rx > entry.rx
    assert await driver.fingerprint(spec.name) == fingerprint


async def test_reapplying_and_adopting_keep_counters_endpoint_and_sessions(
    driver: Driver, backend: Backend, client: Client
) -> None:
    spec, key = an_interface(), PrivateKey.generate()
    await driver.ensure(spec, key)
    await driver.apply_peers(spec.name, [client.peer])
    await client.connect(key, "192.0.2.1")
    await client.ping("10.66.0.1")
    before, handshake = await one(driver, spec.name), client.handshake()
    generation = (await observed(driver, spec.name)).generation

    await driver.ensure(spec, key)
    await driver.apply_peers(spec.name, [client.peer])
    await driver.close()
    second = await choose(backend)
    await second.ensure(spec, PrivateKey(bytes([key.raw[0] | 7]) + key.raw[1:]))  # the same key, as yet unclamped
    await second.apply_peers(spec.name, [client.peer])

    after = await one(second, spec.name)
    assert after.rx >= before.rx
    assert after.tx >= before.tx
    assert (after.handshake, after.endpoint) == (before.handshake, before.endpoint)
    await client.ping("10.66.0.1", count=3)
    assert client.handshake() == handshake
    assert (await observed(second, spec.name)).generation == generation
    await second.close()


async def test_a_removed_peer_passes_no_more_packets(driver: Driver, client: Client) -> None:
    spec, key = an_interface(), PrivateKey.generate()
    await driver.ensure(spec, key)
    await driver.apply_peers(spec.name, [client.peer])
    await client.connect(key, "192.0.2.1")
    await client.ping("10.66.0.1")

    await driver.remove_peers(spec.name, [client.peer.public_key])

    answer = client.namespace.run("ping", "-c2", "-i0.2", "-W1", "10.66.0.1", check=False)
    assert " 0 received" in answer


async def test_a_client_sends_everything_through_the_tunnel_and_leaves_no_route(
    driver: Driver, host: Namespace, client: Client
) -> None:
    spec, key = an_interface(), PrivateKey.generate()
    await driver.ensure(spec, key)
    await driver.apply_peers(spec.name, [client.peer])
    host.run("ip", "address", "add", "203.0.113.7/32", "dev", "lo")
    before = client.namespace.run("ip", "route"), client.namespace.run("ip", "-6", "route")

    await client.connect(key, "192.0.2.1")
    await client.ping("203.0.113.7")
    assert f"dev {client.name}" in client.namespace.run("ip", "route", "get", "198.51.100.1")
    assert f"dev {client.name}" in client.namespace.run("ip", "-6", "route", "get", "2600::1")
    assert client.name not in client.namespace.run("ip", "route", "get", "192.0.2.1")

    await client.disconnect("192.0.2.1")
    assert (client.namespace.run("ip", "route"), client.namespace.run("ip", "-6", "route")) == before
    assert client.name not in client.namespace.run("ip", "-br", "link")
