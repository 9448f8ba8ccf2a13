"""OpenVPN with its data in the kernel: every byte is counted, and who has to go is gone.

Counted against what went over the wire. What all drivers do is in tests/conformance.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from agent.drivers.base import Allowed, LiveSession
from agent.drivers.limits import KernelLimits
from agent.drivers.openvpn import OpenVpn
from tests.support.openvpn import CONNECTED, Client, OpenVpnDcoRig

pytestmark = [pytest.mark.kernel, pytest.mark.netns]

SLOWDOWN = int(os.environ.get("SKYNETVPN_TEST_SLOWDOWN", "1"))
KEEPALIVE = 2
HEADERS = 28  # IPv4 and UDP
PING = 1000 + 28 + 24  # bytes in the ping, its headers, and those of OpenVPN around it
RATE = 400_000  # bits per second
SECONDS = 4
COUNTERS = """table inet wire {
    chain in { type filter hook input priority 0; udp dport 1194 counter; }
    chain out { type filter hook output priority 0; udp sport 1194 counter; }
}
"""


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenVpnDcoRig]:
    with OpenVpnDcoRig(tmp_path_factory.mktemp("dco")) as made:
        made.host.run("nft", "-f", "-", stdin=COUNTERS)
        yield made


@pytest.fixture
def told() -> asyncio.Event:
    return asyncio.Event()


@pytest.fixture
def refusals() -> dict[str, str]:
    """What `admit` answers."""
    return {}


@pytest.fixture
async def driver(rig: OpenVpnDcoRig, told: asyncio.Event, refusals: dict[str, str]) -> AsyncIterator[OpenVpn]:
    """Each test adopts the server that the last one left."""
    made = rig.driver(refusals.get, told.set)
    if await made.certificate_request() is not None:
        await rig.prepare(made)
    await serve(made, rig)

    async def nobody() -> bool:
        return not await made.sessions()

    await until(nobody)  # whom the last test left: OpenVPN takes five seconds for a farewell
    yield made
    for pid in rig.far.pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGCONT)
    await made.close()


async def serve(driver: OpenVpn, rig: OpenVpnDcoRig) -> None:
    await driver.ensure(rig.spec(keepalive=KEEPALIVE))
    await driver.put([rig.credential("alice")])


def devices(rig: OpenVpnDcoRig) -> list[str]:
    return re.findall(r"^\d+: (\S+):", rig.host.run("ip", "-o", "link", "show", "type", "ovpn-dco"), re.MULTILINE)


def on_the_wire(rig: OpenVpnDcoRig) -> tuple[int, int]:
    """The payload of OpenVPN's packets to and from the host."""
    counted = re.findall(r"packets (\d+) bytes (\d+)", rig.host.run("nft", "list", "table", "inet", "wire"))
    arrived, left = (int(size) - HEADERS * int(packets) for packets, size in counted)
    return arrived, left


async def connected(rig: OpenVpnDcoRig, *options: str) -> Client:
    client = rig.client("alice", options=("pull-filter ignore redirect-gateway", *options))
    await asyncio.to_thread(client.connect, 30 * SLOWDOWN)
    return client


async def pings(rig: OpenVpnDcoRig, client: Client, count: int) -> None:
    argv = ("ping", "-q", "-c", str(count), "-i", "0.05", "-s", "1000", "-I", client.device, "10.70.0.1")
    assert f" {count} received" in await asyncio.to_thread(rig.far.run, *argv)


async def until(condition: Callable[[], Awaitable[object]], timeout: float = 10) -> None:
    async with asyncio.timeout(timeout * SLOWDOWN):
        while not await condition():  # noqa: ASYNC110 — another process changes it
            await asyncio.sleep(0.05)


async def uncounted(driver: OpenVpn, rig: OpenVpnDcoRig) -> tuple[int, int]:
    """Bytes of the wire that the session has not: those before there was one, always as many."""
    while True:
        before = on_the_wire(rig)
        (session,) = await driver.sessions()
        if on_the_wire(rig) == before:
            return before[0] - session.rx, before[1] - session.tx


async def ended(driver: OpenVpn) -> LiveSession:
    found: list[LiveSession] = []

    async def look() -> bool:
        found.extend(session for session in await driver.sessions() if session.ended)
        return bool(found)

    await until(look, 6 * KEEPALIVE + 10)
    return found[0]


async def test_every_byte_is_counted_over_an_agents_death_until_the_client_leaves(
    driver: OpenVpn, rig: OpenVpnDcoRig
) -> None:
    client = await connected(rig)
    before = await uncounted(driver, rig)
    (first,) = await driver.sessions()

    passing = asyncio.create_task(pings(rig, client, 20))
    await driver.close()
    await serve(driver, rig)
    await passing
    (second,) = await driver.sessions()
    assert second.id == first.id
    assert await uncounted(driver, rig) == before
    assert 0 <= second.rx - first.rx - 20 * PING <= 500  # control packets and keepalives
    assert 0 <= second.tx - first.tx - 20 * PING <= 500

    await pings(rig, client, 20)
    await asyncio.to_thread(client.end)
    last = await ended(driver)
    assert last.id == first.id
    arrived, left = on_the_wire(rig)
    assert 0 <= arrived - last.rx - before[0] <= 200  # what belongs to the farewell alone
    assert 0 <= left - last.tx - before[1] <= 200


async def test_a_kick_ends_the_traffic_and_its_last_bytes_are_counted(
    driver: OpenVpn, rig: OpenVpnDcoRig, refusals: dict[str, str]
) -> None:
    client = await connected(rig)
    before = await uncounted(driver, rig)
    (session,) = await driver.sessions()
    flood = rig.far.popen("ping", "-q", "-i", "0.01", "-s", "1000", "-I", client.device, "10.70.0.1")

    async def flows() -> bool:
        return (await driver.sessions())[0].rx > session.rx + 20 * PING

    await until(flows)
    arrived, left = on_the_wire(rig)
    refusals["alice"] = "not now"  # a client that comes back by itself would be in again at once
    await driver.kick(session.id)
    _, last_left = on_the_wire(rig)
    assert not await asyncio.to_thread(client.passes)
    rig.far.end(flood)
    last = await ended(driver)
    assert last.id == session.id
    assert last.rx >= arrived - before[0]
    assert last.tx >= left - before[1]
    assert last_left - before[1] - last.tx < PING  # no ping of the flood was answered after it


async def test_the_speed_of_an_account_is_limited(driver: OpenVpn, rig: OpenVpnDcoRig) -> None:
    await connected(rig)
    (before,) = await driver.sessions()
    limits = KernelLimits()
    try:
        await limits.apply([Allowed(account=1, addresses=(before.address,), rate_down=RATE)])
        began = time.monotonic()
        await asyncio.to_thread(flood, before.address, SECONDS)
        (after,) = await driver.sessions()
        took = time.monotonic() - began
    finally:
        await limits.apply([])
        await limits.close()
    passed = (after.tx - before.tx) * 8
    assert RATE * SECONDS / 2 < passed < RATE * took * 1.3  # the queue begins with a burst


def flood(address: str, seconds: float) -> None:
    """Far more than the limit, from the host to a client."""
    until = time.monotonic() + seconds
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        while time.monotonic() < until:
            sender.sendto(bytes(1000), (address, 9))
            time.sleep(0.002)


async def test_the_session_of_a_silent_client_ends_with_every_byte(driver: OpenVpn, rig: OpenVpnDcoRig) -> None:
    client = await connected(rig, "disable-dco")
    before = await uncounted(driver, rig)
    await pings(rig, client, 20)
    for pid in rig.far.pids():
        os.kill(pid, signal.SIGSTOP)
    last = await ended(driver)
    assert on_the_wire(rig)[0] - last.rx == before[0]
    assert last.rx > 20 * PING


def server_pid(rig: OpenVpnDcoRig) -> int:
    return next(pid for pid, name in rig.host.programs().items() if name == "openvpn")


async def test_a_server_that_dies_leaves_no_device_that_passes_data(
    driver: OpenVpn, rig: OpenVpnDcoRig, told: asyncio.Event
) -> None:
    client = await connected(rig)
    (device,) = devices(rig)
    told.clear()
    os.kill(server_pid(rig), signal.SIGKILL)
    async with asyncio.timeout(5 * SLOWDOWN):
        await told.wait()
    assert (await ended(driver)).reason == "the server ended"
    assert devices(rig) == [device]  # so it is the agent that takes it away, or it would keep the port

    await serve(driver, rig)

    async def again() -> bool:
        return client.said().count(CONNECTED) > 1

    await until(again, 6 * KEEPALIVE + 10)
    assert await asyncio.to_thread(client.passes)
    (session,) = await driver.sessions()
    await driver.stop()
    assert (await ended(driver)).id == session.id
    assert devices(rig) == []
