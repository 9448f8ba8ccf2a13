"""What only the OpenVPN driver does, with real servers and clients; the rest is in the conformance suite.

Clients that leave by themselves come by TCP where that proves the same: a server of UDP takes five
seconds to believe it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import stat
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from agent import files
from agent.drivers.base import DriverError, LiveSession, Unsupported
from agent.drivers.openvpn import OpenVpn, Units, config, process, unit
from agent.drivers.openvpn.management import Management
from agent.drivers.openvpn.process import Launcher
from shared.crypt import hash_password
from tests.support.openvpn import Authority, Client, OpenVpnRig, OpenVpnUnitsRig

pytestmark = pytest.mark.netns


@pytest.fixture(params=[OpenVpnRig])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenVpnRig]:
    with request.param(tmp_path) as made:
        yield made


whoever_starts = pytest.mark.parametrize("rig", [OpenVpnRig, OpenVpnUnitsRig], indirect=True, ids=["agent", "systemd"])


@pytest.fixture
def told() -> asyncio.Event:
    return asyncio.Event()


@pytest.fixture
async def driver(rig: OpenVpnRig, told: asyncio.Event) -> AsyncIterator[OpenVpn]:
    made = new_driver(rig, told)
    await rig.prepare(made)
    yield made
    await made.stop()
    await made.close()


def new_driver(rig: OpenVpnRig, told: asyncio.Event) -> OpenVpn:
    return rig.driver(lambda username: None, told.set)


async def connected(client: Client) -> Client:
    await asyncio.to_thread(client.connect)
    return client


async def passes(client: Client) -> bool:
    return await asyncio.to_thread(client.passes)


async def until(condition: Callable[[], Awaitable[object]], timeout: float = 30) -> None:
    async with asyncio.timeout(timeout):
        while not await condition():  # noqa: ASYNC110 — another process changes it
            await asyncio.sleep(0.02)


async def live(driver: OpenVpn) -> list[LiveSession]:
    return [session for session in await driver.sessions() if not session.ended]


def processes(rig: OpenVpnRig) -> dict[str, int]:
    """The servers' processes by transport, which their sockets are named after."""
    sockets = {}
    for line in rig.host.run("cat", "/proc/net/unix").splitlines():
        fields = line.split()
        if fields[-1].endswith(".sock"):
            sockets[f"socket:[{fields[6]}]"] = Path(fields[7]).name.partition(".")[0]
    found = {}
    for pid in rig.host.pids():
        with contextlib.suppress(FileNotFoundError):  # it ended while we looked
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                if transport := sockets.get(str(descriptor.readlink())):
                    found[transport] = pid
    return found


async def test_both_transports_serve_both_ip_versions_and_both_ways_to_log_in(driver: OpenVpn, rig: OpenVpnRig) -> None:
    await driver.ensure(rig.spec())
    await driver.put([rig.credential("alice"), rig.credential("bob")])
    clients = [
        await connected(rig.client(username, remote=remote, transport=transport))
        for username, remote, transport in (
            ("alice", "192.0.2.1", "udp"),
            ("bob", "2001:db8::1", "udp"),
            ("alice", "2001:db8::1", "tcp"),
            ("bob", "192.0.2.1", "tcp"),
        )
    ]
    for client in clients:
        assert await passes(client)
    assert await asyncio.to_thread(clients[1].ping, "fd70::1")
    assert await asyncio.to_thread(clients[2].ping, "fd70:0:0:1::1")

    sessions = sorted(await live(driver), key=lambda session: session.address)
    assert [(each.username, each.address, each.address6) for each in sessions] == [
        ("alice", "10.70.0.2", "fd70::1000"),
        ("bob", "10.70.0.3", "fd70::1001"),
        ("alice", "10.70.128.2", "fd70:0:0:1::1000"),
        ("bob", "10.70.128.3", "fd70:0:0:1::1001"),
    ]
    assert [each.remote.rpartition(":")[0] for each in sessions] == [
        "192.0.2.2",
        "[2001:db8::2]",
        "[2001:db8::2]",
        "192.0.2.2",
    ]
    assert len({each.id for each in sessions}) == 4
    pushed = clients[0].said()
    for option in ("dhcp-option DNS 10.70.0.1", "dhcp-option DNS6 fd70::1", "redirect-gateway def1 ipv6"):
        assert option in pushed
    assert "TLSv1.3" in pushed


@pytest.mark.parametrize(
    ("ipv4_pool", "ipv6_pool", "addresses"),
    [
        ("10.70.0.0/28", "fd70::/123", {("10.70.0.2", "fd70::2"), ("10.70.0.10", "fd70::12")}),
        ("10.70.0.0/16", "fd70::/112", {("10.70.0.2", "fd70::2"), ("10.70.128.2", "fd70::8002")}),
        ("10.64.0.0/10", None, {("10.64.0.2", ""), ("10.96.0.2", "")}),
    ],
)
async def test_pools_of_any_size_are_served(
    driver: OpenVpn, rig: OpenVpnRig, ipv4_pool: str, ipv6_pool: str | None, addresses: set[tuple[str, str]]
) -> None:
    await driver.ensure(rig.spec(ipv4_pool=ipv4_pool, ipv6_pool=ipv6_pool))
    await driver.put([rig.credential("alice")])
    for transport in ("udp", "tcp"):
        await connected(rig.client("alice", transport=transport))
    assert {(each.address, each.address6) for each in await live(driver)} == addresses


async def test_any_address_of_the_host_answers_by_udp(driver: OpenVpn, rig: OpenVpnRig) -> None:
    rig.host.run("ip", "address", "add", "198.51.100.7/32", "dev", "lo")
    rig.far.run("ip", "route", "add", "198.51.100.7", "via", "192.0.2.1")
    await driver.ensure(rig.spec())
    await driver.put([rig.credential("alice")])
    client = rig.client("alice", remote="198.51.100.7")
    await asyncio.to_thread(client.connect)
    assert await asyncio.to_thread(client.passes)


async def test_bytes_are_those_that_passed(driver: OpenVpn, rig: OpenVpnRig) -> None:
    await driver.ensure(rig.spec())
    await driver.put([rig.credential("alice")])
    client = await connected(rig.client("alice"))
    (before,) = await live(driver)
    await asyncio.to_thread(client.echoes, 100)
    (after,) = await live(driver)
    assert 100 * 1028 <= after.rx - before.rx <= 100 * 1028 * 1.1
    assert 100 * 1028 <= after.tx - before.tx <= 100 * 1028 * 1.1
    await asyncio.to_thread(client.end)

    ended: list[LiveSession] = []

    async def gone() -> bool:
        ended.extend(session for session in await driver.sessions() if session.ended)
        return bool(ended)

    await until(gone)
    assert ended[0].id == after.id
    assert after.rx <= ended[0].rx <= after.rx + 1000


async def test_what_passed_since_the_last_look_is_counted_when_a_session_is_ended(
    driver: OpenVpn, rig: OpenVpnRig
) -> None:
    await driver.ensure(rig.spec())
    await driver.put([rig.credential("alice"), rig.credential("bob")])
    for username in ("alice", "bob"):
        client = await connected(rig.client(username))
        (before,) = await live(driver)
        await asyncio.to_thread(client.echoes, 50)
        if username == "alice":
            await driver.kick(before.id)
        else:
            await driver.remove([username])
        (ended,) = (each for each in await driver.sessions() if each.ended and each.id == before.id)
        assert 50 * 1028 <= ended.rx - before.rx <= 50 * 1028 * 1.1
        assert 50 * 1028 <= ended.tx - before.tx <= 50 * 1028 * 1.1
        await asyncio.to_thread(client.end)
        await driver.remove([username])


@whoever_starts
async def test_a_lost_connection_is_made_anew_and_no_session_suffers(
    driver: OpenVpn, rig: OpenVpnRig, told: asyncio.Event
) -> None:
    await driver.ensure(rig.spec(transports=("tcp",)))
    await driver.put([rig.credential("alice"), rig.credential("bob")])
    alice, bob = [await connected(rig.client(username, transport="tcp")) for username in ("alice", "bob")]
    before = {each.username: each.id for each in await live(driver)}
    told.clear()

    assert driver._servers is not None
    driver._servers["tcp"]._management._writer.transport.abort()
    async with asyncio.timeout(5):
        await told.wait()
    await asyncio.to_thread(alice.end)

    ended: list[LiveSession] = []

    async def bob_alone() -> bool:
        seen = await driver.sessions()
        ended.extend(each for each in seen if each.ended)
        return {each.username: each.id for each in seen if not each.ended} == {"bob": before["bob"]}

    await until(bob_alone)
    assert [each.id for each in ended] == [before["alice"]]
    assert await passes(bob)
    await driver.remove(["bob"])
    assert not await passes(bob)


async def test_a_session_whose_login_went_while_no_agent_ran_is_found(
    driver: OpenVpn, rig: OpenVpnRig, told: asyncio.Event
) -> None:
    await driver.ensure(rig.spec())
    await driver.put([rig.credential("alice"), rig.credential("bob")])
    alice, bob = await connected(rig.client("alice")), await connected(rig.client("bob"))
    await driver.close()

    again = new_driver(rig, told)
    found = await again.credentials()
    assert set(found) == {"alice", "bob"}
    assert found["alice"].digest() != rig.credential("alice").digest()
    await again.put([rig.credential("alice")])
    await again.remove([username for username in found if username != "alice"])
    assert await passes(alice)
    assert not await passes(bob)
    assert {name: each.digest() for name, each in (await again.credentials()).items()} == {
        "alice": rig.credential("alice").digest()
    }
    await again.close()


async def test_one_login_may_have_several_sessions_and_a_kick_takes_one(driver: OpenVpn, rig: OpenVpnRig) -> None:
    await driver.ensure(rig.spec())
    await driver.put([rig.credential("bob")])
    first = await connected(rig.client("bob"))
    (session,) = await live(driver)
    second = await connected(rig.client("bob"))
    assert await passes(first)
    assert len(await live(driver)) == 2

    await driver.kick(session.id)
    assert session.id not in {each.id for each in await live(driver)}
    assert await passes(second)


class Hostile:
    """A client that hears nothing of what the server says, and goes on sending."""

    def __init__(self, rig: OpenVpnRig, client: Client) -> None:
        self._rig = rig
        rules = "table inet deaf { chain input { type filter hook input priority 0; udp sport 1194 drop; }; }"
        rig.far.run("nft", "-f", "-", stdin=rules)
        rig.far.popen("ping", "-i", "0.002", "-I", client.device, "10.70.0.1", stdout=subprocess.DEVNULL)

    def arrived(self) -> int:
        """Packets that came out of the servers' tunnels."""
        links = json.loads(self._rig.host.run("ip", "-j", "-s", "link", "show"))
        return sum(link["stats64"]["rx"]["packets"] for link in links if link["ifname"].startswith("tun"))

    async def sends(self) -> None:
        begin = self.arrived()

        async def more() -> bool:
            return self.arrived() > begin + 20

        await until(more)

    async def is_silenced(self) -> None:
        at_once = self.arrived()
        await asyncio.sleep(1)  # in which it sends some hundred packets
        assert self.arrived() == at_once


@pytest.mark.parametrize("adopted", [False, True])
async def test_a_client_that_ignores_its_end_gets_no_packet_through(
    driver: OpenVpn, rig: OpenVpnRig, told: asyncio.Event, adopted: bool
) -> None:
    await driver.ensure(rig.spec())
    await driver.put([rig.credential("bob")])
    hostile = Hostile(rig, await connected(rig.client("bob")))
    await hostile.sends()
    if adopted:
        await driver.close()
        driver = new_driver(rig, told)
        await driver.ensure(rig.spec())

    await driver.remove(["bob"])

    await hostile.is_silenced()
    assert await live(driver) == []
    await driver.close()


async def test_keys_are_renewed_while_the_login_stands_and_no_longer(driver: OpenVpn, rig: OpenVpnRig) -> None:
    await driver.ensure(rig.spec())
    await driver.put([rig.credential("bob")])
    client = await connected(rig.client("bob", options=("reneg-sec 2", "pull-filter ignore redirect-gateway")))
    (session,) = await live(driver)

    async def renewed() -> bool:
        return client.said().count("Control Channel: TLSv1.3") >= 3

    await until(renewed)
    await until(lambda: passes(client))  # a packet may be lost in the moment between two keys
    assert [each.id for each in await live(driver)] == [session.id]

    await driver.put([rig.credential("bob", secret=hash_password("another"))])
    ended: list[LiveSession] = []

    async def thrown_out() -> bool:
        ended.extend(each for each in await driver.sessions() if each.ended)
        return bool(ended)

    await until(thrown_out)
    assert ended[0].id == session.id
    assert "wrong user name" in ended[0].reason


async def test_a_client_that_came_while_nobody_was_there_does_not_wait_for_long(
    driver: OpenVpn, rig: OpenVpnRig, told: asyncio.Event
) -> None:
    await driver.ensure(rig.spec())
    await driver.close()
    client = rig.client("alice")
    client.start()
    client.wait_for("Peer Connection Initiated")
    again = new_driver(rig, told)
    await again.ensure(rig.spec())
    await again.put([rig.credential("alice")])
    await asyncio.to_thread(client.wait_for, "Initialization Sequence Completed", 20)
    assert [session.username for session in await live(again)] == ["alice"]
    await again.close()


@whoever_starts
async def test_a_process_that_dies_is_told_of_at_once_and_started_again(
    driver: OpenVpn, rig: OpenVpnRig, told: asyncio.Event
) -> None:
    await driver.ensure(rig.spec())
    await driver.put([rig.credential("alice")])
    client = await connected(rig.client("alice", transport="udp"))
    (session,) = await live(driver)
    before = processes(rig)
    told.clear()

    os.kill(before["udp"], signal.SIGKILL)
    async with asyncio.timeout(5):
        await told.wait()

    async def ended() -> list[LiveSession]:
        return [each for each in await driver.sessions() if each.ended]

    (last,) = await ended()
    assert (last.id, last.reason, last.rx >= session.rx) == (session.id, "the server ended", True)
    await driver.ensure(rig.spec())
    after = processes(rig)
    assert after["tcp"] == before["tcp"]
    assert after["udp"] != before["udp"]
    await asyncio.to_thread(client.end)
    await connected(rig.client("alice"))
    assert (await live(driver))[0].id != session.id


@whoever_starts
async def test_a_new_port_that_is_taken_leaves_the_old_server_alone(driver: OpenVpn, rig: OpenVpnRig) -> None:
    old = rig.spec(port=1200)
    await driver.ensure(old)
    await driver.put([rig.credential("alice")])
    client = await connected(rig.client("alice", port=1200))
    (session,) = await live(driver)
    before = processes(rig)

    with rig.taken(), pytest.raises(DriverError, match="1194: Address already in use"):
        await driver.ensure(rig.spec())

    assert processes(rig) == before
    assert [each.id for each in await live(driver)] == [session.id]
    assert await passes(client)

    await driver.ensure(rig.spec())
    assert set(processes(rig).values()).isdisjoint(before.values())
    await asyncio.to_thread(client.end)
    await connected(rig.client("alice"))


@whoever_starts
async def test_settings_that_openvpn_cannot_run_bring_the_old_ones_back(driver: OpenVpn, rig: OpenVpnRig) -> None:
    await driver.ensure(rig.spec())
    await driver.put([rig.credential("alice")])
    broken = rig.spec(ca=f"{rig.authority.pem}-----BEGIN CERTIFICATE-----\nQUJD\n-----END CERTIFICATE-----\n")

    with pytest.raises(DriverError, match="CA certificate"):
        await driver.ensure(broken)
    client = await connected(rig.client("alice"))
    before = processes(rig)
    with pytest.raises(DriverError, match="CA certificate"):  # and no session ends for it a second time
        await driver.ensure(broken)
    assert processes(rig) == before
    assert await passes(client)
    await driver.ensure(rig.spec())
    assert processes(rig) == before


@whoever_starts
async def test_a_transport_that_is_not_wanted_ends_and_the_other_stays(driver: OpenVpn, rig: OpenVpnRig) -> None:
    await driver.ensure(rig.spec())
    before = processes(rig)
    await driver.ensure(rig.spec(transports=("udp",)))
    assert processes(rig) == {"udp": before["udp"]}
    await driver.ensure(rig.spec())
    assert processes(rig)["udp"] == before["udp"]


class Stubborn(process.Detached):
    """A launcher with a process that does not end."""

    holds: int | None = None

    async def end(self, running: process.Process, tell: Callable[[str], None]) -> None:
        if running.pid == self.holds:
            raise DriverError(f"openvpn (process {running.pid}) does not end")
        await super().end(running, tell)

    def driver(self, rig: OpenVpnRig) -> OpenVpn:
        directory = rig.directory / "openvpn"
        return OpenVpn(directory, boot_id="b", admit=lambda _: None, notify=lambda: None, launcher=self)


@pytest.mark.parametrize(
    "changes", [{"transports": ("tcp",)}, {"dns": ("192.0.2.53",)}, {"port": 1200}], ids=["gone", "same", "other"]
)
async def test_a_process_that_does_not_end_is_not_forgotten(rig: OpenVpnRig, changes: dict[str, Any]) -> None:
    launcher = Stubborn(rig.directory / "openvpn")
    driver = launcher.driver(rig)
    await rig.prepare(driver)
    await driver.ensure(rig.spec())
    await driver.put([rig.credential("alice")])
    client = await connected(rig.client("alice"))
    (session,) = await live(driver)
    launcher.holds = processes(rig)["udp"]

    with pytest.raises(DriverError, match="does not end"):
        await driver.ensure(rig.spec(**changes))
    assert [each.id for each in await live(driver)] == [session.id]
    assert await passes(client)
    await driver.close()

    again = launcher.driver(rig)
    assert [each.id for each in await live(again)] == [session.id]
    launcher.holds = None
    await again.ensure(rig.spec(**changes))
    assert await live(again) == []
    await again.stop()
    assert processes(rig) == {}


async def test_of_two_that_an_agent_left_the_newer_one_stays_although_the_other_does_not_end(rig: OpenVpnRig) -> None:
    launcher = Stubborn(rig.directory / "openvpn")
    driver, spec = launcher.driver(rig), rig.spec(transports=("udp",), port=1200)
    await rig.prepare(driver)
    await driver.ensure(rig.spec(transports=("udp",)))
    launcher.holds = processes(rig)["udp"]
    (certificate,) = (rig.directory / "openvpn").glob("server.*.pem")
    newer = await driver._start(config.settings(spec, "udp", certificate.name, dual_stack=True))
    await newer.go()
    await newer.close()
    await driver.close()

    again = launcher.driver(rig)
    with pytest.raises(DriverError, match="does not end"):
        await again.sessions()
    launcher.holds = None
    await again.ensure(spec)
    assert processes(rig) == {"udp": newer.process.pid}
    await again.stop()
    assert processes(rig) == {}


async def test_a_renewed_certificate_waits_until_nobody_is_connected(driver: OpenVpn, rig: OpenVpnRig) -> None:
    spec = rig.spec(transports=("tcp",))
    await driver.ensure(spec)
    assert await driver.certificate_request() is None
    await driver.put([rig.credential("alice")])
    client = await connected(rig.client("alice", transport="tcp"))
    before = processes(rig)
    directory = rig.directory / "openvpn"
    old = next(directory.glob("server.*.pem"))
    # Half of its life is over: the same key, signed again with other dates, in place of the one that runs.
    old.write_bytes(_aged(rig.authority, old))
    request = await driver.certificate_request()
    assert request is not None
    assert await driver.certificate_request() != b""
    await driver.install_certificate(rig.authority.sign_server(request), rig.authority.pem.encode())
    assert await driver.certificate_request() is None

    await driver.ensure(spec)
    assert processes(rig) == before
    assert await passes(client)
    await asyncio.to_thread(client.end)

    async def nobody() -> bool:
        return not await live(driver)

    await until(nobody)
    await driver.ensure(spec)
    assert processes(rig) != before
    assert not old.exists()
    await connected(rig.client("alice", transport="tcp"))


def _aged(authority: Authority, path: Path) -> bytes:
    from agent.identity import signing_request

    text = path.read_text()
    key = text[text.index("-----BEGIN PRIVATE KEY") :]
    certificate = authority.sign_server(signing_request(key.encode()), timedelta(days=365), timedelta(days=300))
    return f"{text.splitlines()[0]}\n".encode() + certificate + key.encode()


async def test_without_a_certificate_the_server_says_what_it_waits_for(rig: OpenVpnRig, told: asyncio.Event) -> None:
    driver = new_driver(rig, told)
    with pytest.raises(DriverError, match="waits for its certificate"):
        await driver.ensure(rig.spec())
    await driver.close()


async def test_a_certificate_of_another_authority_is_asked_for_anew(driver: OpenVpn, rig: OpenVpnRig) -> None:
    other = Authority()
    with pytest.raises(DriverError, match="waits for its certificate"):
        await driver.ensure(rig.spec(ca=other.pem))
    request = await driver.certificate_request()
    assert request is not None
    await driver.install_certificate(other.sign_server(request), other.pem.encode())
    await driver.ensure(rig.spec(ca=other.pem))
    assert set(processes(rig)) == {"udp", "tcp"}


async def test_a_missing_program_is_named(rig: OpenVpnRig) -> None:
    directory = rig.directory / "openvpn"
    launcher = process.Detached(directory, program="no-such-openvpn")
    driver = OpenVpn(directory, boot_id="b", admit=lambda _: None, notify=lambda: None, launcher=launcher)
    await rig.prepare(driver)
    with pytest.raises(Unsupported, match="no-such-openvpn is not installed"):
        await driver.ensure(rig.spec())
    await driver.close()


async def test_systemd_that_does_not_listen_is_named(rig: OpenVpnRig, tmp_path: Path) -> None:
    launcher = Units(rig.directory / "openvpn", tmp_path / "nowhere")
    driver = OpenVpn(
        rig.directory / "openvpn", boot_id="b", admit=lambda _: None, notify=lambda: None, launcher=launcher
    )
    await rig.prepare(driver)
    with pytest.raises(DriverError, match=r"nowhere/.*systemctl start skynetvpn-openvpn.socket"):
        await driver.ensure(rig.spec())
    await driver.close()


@whoever_starts
async def test_a_configuration_with_a_fault_is_told_in_openvpns_words(rig: OpenVpnRig) -> None:
    directory = rig.directory / "openvpn"
    directory.mkdir(mode=0o700)
    launcher = rig.launcher(directory) or process.Detached(directory)
    filler = "".join(f"# {number} a file that is longer than what openvpn reads at once\n" for number in range(2000))
    files.write_private(directory / "udp.0.conf", f"dev tun\nno-such-option 1\n{filler}".encode())
    began = time.monotonic()
    with pytest.raises(DriverError, match=r"Unrecognized option .*no-such-option"):
        await launcher.start("udp.0")
    assert time.monotonic() - began < 5


async def alone(rig: OpenVpnRig) -> tuple[Launcher, str]:
    """A launcher, and the name of a configuration that it can start."""
    directory = rig.directory / "openvpn"
    driver = rig.driver(lambda _: None, lambda: None)
    await rig.prepare(driver)
    (certificate,) = directory.glob("server.*.pem")
    text = config.render(config.settings(rig.spec(), "udp", certificate.name, dual_stack=True))
    name = f"udp.{config.token(text)}"
    files.write_private(directory / f"{name}.conf", text.encode())
    return rig.launcher(directory) or process.Detached(directory), name


@whoever_starts
async def test_a_start_ends_what_one_before_it_has_left(rig: OpenVpnRig) -> None:
    launcher, name = await alone(rig)
    await (await launcher.start(name)).close()
    left = processes(rig)["udp"]
    management = await launcher.start(name)
    assert launcher.find(left, name) is None
    await management.close()
    await process.clear(launcher, name)
    assert launcher.find(management.pid, name) is None


@pytest.mark.parametrize("rig", [OpenVpnUnitsRig], indirect=True)
@pytest.mark.parametrize("late", [True, False])
async def test_a_start_that_fails_leaves_no_process(
    rig: OpenVpnRig, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher, name = await alone(rig)
    connect, connects = Management.connect, asyncio.Event()

    async def slow(path: Path) -> Management | None:
        management = await connect(path)
        if connects.is_set() or management is None:
            return management
        await management.close()
        connects.set()
        return await asyncio.Future()

    monkeypatch.setattr(Management, "connect", slow)
    if late:
        monkeypatch.setattr(unit, "ANSWER", 1.0)
    start = asyncio.create_task(launcher.start(name))
    async with asyncio.timeout(20):
        await connects.wait()
    assert set(processes(rig)) == {"udp"}
    if not late:
        start.cancel()
    with pytest.raises(DriverError if late else asyncio.CancelledError):
        await start
    assert processes(rig) == {}


async def test_a_process_that_was_given_up_and_does_not_end_keeps_its_file(rig: OpenVpnRig) -> None:
    launcher, name = await alone(rig)
    await (await launcher.start(name)).close()
    stubborn = Stubborn(rig.directory / "openvpn")
    stubborn.holds = processes(rig)["udp"]
    driver = stubborn.driver(rig)
    await driver.ensure(rig.spec(transports=("tcp",)))
    assert (rig.directory / "openvpn" / f"{name}.conf").exists()
    stubborn.holds = None
    await driver.ensure(rig.spec(transports=("tcp",)))
    assert set(processes(rig)) == {"tcp"}
    assert not (rig.directory / "openvpn" / f"{name}.conf").exists()
    await driver.stop()


@pytest.mark.parametrize("rig", [OpenVpnUnitsRig], indirect=True)
async def test_a_host_moves_to_systemd_with_the_next_agent(rig: OpenVpnRig, told: asyncio.Event) -> None:
    directory = rig.directory / "openvpn"
    before = Stubborn(directory).driver(rig)
    await rig.prepare(before)
    await before.ensure(rig.spec())
    await before.close()
    old = processes(rig)

    driver = new_driver(rig, told)
    await driver.ensure(rig.spec())
    assert set(processes(rig).values()).isdisjoint(old.values())
    assert list(directory.glob("*.sock")) == []
    await driver.put([rig.credential("alice")])
    await connected(rig.client("alice"))
    await driver.stop()
    assert processes(rig) == {}


@pytest.mark.parametrize("rig", [OpenVpnUnitsRig], indirect=True)
async def test_an_agents_own_process_that_it_may_not_end_is_told_of_and_keeps_its_files(
    rig: OpenVpnRig, told: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = rig.directory / "openvpn"
    before = Stubborn(directory).driver(rig)
    await rig.prepare(before)
    await before.ensure(rig.spec())
    await before.close()
    old, files_of_old = processes(rig), set(directory.iterdir())

    def refused(_descriptor: int, _number: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    driver = new_driver(rig, told)
    with monkeypatch.context() as patched:
        patched.setattr(signal, "pidfd_send_signal", refused)
        for work in (driver.ensure(rig.spec(transports=("udp",))), driver.stop()):
            with pytest.raises(DriverError, match=r"has started itself .*process \d+ .*Operation not permitted"):
                await work
        assert (processes(rig), set(directory.iterdir())) == (old, files_of_old)
    await driver.stop()
    assert processes(rig) == {}


async def test_secrets_are_in_private_files_only(driver: OpenVpn, rig: OpenVpnRig) -> None:
    await driver.ensure(rig.spec())
    directory = rig.directory / "openvpn"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
    assert len(modes) == 5  # a file and a socket for each transport, one certificate
    assert set(modes.values()) == {0o600}
    for pid in processes(rig).values():
        assert rig.authority.tls_crypt.splitlines()[1] not in rig.host.run("cat", f"/proc/{pid}/cmdline")


@whoever_starts
async def test_stopping_leaves_no_file(driver: OpenVpn, rig: OpenVpnRig) -> None:
    await driver.ensure(rig.spec())
    began = time.monotonic()
    await driver.stop()
    assert time.monotonic() - began < 10
    assert processes(rig) == {}
    assert list((rig.directory / "openvpn").iterdir()) == []
    assert list(rig.directory.glob("run/*.sock")) == []


@whoever_starts
async def test_a_process_that_an_agent_left_half_started_is_ended(
    driver: OpenVpn, rig: OpenVpnRig, told: asyncio.Event
) -> None:
    """Killed after the start and before the port was opened."""
    directory, spec = rig.directory / "openvpn", rig.spec(transports=("udp",))
    (certificate,) = directory.glob("server.*.pem")
    text = config.render(config.settings(spec, "udp", certificate.name, dual_stack=True))
    name = f"udp.{config.token(text)}"
    files.write_private(directory / f"{name}.conf", text.encode())
    launcher = rig.launcher(directory) or process.Detached(directory)
    await (await launcher.start(name)).close()
    left = processes(rig)

    await driver.ensure(spec)
    assert set(processes(rig)) == {"udp"}
    assert processes(rig) != left
    await driver.put([rig.credential("alice")])
    await connected(rig.client("alice", transport="udp"))
