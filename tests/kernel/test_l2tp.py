"""What only the L2TP/IPsec driver does, with a real kernel, real servers and real clients.

Each test adopts the servers that the last one left. What all drivers do is in tests/conformance.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agent.drivers.base import DriverError, LiveSession
from agent.drivers.l2tp import L2tp
from shared.access import Credential
from shared.resource import Protocol
from shared.services import L2tpServer
from tests.support.l2tp import BOOT_ID, PASSWORD, PSK, SLOWDOWN, L2tpClient, require_l2tp
from tests.support.netns import CommandFailed, Namespace, wait_until

pytestmark = [pytest.mark.kernel, pytest.mark.netns]

SERVER = "10.71.0.1"
SPEC = L2tpServer(psk=PSK, ipv4_pool="10.71.0.0/24", dns=("10.71.0.1", "fd00::1"))
# RFC 2661: SCCRQ with protocol version, framing capabilities, host name and tunnel id.
START_REQUEST = (
    bytes.fromhex("c8020037000000000000000080080000000000018008000000020100800a0000000300000003800900000007")
    + b"lac"
    + bytes.fromhex("8008000000090007")
)


@dataclass
class Site:
    """One host and two clients behind different addresses, all with their daemons."""

    server: Namespace
    directory: Path
    first: L2tpClient
    second: L2tpClient
    refusals: dict[str, str] = field(default_factory=dict)  # what `admit` answers

    def driver(self, notified: asyncio.Event | None = None) -> L2tp:
        notify = notified.set if notified is not None else lambda: None
        return L2tp(
            self.directory / "l2tp", boot_id=BOOT_ID.read_text().strip(), admit=self.refusals.get, notify=notify
        )


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    require_l2tp()
    directory = Path(tempfile.mkdtemp(prefix="l2tp-"))
    try:
        with Namespace("lns") as server, Namespace("lac1") as one, Namespace("lac2") as two:
            server.connect(one, "192.0.2.1/24", "192.0.2.2/24")
            server.connect(two, "198.51.100.1/24", "198.51.100.2/24")
            clients = [
                L2tpClient(one, directory / "one", "192.0.2.1"),
                L2tpClient(two, directory / "two", "198.51.100.1", ("aes256-sha1-modp2048", "aes256-sha1")),  # Windows
            ]
            for client in clients:
                client.start()
            yield Site(server, directory, clients[0], clients[1])
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def inside(site: Site) -> Iterator[None]:
    with site.server.entered():
        yield


@pytest.fixture
async def driver(site: Site, inside: None) -> AsyncIterator[L2tp]:
    opened = site.driver()
    await opened.ensure(SPEC)
    await opened.put([login("alice"), login("bob")])
    await opened.sessions()
    yield opened
    await opened.close()


@pytest.fixture
async def alice(site: Site, driver: L2tp) -> AsyncIterator[str]:
    """Connected; the address inside."""
    yield await asyncio.to_thread(site.first.connect, PSK, "alice", PASSWORD)
    site.first.hang_up()
    await eventually(lambda: no_session(driver))


def login(name: str, password: str = PASSWORD) -> Credential:
    return Credential(protocol=Protocol.L2TP, username=name, account=1, secret=password)


async def eventually(condition: Callable[[], Awaitable[bool]], timeout: float = 10) -> None:
    async with asyncio.timeout(timeout * SLOWDOWN):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def no_session(driver: L2tp) -> bool:
    return await driver.sessions() == []


async def only(driver: L2tp) -> LiveSession:
    (session,) = await driver.sessions()
    return session


async def ended(driver: L2tp) -> LiveSession:
    found: list[LiveSession] = []

    async def look() -> bool:
        found.extend(session for session in await driver.sessions() if session.ended)
        return bool(found)

    await eventually(look)
    return found[0]


async def test_a_client_connects_and_its_bytes_are_true(site: Site, driver: L2tp, alice: str) -> None:
    assert alice.startswith("10.71.0.")
    before = await only(driver)
    assert (before.username, before.address, before.remote) == ("alice", alice, "192.0.2.2:1701")
    assert before.interface.startswith("ppp")
    assert abs(before.since - time.time()) < 30 * SLOWDOWN

    await asyncio.to_thread(site.first.ping, SERVER, 5, 1000)

    after = await only(driver)
    assert after.id == before.id
    for counted in (after.rx - before.rx, after.tx - before.tx):
        assert 5 * 1028 <= counted <= 5 * 1028 + 200  # ICMP and IP headers, and whatever PPP says between


async def test_a_session_that_ends_without_the_agent_is_told_with_its_last_bytes(site: Site, driver: L2tp) -> None:
    await asyncio.to_thread(site.first.connect, PSK, "alice", PASSWORD)
    before = await only(driver)
    await driver.close()
    await asyncio.to_thread(site.first.ping, SERVER, 3, 1000)
    await asyncio.to_thread(site.first.hang_up)
    wait_until(lambda: "ppp" not in site.server.run("ip", "-br", "link"), 10 * SLOWDOWN)

    second = site.driver()
    told = await only(second)
    assert (told.id, told.username) == (before.id, "alice")
    assert told.ended >= told.since
    # pppd's own count, of which this is, begins when IP is up; the interface's has what PPP itself said before.
    assert told.rx >= before.rx + 3 * 1028 - 100
    assert await no_session(second)
    await second.close()


async def test_a_wrong_pre_shared_key_gets_no_association(site: Site, driver: L2tp) -> None:
    site.second.insecure()
    with pytest.raises(CommandFailed):
        await asyncio.to_thread(site.second.secure, "another key of no use")
    assert "esp" not in site.server.run("ip", "xfrm", "state", "list", "dst", "198.51.100.2")


async def test_l2tp_without_ipsec_gets_no_answer(site: Site, driver: L2tp) -> None:
    site.second.insecure()

    def answered() -> bool:
        with site.second.namespace.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
            plain.settimeout(1 * SLOWDOWN)
            plain.sendto(START_REQUEST, ("198.51.100.1", 1701))
            with contextlib.suppress(TimeoutError):
                return bool(plain.recv(2048))
            return False

    site.server.run("nft", "delete", "table", "inet", "skynetvpn_l2tp")
    assert await asyncio.to_thread(answered)  # so it is the packet filter that keeps it out
    await driver.ensure(SPEC)
    assert not await asyncio.to_thread(answered)


def written(records: Path) -> bool:
    return any(path.read_text().endswith("end\n") for path in records.iterdir())


async def test_whom_admit_refuses_is_out_at_the_first_look(site: Site, driver: L2tp) -> None:
    site.refusals["bob"] = "too many sessions"
    try:
        site.second.secure(PSK)
        site.second.dial("bob", PASSWORD)
        records = site.directory / "l2tp" / "ppp" / "sessions"
        await asyncio.to_thread(wait_until, lambda: written(records), 20 * SLOWDOWN)
        assert await driver.sessions() == []
        assert "ppp" not in site.server.run("ip", "-br", "link")
    finally:
        site.refusals.clear()


async def test_another_key_keeps_the_sessions_and_another_pool_ends_them(site: Site, driver: L2tp, alice: str) -> None:
    before = await only(driver)
    await driver.ensure(L2tpServer(psk="quite another key", ipv4_pool="10.71.0.0/24", dns=SPEC.dns))
    assert (await only(driver)).id == before.id
    await driver.ensure(L2tpServer(psk=PSK, ipv4_pool="10.73.0.0/24"))
    assert (await ended(driver)).id == before.id


async def test_a_server_that_died_is_notified_of_and_started_again(site: Site, driver: L2tp) -> None:
    await driver.close()
    notified = asyncio.Event()
    second = site.driver(notified)
    await second.ensure(SPEC)
    for name in ("ppp/xl2tpd.pid", "charon.pid"):
        notified.clear()
        os.kill(int((site.directory / "l2tp" / name).read_text()), 9)
        async with asyncio.timeout(5 * SLOWDOWN):
            await notified.wait()
        await second.ensure(SPEC)
    await second.close()


async def test_a_stopped_server_leaves_nothing(site: Site, driver: L2tp, alice: str) -> None:
    session = await only(driver)
    await driver.stop()
    assert (await ended(driver)).id == session.id
    assert await no_session(driver)
    await driver.stop()
    left = [path for path in (site.directory / "l2tp").rglob("*") if not path.is_dir()]
    assert left == []
    assert "skynetvpn_l2tp" not in site.server.run("nft", "list", "tables")
    assert site.server.run("ss", "-Huln").strip() == ""


async def test_a_port_that_is_taken_is_told_at_once(site: Site, inside: None) -> None:
    await site.driver().stop()
    for port in (500, 4500, 1701):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("0.0.0.0", port))
            driver = site.driver()
            began = time.monotonic()
            with pytest.raises(DriverError, match=f"UDP port {port} is in use"):
                await driver.ensure(SPEC)
            assert time.monotonic() - began < 1 * SLOWDOWN  # the emulated processor takes five times as long
            await driver.stop()
            await driver.close()
