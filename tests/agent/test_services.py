"""Servers of other protocols on a model host: what is wanted, what it has, what is answered, and who does not wait."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from agent import changes
from agent.drivers.base import Admit, DriverError, Notify, Unsupported
from agent.leftover import LeftOver
from agent.services import Services
from shared.access import Lease, SessionEnd
from shared.desired import Kind, digest
from shared.protocol import Applied, Drift, Refused, Resync
from shared.resource import Protocol
from tests.agent.fleet import (
    INTERFACE,
    L2TP,
    OPENVPN,
    SCOPE,
    SSH,
    Node,
    delta,
    login,
    peer,
    snapshot,
    until,
    welcome,
)
from tests.agent.model_service import ModelHosts, ModelService

ACCOUNTS = "protocol:ssh"
PEERS = [peer(number) for number in range(20)]
LOGINS = [login(number) for number in range(20)]


def applied(node: Node, scope: str = SCOPE) -> Applied:
    """The latest acknowledgement of the scope; one of nothing before the first."""
    found = (frame for frame in reversed(node.frames) if isinstance(frame, Applied) and frame.scope == scope)
    return next(found, Applied(scope=scope, revision=0, digest=b""))


async def has(node: Node, scope: str, payloads: list[object], revision: int) -> None:
    """Wait until the scope is acknowledged without a failure, and with the digest of exactly these resources."""
    wanted = Applied(scope=scope, revision=revision, digest=digest(payloads))  # type: ignore[arg-type]
    await until(lambda: applied(node, scope) == wanted)


async def serving(node: Node) -> None:
    """WireGuard, and SSH with the logins of a scope of its own."""
    await node.send(welcome(SCOPE, ACCOUNTS), snapshot([INTERFACE, SSH, *PEERS]), snapshot(LOGINS, scope=ACCOUNTS))
    await has(node, SCOPE, [INTERFACE, SSH, *PEERS], 1)
    await has(node, ACCOUNTS, [*LOGINS], 1)


async def test_servers_and_logins_of_all_scopes_are_applied_and_counted(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await serving(node)
        assert node.hosts.hosts[Protocol.SSH].spec == SSH
        assert node.logins() == {item.username for item in LOGINS}
        own = login(70, Protocol.OPENVPN, connection="c1")
        await node.send(delta(1, 2, [OPENVPN, L2TP, own, login(71, Protocol.L2TP)]))
        await has(node, SCOPE, [INTERFACE, SSH, OPENVPN, L2TP, own, login(71, Protocol.L2TP), *PEERS], 2)
        assert node.logins(Protocol.OPENVPN) == {"user70"}
        assert {tunnels.name: tunnels.networks for tunnels in node.firewall.tunnels} == {
            "openvpn": ("10.70.0.0/16",),
            "l2tp": ("10.72.0.0/16",),
        }


async def test_delta_changes_only_what_it_names_and_removes_first(tmp_path: Path) -> None:
    changed = login(1, secret="$y$j9T$other$hash")
    async with Node(tmp_path) as node:
        await serving(node)
        node.driver().calls.clear()
        await node.send(delta(1, 2, [changed, login(50)], [LOGINS[0]], scope=ACCOUNTS))
        await has(node, ACCOUNTS, [changed, *LOGINS[2:], login(50)], 2)
        assert node.driver().calls[0] == ("remove", ["user0"])
        assert sorted(node.driver().calls[1][1]) == ["user1", "user50"]  # type: ignore[call-overload]
        assert len(node.driver().calls) == 2
        assert node.driver(Protocol.L2TP).made("put") == []


async def test_limits_and_leases_that_no_host_shows_cost_it_nothing(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await serving(node)
        node.driver().calls.clear()
        later = login(1, not_after=int(node.now) + 1000)
        await node.send(delta(1, 2, [later], scope=ACCOUNTS))
        await has(node, ACCOUNTS, [later, LOGINS[0], *LOGINS[2:]], 2)
        assert node.driver().made("put") == []
        node.now += 1001
        await until(lambda: "user1" not in node.logins())


async def test_lease_and_session_end_count_by_being_stored(tmp_path: Path) -> None:
    lease, end = Lease(account=7, allowance=100, ledger="l"), SessionEnd(session="s")
    async with Node(tmp_path) as node:
        await serving(node)
        await node.send(delta(1, 2, [lease, end]))
        await has(node, SCOPE, [INTERFACE, SSH, lease, end, *PEERS], 2)
        await node.send(delta(2, 3, [Lease(account=7, allowance=200, ledger="l")], [end]))
        await has(node, SCOPE, [INTERFACE, SSH, Lease(account=7, allowance=200, ledger="l"), *PEERS], 3)


# --- acknowledgements


async def test_change_of_peers_is_applied_and_answered_while_a_server_is_at_work_elsewhere(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await serving(node)
        node.driver().gates["put"] = asyncio.Event()
        await node.send(delta(1, 2, [login(50)], scope=ACCOUNTS))
        (answer,) = await node.send(delta(1, 2, [peer(60)]))
        assert answer == Applied(scope=SCOPE, revision=2, digest=digest([INTERFACE, SSH, *PEERS, peer(60)]))
        assert applied(node, ACCOUNTS).revision == 1
        node.driver().gates.pop("put").set()
        await has(node, ACCOUNTS, [*LOGINS, login(50)], 2)


async def test_removal_is_acknowledged_when_it_is_off_the_host(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await serving(node)
        node.driver().gates["remove"] = asyncio.Event()
        assert await node.send(delta(1, 2, removals=[LOGINS[0]], scope=ACCOUNTS)) == []
        await until(lambda: node.driver().made("remove"))
        assert applied(node, ACCOUNTS).revision == 1
        node.driver().gates.pop("remove").set()
        await has(node, ACCOUNTS, LOGINS[1:], 2)


async def test_peers_behind_a_server_that_hangs_are_answered_in_a_second_and_name_it(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await serving(node)
        node.driver().gates["ensure"] = asyncio.Event()
        moved = type(SSH)(port=2223, ipv4_pool=SSH.ipv4_pool)
        await node.send(delta(1, 2, [moved]))
        started = time.monotonic()
        await node.send(delta(2, 3, [peer(60)]))
        assert peer(60).public_key in node.present()
        await until(lambda: applied(node).revision == 3)
        assert time.monotonic() - started < changes._WORK_SECONDS - 1, "as long as a change of servers itself may take"
        assert [failure.kind for failure in applied(node).failures] == [Kind.SSH_SERVER]
        node.driver().gates.pop("ensure").set()
        await has(node, SCOPE, [INTERFACE, moved, *PEERS, peer(60)], 3)


# --- faults


@pytest.mark.parametrize(
    "error",
    [DriverError("port 2222 is taken by another program"), Unsupported("sshd is not installed"), ValueError("a bug")],
    ids=["port", "program", "bug"],
)
async def test_server_that_cannot_run_says_so_at_once_while_all_others_go_on(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "_WORK_SECONDS", 3600.0)  # an answer that waits for them comes too late
    monkeypatch.setattr(changes, "PATIENCE", 3600.0)
    async with Node(tmp_path) as node:
        node.driver().failing["ensure"] = error
        await node.send(welcome(SCOPE, ACCOUNTS))
        await node.send(snapshot([INTERFACE, SSH, OPENVPN, login(1, Protocol.OPENVPN), *PEERS]))
        await until(lambda: applied(node).failures)
        (failure,) = applied(node).failures
        assert (failure.kind, failure.key) == (Kind.SSH_SERVER, "ssh")
        assert str(error) in failure.message
        assert len(node.present()) == 20
        await until(lambda: node.logins(Protocol.OPENVPN) == {"user1"})
        (answer,) = await node.send(delta(1, 2, [peer(60)]))
        assert isinstance(answer, Applied) and len(answer.failures) == 1
        node.driver().failing.clear()
        await has(node, SCOPE, [INTERFACE, SSH, OPENVPN, login(1, Protocol.OPENVPN), *PEERS, peer(60)], 2)


async def test_server_that_dies_later_is_reported_at_once_and_recovers(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await serving(node)
        node.driver().failing["ensure"] = DriverError("sshd ended: signal SIGKILL")
        node.driver().notify()
        await until(lambda: applied(node).failures)
        assert "SIGKILL" in applied(node).failures[0].message
        node.driver().failing.clear()
        await has(node, SCOPE, [INTERFACE, SSH, *PEERS], 1)


async def test_login_that_the_host_refuses_is_named_and_the_others_get_in(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        node.driver().poison["user3"] = "useradd: user 'user3' exists and is not ours"
        await node.send(welcome(SCOPE, ACCOUNTS), snapshot([INTERFACE, SSH]), snapshot(LOGINS, scope=ACCOUNTS))
        await until(lambda: any(frame.scope == ACCOUNTS for frame in node.frames if isinstance(frame, Applied)))
        (failure,) = applied(node, ACCOUNTS).failures
        assert (failure.kind, failure.key, failure.message) == (
            Kind.CREDENTIAL,
            "ssh/user3",
            "useradd: user 'user3' exists and is not ours",
        )
        assert applied(node, ACCOUNTS).digest == digest([*LOGINS[:3], *LOGINS[4:]])
        node.driver().poison.clear()
        await has(node, ACCOUNTS, [*LOGINS], 1)


async def test_removal_that_fails_is_named_until_it_is_done(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await serving(node)
        node.driver().failing["remove"] = DriverError("userdel: user is in use")
        await node.send(delta(1, 2, removals=[LOGINS[0]], scope=ACCOUNTS))
        await until(lambda: applied(node, ACCOUNTS).failures)
        assert [failure.key for failure in applied(node, ACCOUNTS).failures] == ["ssh/user0"]
        node.driver().failing.clear()
        await has(node, ACCOUNTS, LOGINS[1:], 2)
        assert "user0" not in node.logins()


async def test_protocol_that_the_operator_did_not_choose_is_a_failure_and_starts_nothing(tmp_path: Path) -> None:
    async with Node(tmp_path, protocols=(Protocol.WIREGUARD,)) as node:
        await node.send(welcome(), snapshot([INTERFACE, SSH, *PEERS]))
        await until(lambda: node.frames)
        (failure,) = applied(node).failures
        assert "agent.yaml" in failure.message
        assert node.hosts.drivers == {}
        assert node.reconciler.hello().protocols == ["wireguard"]


async def test_driver_that_cannot_even_be_made_is_a_failure_of_its_own_server(tmp_path: Path) -> None:
    class Hosts(ModelHosts):
        def open(self, protocol: Protocol, admit: Admit, notify: Notify) -> ModelService:
            if protocol == Protocol.L2TP:
                raise ImportError("No module named 'vici'")
            return super().open(protocol, admit, notify)

    async with Node(tmp_path, hosts=Hosts()) as node:
        await node.send(welcome(), snapshot([INTERFACE, SSH, L2TP, login(1), *PEERS]))
        await until(lambda: applied(node).failures)
        (failure,) = applied(node).failures
        assert (failure.kind, failure.message) == (
            Kind.L2TP_SERVER,
            "l2tp cannot be served: ImportError: No module named 'vici'",
        )
        assert node.logins() == {"user1"}


async def test_state_that_cannot_be_stored_still_takes_a_revoked_login_off_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agent.state import StateError

    async def full(*_: object) -> None:
        raise StateError("disk full")

    async with Node(tmp_path) as node:
        await serving(node)
        monkeypatch.setattr(node.state, "change", full)
        await node.send(delta(1, 2, removals=[LOGINS[0]], scope=ACCOUNTS))
        await until(lambda: "user0" not in node.logins())
        assert node.last(Resync).scope == ACCOUNTS
        assert applied(node, ACCOUNTS).revision == 1


# --- scopes, guard, adoption


async def test_login_of_two_scopes_belongs_to_one_and_passes_to_the_other(tmp_path: Path) -> None:
    own = login(1, secret="$y$j9T$own$hash", connection="c1")
    async with Node(tmp_path) as node:
        await serving(node)
        await node.send(delta(1, 2, [own]))
        await has(node, SCOPE, [INTERFACE, SSH, own, *PEERS], 2)
        await until(lambda: applied(node, ACCOUNTS).failures)
        assert "node:1 asks for the same" in applied(node, ACCOUNTS).failures[0].message
        await node.send(delta(2, 3, removals=[own]))
        await until(lambda: applied(node, ACCOUNTS).digest == digest([*LOGINS]))
        assert node.hosts.hosts[Protocol.SSH].logins["user1"].secret == LOGINS[1].secret


async def test_logins_count_in_the_guard_beside_peers(tmp_path: Path) -> None:
    crowd = [login(number) for number in range(30)]
    async with Node(tmp_path) as node:
        await serving(node)
        await node.send(snapshot(crowd, 2, scope=ACCOUNTS))
        await has(node, ACCOUNTS, crowd, 2)
        (answer,) = await node.send(snapshot([], 3, scope=ACCOUNTS))
        assert isinstance(answer, Refused)
        assert (answer.removes, answer.present) == (30, 50)
        assert len(node.logins()) == 30
        answers = await node.send(welcome(SCOPE))
        assert isinstance(answers[0], Refused)
        assert len(node.logins()) == 30
        await node.send(welcome(SCOPE, ACCOUNTS), snapshot(crowd[:1], 3, scope=ACCOUNTS, confirmed=True))
        await has(node, ACCOUNTS, crowd[:1], 3)
        assert node.logins() == {"user0"}


async def test_restart_adopts_the_server_and_its_sessions(tmp_path: Path) -> None:
    hosts = ModelHosts()
    async with Node(tmp_path, hosts=hosts) as node:
        await serving(node)
        session = node.driver().connect("user1")
    async with Node(tmp_path, node.wireguard, hosts=hosts) as again:
        await again.send(welcome(SCOPE, ACCOUNTS))
        await has(again, ACCOUNTS, [*LOGINS], 1)
        assert again.driver().made("put") == again.driver().made("remove") == again.driver().made("stop") == []
        assert hosts.hosts[Protocol.SSH].starts == 1
        assert session in hosts.hosts[Protocol.SSH].live


async def test_nothing_is_removed_or_stopped_before_the_first_sync(tmp_path: Path) -> None:
    hosts = ModelHosts()
    async with Node(tmp_path / "old", hosts=hosts) as node:
        await serving(node)
    async with Node(tmp_path / "new", hosts=hosts) as fresh:
        await fresh.send(welcome(SCOPE, ACCOUNTS))
        await fresh.send(snapshot([INTERFACE, SSH]))
        await has(fresh, SCOPE, [INTERFACE, SSH], 1)
        assert len(fresh.logins()) == 20
        assert fresh.driver().made("stop") == []
        await fresh.send(snapshot(LOGINS[:15], scope=ACCOUNTS))
        await has(fresh, ACCOUNTS, LOGINS[:15], 1)
        assert len(fresh.logins()) == 15


async def test_recheck_heals_what_somebody_changed_by_hand(tmp_path: Path) -> None:
    async with Node(tmp_path, recheck_seconds=0.05) as node:
        await serving(node)
        there = node.hosts.hosts[Protocol.SSH].logins
        del there["user0"]
        there["user1"] = login(1, secret="$y$j9T$mallory$hash")
        there["mallory"] = login(99, username="mallory")
        await until(lambda: any(isinstance(frame, Drift) for frame in node.frames))
        assert node.last(Drift) == Drift(scope=SCOPE, missing=1, unexpected=1, changed=1)
        await until(lambda: there == {item.username: item for item in LOGINS})


async def test_server_that_is_no_longer_wanted_is_stopped(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await serving(node)
        await node.send(delta(1, 2, removals=[SSH]))
        await has(node, SCOPE, [INTERFACE, *PEERS], 2)
        assert node.hosts.hosts[Protocol.SSH].spec is None
        assert node.logins() == set()
        await node.send(delta(1, 2, [login(50)], scope=ACCOUNTS))
        await has(node, ACCOUNTS, [*LOGINS, login(50)], 2)
        await node.send(delta(2, 3, [SSH]))
        await has(node, SCOPE, [INTERFACE, SSH, *PEERS], 3)
        await until(lambda: len(node.logins()) == 21)


async def test_revocation_does_not_wait_for_a_crowd_that_is_let_in(tmp_path: Path) -> None:
    crowd = [login(number) for number in range(100, 2600)]
    async with Node(tmp_path) as node:
        await serving(node)
        gate = node.driver().gates["put"] = asyncio.Event()
        await node.send(delta(1, 2, crowd, scope=ACCOUNTS))
        await until(lambda: node.driver().made("put"))
        await node.send(delta(2, 3, removals=[LOGINS[0]], scope=ACCOUNTS))
        node.driver().gates.clear()
        gate.set()
        await has(node, ACCOUNTS, [*LOGINS[1:], *crowd], 3)
        calls = [call for call, _ in node.driver().calls]
        assert calls.index("remove") < len(calls) - 1 - calls[::-1].index("put")


async def test_hello_tells_protocols_and_host_keys(tmp_path: Path) -> None:
    async with Node(tmp_path, protocols=(Protocol.WIREGUARD, Protocol.SSH)) as node:

        async def host_keys() -> list[str]:
            return ["ssh-ed25519 AAAA"]

        node.driver().host_keys = host_keys  # type: ignore[attr-defined]
        await node.services.prepare()
        hello = node.reconciler.hello()
        assert (hello.protocols, hello.ssh_host_keys) == (["wireguard", "ssh"], ["ssh-ed25519 AAAA"])


async def test_what_is_left_of_a_protocol_is_stopped_once_however_many_tries_that_takes(tmp_path: Path) -> None:
    (tmp_path / "ssh").mkdir()
    served, hosts = (Protocol.WIREGUARD,), ModelHosts()
    hosts.hosts[Protocol.SSH].spec = SSH
    hosts.failing[Protocol.SSH] = {"stop": DriverError("no rights")}
    running = asyncio.create_task(Services(served, hosts.open, left_over=LeftOver(tmp_path, served)).run())
    await until(lambda: Protocol.SSH in hosts.drivers and len(hosts.drivers[Protocol.SSH].made("stop")) == 1)
    hosts.drivers[Protocol.SSH].failing.clear()
    await until(lambda: hosts.drivers[Protocol.SSH].closed)
    assert hosts.hosts[Protocol.SSH].spec is None
    running.cancel()
    assert LeftOver(tmp_path, served).protocols == []
    assert LeftOver(tmp_path, (*served, Protocol.SSH)).protocols == []
    assert LeftOver(tmp_path, served).protocols == [Protocol.SSH]  # it was served again meanwhile
