"""Our sshd with real clients in network namespaces."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import msgspec
import pytest

from agent.drivers.base import DriverError, LiveSession
from agent.drivers.ssh import Ssh, processes
from tests.support.netns import Namespace
from tests.support.openssh import (
    CLIENT,
    CLIENT6,
    ECHO_PORT,
    FAR,
    NODE,
    NODE6,
    NODE_INSIDE,
    PASSWORD,
    PORT,
    SPEC,
    Net,
    alice,
    begun,
    connect,
    echo_server,
    eventually,
    name_server,
    new_key,
    text_of,
)

pytestmark = pytest.mark.netns

LOCAL = 9000  # where the client listens
FORWARD = ("-L", f"127.0.0.1:{LOCAL}:{FAR}:{ECHO_PORT}")


async def forwarded(net: Net, port: int = LOCAL) -> socket.socket:
    """A connection through the tunnel that has carried something."""
    opened: list[socket.socket] = []

    async def connected() -> bool:
        with contextlib.suppress(OSError):
            opened.append(await asyncio.to_thread(connect, net.client, port))
            await asyncio.to_thread(_echoed, opened[-1], b"hello")
            return True
        return False

    await eventually(connected)
    return opened[-1]


def _echoed(opened: socket.socket, data: bytes) -> None:
    opened.sendall(data)
    missing = len(data)
    while missing:
        received = opened.recv(min(missing, 1 << 20))
        if not received:
            raise ConnectionResetError
        missing -= len(received)


async def gone(net: Net, pid: int) -> bool:
    return pid not in net.node.pids()


# --- logging in ---


async def test_a_password_lets_in_and_forwards(net: Net, driver: Ssh) -> None:
    net.ssh(*FORWARD)

    (session,) = await begun(driver)
    (await forwarded(net)).close()

    assert session.username == "alice"
    assert session.remote.rpartition(":")[0] == CLIENT
    assert abs(session.since - time.time()) < 30
    assert session.uid is not None
    assert net.notified


async def test_a_key_lets_in_where_no_password_fits(net: Net, driver: Ssh) -> None:
    path, public = await asyncio.to_thread(new_key, net.directory)
    await driver.put([alice(keys=(public,), password=False)])

    assert await net.denied()
    net.ssh(*FORWARD, key=path)

    (await forwarded(net)).close()
    assert [session.username for session in await begun(driver)] == ["alice"]


@pytest.mark.parametrize("server", ["127.0.0.53", "10.99.0.53"])
async def test_a_proxy_of_the_client_reaches_by_name(net: Net, driver: Ssh, server: str) -> None:
    """Names are resolved on the node, by its own resolver, which may be on loopback or in a private network."""
    net.node.add_address("lo", "10.99.0.53/32")
    (net.directory / "etc/resolv.conf").write_text(f"nameserver {server}\n")
    (net.directory / "etc/nsswitch.conf").write_text("passwd: files\nshadow: files\ngroup: files\nhosts: dns\n")
    await driver.ensure(SPEC)
    net.ssh("-D", f"127.0.0.1:{LOCAL}")
    await begun(driver)

    with name_server(net.node, server), await asyncio.to_thread(connect, net.client, LOCAL) as opened:
        opened.sendall(b"\5\1\0" + b"\5\1\0\3" + bytes([len(b"far.example")]) + b"far.example" + ECHO_PORT.to_bytes(2))
        assert await asyncio.to_thread(opened.recv, 2) == b"\5\0"
        assert (await asyncio.to_thread(opened.recv, 10))[1] == 0
        await asyncio.to_thread(_echoed, opened, b"hello")


@pytest.mark.parametrize("password", ["wrong", "", PASSWORD + " ", "x" * 900])
async def test_a_wrong_password_does_not(net: Net, driver: Ssh, password: str) -> None:
    assert await net.denied(password=password)
    assert await driver.sessions() == []


@pytest.mark.parametrize("user", ["root", "nobody", "stranger"])
async def test_an_account_that_is_not_ours_does_not_get_in(net: Net, driver: Ssh, user: str) -> None:
    await asyncio.to_thread(subprocess.run, ["usermod", "-p", alice().secret, "nobody"], check=True)
    await asyncio.to_thread(subprocess.run, ["usermod", "-p", alice().secret, "root"], check=True)

    assert await net.denied(user=user)


async def test_a_login_past_its_day_is_refused(net: Net, driver: Ssh) -> None:
    now = int(time.time())
    await driver.put([msgspec.structs.replace(alice(), not_after=now - 2 * 86400)])
    assert await net.denied()

    await driver.put([msgspec.structs.replace(alice(), not_after=now)])
    net.ssh(*FORWARD)
    await begun(driver)


async def test_a_login_that_the_admin_locked_is_refused_with_its_keys(net: Net, driver: Ssh) -> None:
    path, public = await asyncio.to_thread(new_key, net.directory)
    await driver.put([alice(keys=(public,))])
    await asyncio.to_thread(subprocess.run, ["usermod", "-L", "alice"], check=True)

    with_key = net.ssh(*FORWARD, key=path)

    assert await asyncio.to_thread(with_key.wait, 20) == 255
    assert await net.denied()
    credentials = await driver.credentials()
    assert credentials["alice"].digest() != alice(keys=(public,)).digest()


# --- what it must not give ---


@pytest.mark.parametrize(
    ("options", "command"),
    [((), ("id",)), ((), ()), (("-tt",), ()), (("-s",), ("sftp",)), (("-A", "-X"), ("id",))],
    ids=["command", "shell", "terminal", "subsystem", "forwarding"],
)
async def test_nothing_is_run_for_a_client(
    net: Net, driver: Ssh, options: tuple[str, ...], command: tuple[str, ...]
) -> None:
    code, words = await net.try_ssh(*options, command=command)

    assert code == 255, words
    assert "uid=" not in words


async def test_the_client_opens_no_port_on_the_node(net: Net, driver: Ssh) -> None:
    code, words = await net.try_ssh("-N", "-R", f"127.0.0.1:8000:{FAR}:{ECHO_PORT}")

    assert code == 255, words
    assert "8000" not in net.node.run("ss", "-Hltn")


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", NODE, NODE_INSIDE, "0.0.0.0", "10.70.0.1"])
async def test_the_node_itself_is_out_of_reach(net: Net, driver: Ssh, address: str) -> None:
    net.node.add_address("lo", "10.70.0.1/32")
    where = f"[{address}]" if ":" in address else address
    net.ssh(*FORWARD, "-L", f"127.0.0.1:{LOCAL + 1}:{where}:7001")
    (await forwarded(net)).close()

    with echo_server(net.node, "::" if ":" in address else "", 7001):
        with await asyncio.to_thread(connect, net.node, 7001, address) as reachable:
            await asyncio.to_thread(_echoed, reachable, b"hello")
        with (
            await asyncio.to_thread(connect, net.client, LOCAL + 1) as opened,
            contextlib.suppress(ConnectionResetError),
        ):
            opened.sendall(b"hello")
            assert await asyncio.to_thread(opened.recv, 5) == b""


@pytest.mark.parametrize("address", ["169.254.169.254", "10.1.2.3", "192.168.1.1", "100.64.0.1", "fd00:ec2::254"])
async def test_private_networks_are_out_of_reach(net: Net, driver: Ssh, address: str) -> None:
    net.far.add_address("lo", f"{address}/{128 if ':' in address else 32}")
    via = ("via", "inet6", "2001:db8:f::2") if ":" in address else ("via", FAR)
    inside = next(
        line.split()[1] for line in net.node.run("ip", "-o", "-4", "address").splitlines() if NODE_INSIDE in line
    )
    outside = next(line.split()[1] for line in net.far.run("ip", "-o", "-4", "address").splitlines() if FAR in line)
    net.node.add_address(inside, "2001:db8:f::1/64")
    net.far.add_address(outside, "2001:db8:f::2/64")
    net.node.run("ip", "route", "add", address, *via)
    where = f"[{address}]" if ":" in address else address
    net.ssh(*FORWARD, "-L", f"127.0.0.1:{LOCAL + 1}:{where}:7001")
    (await forwarded(net)).close()

    with echo_server(net.far, address, 7001):
        with await asyncio.to_thread(connect, net.node, 7001, address) as reachable:
            await asyncio.to_thread(_echoed, reachable, b"hello")
        with (
            await asyncio.to_thread(connect, net.client, LOCAL + 1) as opened,
            contextlib.suppress(ConnectionResetError),
        ):
            opened.sendall(b"hello")
            assert await asyncio.to_thread(opened.recv, 5) == b""


# --- the logins on the host ---


async def test_credentials_are_read_back_from_the_host(net: Net, driver: Ssh) -> None:
    _, public = await asyncio.to_thread(new_key, net.directory)
    wanted = [alice("a", keys=(public,)), alice("b"), alice("c", keys=(public,), password=False)]

    assert await driver.put(wanted) == {}

    found = await driver.credentials()
    assert {name: each.digest() for name, each in found.items()} == {
        each.username: each.digest() for each in [alice(), *wanted]
    }
    (net.directory / "etc/skynetvpn-ssh/keys/a").write_text(f"{public}\n{public}x\n")
    assert (await driver.credentials())["a"].digest() != wanted[0].digest()
    await driver.put(wanted)
    await driver.remove(["alice", "b"])
    assert {name: each.digest() for name, each in (await driver.credentials()).items()} == {
        each.username: each.digest() for each in (wanted[0], wanted[2])
    }


@pytest.mark.parametrize("name", ["root", "sshd", "nobody", "admin1"])
async def test_somebody_elses_account_is_never_touched(net: Net, driver: Ssh, name: str) -> None:
    if name == "admin1":
        await asyncio.to_thread(subprocess.run, ["useradd", "-M", "admin1"], check=True)
    before = text_of("passwd", "shadow", "group")

    refused = await driver.put([alice(name)])
    await driver.remove([name])

    assert list(refused) == [name]
    assert "not SkynetVPN's" in refused[name]
    assert text_of("passwd", "shadow", "group") == before
    assert name not in await driver.credentials()


@pytest.mark.parametrize("name", ["-oX", "a;id", "a/../x", "é", "Alice", "a:b", "a\nb", "", "x" * 40])
async def test_a_name_that_is_none_is_refused_and_the_others_are_taken(net: Net, driver: Ssh, name: str) -> None:
    refused = await driver.put([alice(name), alice("bob")])

    assert list(refused) == [name]
    assert set(await driver.credentials()) == {"alice", "bob"}


def test_the_files_keep_their_owners_and_modes(net: Net) -> None:
    driver = net.driver()
    asyncio.run(driver.put([alice()]))
    passwd, shadow = Path("/etc/passwd").stat(), Path("/etc/shadow").stat()

    assert (passwd.st_mode & 0o777, passwd.st_uid, passwd.st_gid) == (0o644, 0, 0)
    assert (shadow.st_mode & 0o777, shadow.st_uid) == (0o640, 0)
    assert shadow.st_gid == int(net.node.run("getent", "group", "shadow").split(":")[2])
    assert "alice" not in net.node.run("pwck", "-r", check=False).replace("user 'alice': directory '/nonexistent'", "")
    assert not list(Path("/etc").glob(".*skynetvpn"))


async def test_writers_at_the_same_time_lose_nothing(net: Net, driver: Ssh) -> None:
    names = [f"other{number}" for number in range(10)]
    others = asyncio.to_thread(
        lambda: [subprocess.run(["useradd", "-M", name], check=True, capture_output=True) for name in names]
    )

    async def ours() -> None:
        for number in range(30):
            assert await driver.put([alice(f"u{number}")]) == {}

    await asyncio.gather(others, ours())

    passwd = text_of("passwd")
    assert all(f"\n{name}:" in passwd for name in names)
    assert len(await driver.credentials()) == 31


# --- ending ---


async def test_a_removed_login_is_out_before_the_return(net: Net, driver: Ssh) -> None:
    await driver.put([alice("bob")])
    net.ssh(*FORWARD)
    net.ssh("-L", f"127.0.0.1:{LOCAL + 1}:{FAR}:{ECHO_PORT}", user="bob")
    opened, others = await forwarded(net), await forwarded(net, LOCAL + 1)
    await begun(driver, 2)

    assert await driver.remove(["alice", "unknown"]) == {}

    assert not [title for title in net.sshds() if "alice" in title]
    assert [title for title in net.sshds() if "bob" in title]
    with opened:
        assert await asyncio.to_thread(opened.recv, 1) == b""
    assert {session.username: bool(session.ended) for session in await driver.sessions()} == {
        "alice": True,
        "bob": False,
    }
    assert await net.denied()
    with others:
        await asyncio.to_thread(_echoed, others, b"still here")


@pytest.mark.parametrize("attempt", range(3))
async def test_a_removed_login_that_is_logging_in_stays_out(net: Net, driver: Ssh, attempt: int) -> None:
    """Clients that are at every stage of a login when it is removed: none is in afterwards."""
    argv = net.argv("-N")
    clients = [
        net.client.popen("sshpass", "-e", *argv, env={"SSHPASS": PASSWORD}, stderr=subprocess.DEVNULL) for _ in range(8)
    ]
    await eventually(driver.sessions)

    await driver.remove(["alice"])

    assert not [title for title in net.sshds() if "alice" in title]
    for client in clients:
        assert await asyncio.to_thread(client.wait, 30) != 0
    assert [session for session in await driver.sessions() if not session.ended] == []


async def test_a_kick_ends_one_session_at_once(net: Net, driver: Ssh) -> None:
    net.ssh(*FORWARD)
    opened = await forwarded(net)
    (first,) = await begun(driver)
    net.ssh("-L", f"127.0.0.1:{LOCAL + 1}:{FAR}:{ECHO_PORT}")
    others = await forwarded(net, LOCAL + 1)
    await begun(driver, 2)

    started = time.monotonic()
    await driver.kick(first.id)
    with opened:
        assert await asyncio.to_thread(opened.recv, 1) == b""
    assert time.monotonic() - started < 5

    told = {session.id: session for session in await driver.sessions()}
    assert (bool(told[first.id].ended), told[first.id].reason) == (True, "kicked")
    assert len(told) == 2
    assert [session.id for session in await driver.sessions()] == [id_ for id_ in told if id_ != first.id]
    await driver.kick(first.id)
    with others:
        await asyncio.to_thread(_echoed, others, b"still here")


async def test_a_session_that_is_not_admitted_ends_by_itself(net: Net, driver: Ssh) -> None:
    net.refusals["alice"] = "too many sessions"
    client = net.ssh(*FORWARD)

    assert await asyncio.to_thread(client.wait, 20) == 255

    (session,) = await driver.sessions()
    assert (bool(session.ended), session.reason) == (True, "too many sessions")


async def test_an_adoption_that_failed_at_first_tells_each_session_once(
    net: Net, driver: Ssh, monkeypatch: pytest.MonkeyPatch
) -> None:
    net.ssh(*FORWARD)
    (session,) = await begun(driver)
    await driver.close()

    def denied(*_: object) -> bool:
        raise DriverError("denied")

    second = net.driver()
    with monkeypatch.context() as patched:
        patched.setattr(processes, "is_of_another", denied)
        with pytest.raises(DriverError, match="denied"):
            await second.ensure(SPEC)
    await second.ensure(SPEC)

    assert [(told.id, told.ended) for told in await second.sessions()] == [(session.id, 0)]


async def test_what_keeps_sessions_from_being_seen_is_told(
    net: Net, driver: Ssh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves no descriptor open at each look."""
    net.ssh(*FORWARD)
    await begun(driver)
    await driver.close()
    second = net.driver()
    with monkeypatch.context() as patched:
        patched.setattr(processes, "_PIDFD_GETFD", 10_000)  # no kernel knows it
        for _ in range(2):
            with pytest.raises(DriverError, match=r"pidfd_getfd .*Function not implemented"):
                await second.sessions()
        before = descriptors()
        with pytest.raises(DriverError):
            await second.sessions()
        assert descriptors() == before
    await begun(second)


async def test_a_full_disk_hides_no_session(net: Net, driver: Ssh) -> None:
    (net.directory / "ssh/sessions.new").mkdir()  # where it would write
    client = net.ssh(*FORWARD)
    (session,) = await begun(driver)

    await asyncio.to_thread(net.client.end, client)

    await eventually(lambda: has_ended(driver, session.id))


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def has_ended(driver: Ssh, session_id: str) -> bool:
    return any(session.id == session_id and session.ended for session in await driver.sessions())


async def test_an_end_is_noticed_at_once(net: Net, driver: Ssh) -> None:
    client = net.ssh(*FORWARD)
    await begun(driver)
    before = net.notified

    await asyncio.to_thread(net.client.end, client)

    async with asyncio.timeout(5):
        while net.notified == before:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    (session,) = await driver.sessions()
    assert session.ended
    assert session.reason == "disconnected"


# --- counting ---


async def test_bytes_are_counted_for_each_session(net: Net, driver: Ssh) -> None:
    size = 3_000_000
    net.ssh(*FORWARD)
    opened = await forwarded(net)
    (first,) = await begun(driver)
    net.ssh("-L", f"127.0.0.1:{LOCAL + 1}:{FAR}:{ECHO_PORT}")
    others = await forwarded(net, LOCAL + 1)
    second = next(session for session in await begun(driver, 2) if session.id != first.id)

    with opened, others:
        await asyncio.to_thread(_exchange, opened, size)
        await asyncio.to_thread(_exchange, others, 2 * size)

    after = {session.id: session for session in await driver.sessions()}
    for before, moved in ((first, size), (second, 2 * size)):
        now = after[before.id]
        for grown in (now.rx - before.rx, now.tx - before.tx):
            assert moved <= grown <= moved * 1.15, (grown, moved)


async def test_a_client_that_comes_by_ipv6_is_counted(net: Net, driver: Ssh) -> None:
    net.ssh(*FORWARD, host=NODE6)
    with await forwarded(net) as opened:
        await asyncio.to_thread(_exchange, opened, 500_000)

    (session,) = await begun(driver)
    assert session.remote.startswith(f"[{CLIENT6}]:")
    assert 500_000 <= session.rx <= 600_000
    assert 500_000 <= session.tx <= 600_000


async def test_many_clients_at_once_are_all_told(net: Net, driver: Ssh) -> None:
    for _ in range(30):
        net.ssh()

    found = await begun(driver, 30)

    assert len({session.id for session in found}) == len({session.remote for session in found}) == 30
    await driver.remove(["alice"])
    assert all(session.ended for session in await driver.sessions())


async def test_a_flush_of_the_hosts_rules_loses_no_count(net: Net, driver: Ssh) -> None:
    net.ssh(*FORWARD)
    opened = await forwarded(net)
    await begun(driver)
    await asyncio.to_thread(_exchange, opened, 1_000_000)
    (before,) = await driver.sessions()

    net.node.run("nft", "flush", "ruleset")
    await driver.ensure(SPEC)
    with opened:
        await asyncio.to_thread(_exchange, opened, 1_000_000)

    (after,) = await driver.sessions()
    assert before.rx + 1_000_000 <= after.rx <= before.rx * 2.2


def _exchange(opened: socket.socket, size: int) -> None:
    for _ in range(size // 50_000):
        _echoed(opened, b"x" * 50_000)


# --- restarts ---


async def test_another_agent_adopts_sshd_and_its_sessions(net: Net, driver: Ssh) -> None:
    net.ssh(*FORWARD)
    opened = await forwarded(net)
    await asyncio.to_thread(_exchange, opened, 500_000)
    (before,) = await begun(driver)
    before_all = net.sshds()
    await driver.close()

    second = net.driver()
    await second.ensure(SPEC)

    (after,) = await second.sessions()
    assert (after.id, after.username, after.remote, after.since) == (
        before.id,
        before.username,
        before.remote,
        before.since,
    )
    assert before.rx <= after.rx < before.rx + 10_000
    assert net.sshds() == before_all
    with opened:
        await asyncio.to_thread(_exchange, opened, 500_000)
        (last,) = await second.sessions()
        assert after.rx + 500_000 <= last.rx <= after.rx + 600_000
        await second.kick(after.id)
        assert await asyncio.to_thread(opened.recv, 1) == b""


async def test_a_session_that_ends_while_no_agent_runs_is_told_with_its_bytes(net: Net, driver: Ssh) -> None:
    client = net.ssh(*FORWARD)
    opened = await forwarded(net)
    (before,) = await begun(driver)
    await driver.close()
    with opened:
        await asyncio.to_thread(_exchange, opened, 500_000)
    await asyncio.to_thread(net.client.end, client)

    second = net.driver()
    await second.ensure(SPEC)

    (after,) = await second.sessions()
    assert after.id == before.id
    assert after.ended
    assert after.rx >= before.rx + 500_000
    third = net.driver()
    await second.close()
    await third.ensure(SPEC)
    assert [(each.id, each.rx, each.tx) for each in await third.sessions()] == [(after.id, after.rx, after.tx)]


async def test_a_session_that_no_agent_ever_saw_is_told_with_its_bytes(net: Net, driver: Ssh) -> None:
    await driver.sessions()
    await driver.close()
    client = net.ssh(*FORWARD)
    with await forwarded(net) as opened:
        await asyncio.to_thread(_exchange, opened, 500_000)
    await asyncio.to_thread(net.client.end, client)

    second = net.driver()
    await second.ensure(SPEC)

    (missed,) = await second.sessions()
    assert missed.ended
    assert (missed.username, missed.remote.rpartition(":")[0]) == ("alice", CLIENT)
    assert 500_000 <= missed.rx <= 600_000
    assert 500_000 <= missed.tx <= 600_000
    assert await second.sessions() == []


async def test_an_sshd_that_was_killed_is_started_again_and_its_sessions_live(net: Net, driver: Ssh) -> None:
    net.ssh(*FORWARD)
    opened = await forwarded(net)
    (before,) = await begun(driver)
    pid = int((net.directory / "ssh/sshd.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: gone(net, pid))

    await driver.ensure(SPEC)
    net.ssh("-L", f"127.0.0.1:{LOCAL + 1}:{FAR}:{ECHO_PORT}")

    assert before.id in {session.id for session in await begun(driver, 2)}
    with opened:
        await asyncio.to_thread(_echoed, opened, b"still here")
    assert int((net.directory / "ssh/sshd.pid").read_text()) != pid


async def test_the_end_of_sshd_is_told_within_a_second(net: Net, driver: Ssh) -> None:
    before = net.notified
    os.kill(int((net.directory / "ssh/sshd.pid").read_text()), signal.SIGKILL)

    async with asyncio.timeout(5):
        while net.notified == before:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await driver.ensure(SPEC)
    net.ssh(*FORWARD)
    await begun(driver)


async def test_another_port_leaves_live_sessions_alone(net: Net, driver: Ssh) -> None:
    net.ssh(*FORWARD)
    opened = await forwarded(net)
    (before,) = await begun(driver)

    await driver.ensure(msgspec.structs.replace(SPEC, port=PORT + 1, keepalive=30))

    assert (await net.try_ssh("-N", "-o", "ConnectTimeout=2"))[0] == 255  # nobody listens there
    await asyncio.to_thread(_exchange, opened, 500_000)
    (after,) = await driver.sessions()
    assert after.id == before.id
    assert after.rx >= before.rx + 500_000
    net.ssh("-L", f"127.0.0.1:{LOCAL + 1}:{FAR}:{ECHO_PORT}", port=PORT + 1)
    assert before.id in {session.id for session in await begun(driver, 2)}
    opened.close()
    pid = (net.directory / "ssh/sshd.pid").read_text()
    await driver.ensure(msgspec.structs.replace(SPEC, port=PORT + 1, keepalive=30))
    assert (net.directory / "ssh/sshd.pid").read_text() == pid


async def test_an_agent_killed_while_it_changed_the_port_goes_on(net: Net, driver: Ssh) -> None:
    """Between the settings taken over and the note of it."""
    moved = msgspec.structs.replace(SPEC, port=PORT + 1)
    await driver.ensure(moved)
    await driver.close()
    (net.directory / "ssh/sshd_config.running").unlink()

    second = net.driver()
    await second.ensure(moved)

    net.ssh(port=PORT + 1)
    await begun(second)


async def test_a_port_that_is_taken_changes_nothing(net: Net, driver: Ssh) -> None:
    net.ssh(*FORWARD)
    opened = await forwarded(net)
    with net.node.entered():
        taken = socket.create_server((NODE, PORT + 1))

    with taken, pytest.raises(DriverError, match=rf"{PORT + 1}.*in use"):
        await driver.ensure(msgspec.structs.replace(SPEC, port=PORT + 1))

    with opened:
        await asyncio.to_thread(_echoed, opened, b"still here")
    (await forwarded(net)).close()
    await driver.ensure(msgspec.structs.replace(SPEC, port=PORT + 1))


async def test_a_start_that_fails_says_why(net: Net) -> None:
    driver = net.driver()
    with net.node.entered():
        taken = socket.create_server(("", PORT))
    with taken, pytest.raises(DriverError, match="in use"):
        await driver.ensure(SPEC)

    await driver.ensure(SPEC)
    await driver.close()


async def test_nothing_happens_where_nothing_differs(net: Net, driver: Ssh) -> None:
    before_all = net.sshds()
    began = time.monotonic()
    for _ in range(5):
        await driver.ensure(SPEC)

    assert net.sshds() == before_all
    assert time.monotonic() - began < 5


async def test_stop_leaves_nothing_but_the_host_keys(net: Net, driver: Ssh) -> None:
    keys = await driver.host_keys()
    client = net.ssh(*FORWARD)
    await begun(driver)

    await driver.stop()

    assert await asyncio.to_thread(client.wait, 20) == 255
    assert net.sshds() == []
    assert sorted(path.name for path in (net.directory / "ssh").iterdir()) == [
        "ssh_host_ecdsa_key",
        "ssh_host_ed25519_key",
    ]
    assert "skynetvpn" not in net.node.run("nft", "list", "ruleset")
    assert "skynetvpn" not in text_of("group") + text_of("passwd")
    assert await driver.credentials() == {}
    await driver.stop()
    assert await driver.host_keys() == keys


async def test_host_keys_are_what_a_client_sees(net: Net, driver: Ssh) -> None:
    seen = net.client.run("ssh-keyscan", "-p", str(PORT), NODE)

    found = await driver.host_keys()
    assert {" ".join(line.split()[1:3]) for line in seen.splitlines() if not line.startswith("#")} == set(found)
    assert [key.split()[0] for key in found] == ["ssh-ed25519", "ecdsa-sha2-nistp256"]
    for path in (net.directory / "ssh").glob("ssh_host_*"):
        assert path.stat().st_mode & 0o777 == 0o600


async def test_a_login_does_not_get_in_by_the_admins_own_sshd_for_long(net: Net, driver: Ssh) -> None:
    other = net.directory / "admin"
    other.write_text(f"Port 22\nHostKey {net.directory}/ssh/ssh_host_ed25519_key\nPidFile none\nUsePAM no\n")
    net.node.run("/usr/sbin/sshd", "-f", str(other))
    client = net.ssh(port=22)

    async def is_in() -> bool:
        return any(title.endswith("sshd: alice") for title in net.sshds())

    await eventually(is_in)

    await driver.ensure(SPEC)

    assert await asyncio.to_thread(client.wait, 20) == 255
    (session,) = await driver.sessions()
    assert session.reason == "it came in by another sshd of this host"
    assert any(f"-f {other}" in title for title in net.sshds()), net.sshds()


async def test_two_hosts_on_one_machine_do_not_see_each_other(net: Net, driver: Ssh) -> None:
    """The processes of other network namespaces (containers) are nobody's here."""
    net.ssh(*FORWARD)
    await begun(driver)

    async def elsewhere() -> list[LiveSession]:
        other = Ssh(net.directory / "other", boot_id="x", admit=lambda name: None, notify=lambda: None)
        await other.ensure(SPEC)
        try:
            return await other.sessions()
        finally:
            await other.close()

    with Namespace("other") as other_host:
        assert await asyncio.to_thread(other_host.call, elsewhere) == []
