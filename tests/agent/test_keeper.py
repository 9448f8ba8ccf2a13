"""Sessions of model servers: followed, counted, reported and ended; what accounts may use, with and without a link."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from agent import keeper
from agent.drivers.base import DriverError
from shared.access import Lease, Limits, SessionEnd
from shared.protocol import Applied
from shared.resource import Protocol
from tests.agent.fleet import INTERFACE, OPENVPN, SCOPE, SSH, delta, login, peer, snapshot, until, welcome
from tests.agent.household import Household
from tests.agent.model_host import ModelWireGuard
from tests.agent.model_service import ModelHosts

METERED = Limits(metered=True, opening=1000)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has used all may wait for a larger lease, but not for long."""
    monkeypatch.setattr(keeper, "_PATIENCE", 0.2)


def leased(node: Household, account: int, allowance: int) -> Lease:
    return Lease(account=account, allowance=allowance, ledger=node.allowances.ledger)


async def serving(node: Household, *payloads: object) -> None:
    await node.send(welcome(), snapshot([INTERFACE, SSH, OPENVPN, *payloads]))  # type: ignore[list-item]
    await until(lambda: applied(node).revision == 1 and not node.services.busy(SCOPE))


def applied(node: Household) -> Applied:
    found = (frame for frame in reversed(node.frames) if isinstance(frame, Applied))
    return next(found, Applied(scope=SCOPE, revision=0, digest=b""))


def words(node: Household) -> dict[str, str]:
    return {failure.key: failure.message for failure in applied(node).failures}


async def reported(node: Household, session_id: str, **values: object) -> None:
    def told() -> bool:
        node.take_reports()
        stats = node.sessions.get(session_id)
        return stats is not None and all(getattr(stats, name) == value for name, value in values.items())

    await until(told)


# --- sessions


async def test_session_is_reported_at_once_with_its_account_and_then_as_it_moves(tmp_path: Path) -> None:
    async with Household(tmp_path) as node:
        await serving(node, login(1, connection="c1"))
        session = node.driver().connect("user1", rx=10)
        await reported(node, session, account=1, connection="c1", protocol="ssh", rx=10, ended=0)
        node.hosts.hosts[Protocol.SSH].move(session, 5, 7)
        await reported(node, session, rx=15, tx=7)
        node.take_reports()
        count = len(node.received)
        await until(lambda: len(node.driver().made("sessions")) > 20)
        assert [report for report in node.received[count:] if report.sessions] == []


async def test_first_report_of_a_link_has_every_live_session_and_says_so(tmp_path: Path) -> None:
    async with Household(tmp_path) as node:
        await serving(node, login(1))
        session = node.driver().connect("user1", rx=10)
        await reported(node, session, rx=10)
        assert [report.complete for report in node.received].count(True) == 1
        node.reports.disconnected()
        node.queue = node.outbox.open()
        await until(lambda: any(report.complete for report in node.take_reports()))
        assert [stats.id for stats in node.received[-1].sessions] == [session]


async def test_ended_session_is_repeated_until_it_is_acknowledged(tmp_path: Path) -> None:
    async with Household(tmp_path) as node:
        await serving(node, login(1))
        session = node.driver().connect("user1")
        await reported(node, session)
        node.hosts.hosts[Protocol.SSH].move(session, 77)
        node.hosts.hosts[Protocol.SSH].end(session)
        await until(lambda: any(stats.ended for r in node.take_reports(acknowledge=False) for stats in r.sessions))
        for _ in range(2):  # links that break before the answer
            node.reports.disconnected()
            node.queue = node.outbox.open()
            await until(lambda: any(stats.ended for r in node.take_reports(acknowledge=False) for stats in r.sessions))
        assert (node.sessions[session].rx, node.sessions[session].reason) == (77, "the client left")
        node.reports.received(node.received[-1].sequence)
        assert len(node.log) == 0


async def test_sessions_live_through_a_kill_and_those_that_are_gone_are_reported_with_what_was_known(
    tmp_path: Path,
) -> None:
    hosts, wireguard = ModelHosts(), ModelWireGuard()
    first = Household(tmp_path, wireguard, hosts)
    async with first:
        await serving(first, login(1), login(2))
        stays, goes = first.driver().connect("user1", rx=100), first.driver().connect("user2", rx=200, tx=1)
        await reported(first, goes, rx=200)
        await reported(first, stays, rx=100)
        await until(lambda: first.log.find(goes) is not None)
        await first.ledger.flush()
        await first.kill()
    hosts.hosts[Protocol.SSH].move(stays, 11)
    del hosts.hosts[Protocol.SSH].live[goes]  # nobody was there to see it
    async with Household(tmp_path, wireguard, hosts) as again:
        await reported(again, goes, rx=200, tx=1, account=2, reason="it was gone when the node looked")
        await reported(again, stays, rx=111, ended=0)
        assert again.allowances.used == {1: 111, 2: 201}


async def test_unreadable_server_ends_nobodys_session_and_is_read_again(tmp_path: Path) -> None:
    async with Household(tmp_path) as node:
        await serving(node, login(1), login(2, Protocol.OPENVPN))
        session = node.driver().connect("user1")
        await reported(node, session)
        node.driver().failing["sessions"] = DriverError("cannot read")
        other = node.driver(Protocol.OPENVPN).connect("user2", rx=3)
        await reported(node, other, rx=3)
        node.hosts.hosts[Protocol.SSH].move(session, 5)
        node.driver().failing.clear()
        await reported(node, session, rx=5, ended=0)


async def test_ordered_end_kicks_the_session_and_again_if_it_lives_on(tmp_path: Path) -> None:
    async with Household(tmp_path) as node:
        await serving(node, login(1))
        session = node.driver().connect("user1")
        await reported(node, session)
        node.driver().failing["kick"] = DriverError("not now")
        started = time.monotonic()
        await node.send(delta(1, 2, [SessionEnd(session=session)]))
        await until(lambda: len(node.driver().made("kick")) > 2)
        node.driver().failing.clear()
        await reported(node, session, reason="the controller ended it")
        assert time.monotonic() - started < 5
        assert node.live() == set()
        assert node.logins() == {"user1"}


# --- how many at a time


async def test_too_many_sessions_over_all_protocols_are_refused_or_the_newest_ends(tmp_path: Path) -> None:
    two = Limits(max_sessions=2)
    async with Household(tmp_path) as node:
        await serving(node, login(1, limits=two), login(1, Protocol.OPENVPN, username="vpn1", limits=two))
        driver, vpn = node.driver(), node.driver(Protocol.OPENVPN)
        assert vpn.admit("vpn1") is None
        assert vpn.admit("nobody") == "there is no such login"
        first, second = driver.connect("user1", since=100), vpn.connect("vpn1", since=200)
        await reported(node, first)
        await reported(node, second)
        assert vpn.admit("vpn1") == "the account may have 2 sessions at a time"
        third = driver.connect("user1", since=300)
        await reported(node, third, reason="the account may have 2 sessions at a time")
        assert (node.live(), node.live(Protocol.OPENVPN)) == ({first}, {second})


async def test_connected_peers_count_as_sessions_of_their_account(tmp_path: Path) -> None:
    one = Limits(max_sessions=1)
    async with Household(tmp_path) as node:
        await serving(node, login(1, Protocol.OPENVPN, limits=one), peer(1, account=1, limits=one))
        assert node.driver(Protocol.OPENVPN).admit("user1") is None
        node.wireguard.devices["wg0"].peers[peer(1).public_key].handshake = int(node.now)
        await until(lambda: node.driver(Protocol.OPENVPN).admit("user1") is not None)


# --- leases


@pytest.mark.usefixtures("impatient")
async def test_allowance_is_used_over_all_protocols_and_its_end_takes_peers_and_logins_away(tmp_path: Path) -> None:
    mine, other = peer(1, account=1, limits=METERED), peer(2, account=2, limits=METERED)
    async with Household(tmp_path) as node:
        await serving(node, mine, other, login(1, limits=METERED))
        session = node.driver().connect("user1", rx=600)
        await reported(node, session, rx=600)
        assert node.logins() == {"user1"}
        node.wireguard.devices["wg0"].peers[mine.public_key].tx = 400
        await until(lambda: words(node).keys() == {mine.key, "ssh/user1"})
        assert set(words(node).values()) == {"its allowance is used up"}
        assert node.present() == {other.public_key}
        assert node.logins() == node.live() == set()
        await reported(node, session, account=1, rx=600, reason="its login was taken away")
        await until(lambda: node.take_reports() is not None and node.usage.get(1) == 1000)
        await node.send(delta(1, 2, [leased(node, 1, 5000)]))
        await until(lambda: node.present() == {mine.public_key, other.public_key} and node.logins() == {"user1"})
        assert words(node) == {}


@pytest.mark.usefixtures("impatient")
async def test_allowance_ends_without_a_link_and_stays_ended_after_a_restart(tmp_path: Path) -> None:
    hosts, wireguard = ModelHosts(), ModelWireGuard()
    mine = peer(1, account=1, limits=METERED)
    cut_off = Household(tmp_path, wireguard, hosts, connected=False)
    async with cut_off:
        await serving(cut_off, mine, login(1, limits=METERED))
        wireguard.devices["wg0"].peers[mine.public_key].rx = 1001
        await until(lambda: not cut_off.present() and not cut_off.logins())
        await until(lambda: cut_off.allowances.used == {1: 1001})
        await cut_off.ledger.flush()
        await cut_off.kill()
    wireguard.calls.clear()
    async with Household(tmp_path, wireguard, hosts, connected=False) as again:
        assert again.present() == set()
        assert wireguard.calls and not any(call == "apply_peers" for call, _ in wireguard.calls)
        assert again.logins() == set()
        assert again.allowances.spent == {1}


async def test_login_whose_time_is_over_soon_ends_on_the_node_without_a_link(tmp_path: Path) -> None:
    async with Household(tmp_path, connected=False) as node:
        await serving(node, login(1, not_after=int(node.now) + 60))
        node.driver().connect("user1")
        await until(lambda: node.log.live())
        node.now += 60
        started = time.monotonic()
        await until(lambda: not node.logins() and not node.live())
        assert time.monotonic() - started < 5
        await until(lambda: words(node) == {"ssh/user1": "its lease has ended"})


@pytest.mark.usefixtures("impatient")
async def test_lease_of_another_ledger_gives_only_the_opening(tmp_path: Path) -> None:
    foreign = Lease(account=1, allowance=10**9, ledger="of a disk that is gone")
    async with Household(tmp_path) as node:
        await serving(node, login(1, limits=METERED), foreign)
        assert node.allowances.granted == {1: 1000}
        session = node.driver().connect("user1", rx=999)
        await reported(node, session, rx=999)
        assert node.logins() == {"user1"}
        node.hosts.hosts[Protocol.SSH].move(session, 1)
        await until(lambda: not node.logins())


async def test_account_that_is_metered_no_longer_is_let_in_again(tmp_path: Path) -> None:
    async with Household(tmp_path) as node:
        await serving(node, login(1, limits=Limits(metered=True)))
        assert node.logins() == set()
        await node.send(delta(1, 2, [login(1)]))
        await until(lambda: node.logins() == {"user1"})


async def test_last_bytes_of_a_peer_are_reported_before_its_removal_is_acknowledged(tmp_path: Path) -> None:
    mine = peer(1, account=1, limits=Limits(metered=True, opening=10**6))
    async with Household(tmp_path) as node:
        await serving(node, mine)
        for task in node._tasks:
            task.cancel()  # no reading but the last one
        node.wireguard.devices["wg0"].peers[mine.public_key].rx = 4321
        node.take_reports()
        await node.send(delta(1, 2, removals=[mine]))
        assert [(stats.public_key, stats.rx) for r in node.take_reports() for stats in r.peers] == [
            (mine.public_key, 4321)
        ]
        assert node.allowances.used == {1: 4321}
        node._tasks.clear()


# --- the kernel's part


async def test_kernel_is_told_addresses_users_rates_and_what_remains(tmp_path: Path) -> None:
    limits = Limits(metered=True, opening=1000, rate_up=10, rate_down=20)
    mine = peer(1, account=1, limits=limits, allowed_ips=("10.66.1.2/32", "fd66::2/128"))
    async with Household(tmp_path) as node:
        await serving(node, mine, login(1, limits=limits), login(2, limits=Limits(rate_up=5)), login(3))
        await until(lambda: node.limits.applied.keys() == {1})
        one = node.driver().connect("user1", address="", uid=5001, rx=300)
        node.driver().connect("user2", address="10.70.0.9", address6="fd70::9")
        node.driver().connect("user3")
        await until(lambda: node.limits.applied.keys() == {1, 2} and node.limits.applied[1].uids == (5001,))
        told = node.limits.applied[1]
        assert told.addresses == ("10.66.1.2", "fd66::2")
        assert (told.rate_up, told.rate_down, told.remaining) == (10, 20, 700)
        assert node.limits.applied[2].addresses == ("10.70.0.9", "fd70::9")
        assert (node.limits.applied[2].remaining, node.limits.applied[2].rate_up) == (None, 5)
        await node.send(delta(1, 2, [leased(node, 1, 2000)]))
        await until(lambda: node.limits.applied[1].remaining == 1700)
        assert node.limits.applied[1].grant != told.grant
        node.hosts.hosts[Protocol.SSH].end(one)
        await until(lambda: node.limits.applied[1].uids == ())


async def test_kernel_without_limits_is_survived(tmp_path: Path) -> None:
    async with Household(tmp_path) as node:
        node.limits.failing = DriverError("nft: no")
        await serving(node, login(1, limits=Limits(rate_up=5)))
        node.driver().connect("user1")
        await until(lambda: node.log.live())
        node.limits.failing = None
        await until(lambda: node.limits.applied)
