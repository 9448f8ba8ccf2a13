"""Tunnels by `ssh -w` with real clients: a device of the login's own, and what comes out of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from agent.drivers.base import Allowed, DriverError
from agent.drivers.limits import KernelLimits
from agent.drivers.ssh import Ssh, processes, tuns
from agent.logins import Logins, Name
from agent.serving import Outcome, Serving
from shared.access import Credential
from shared.desired import Kind, Payload
from shared.services import SshServer, SshTunnel
from tests.support.netns import CommandFailed, Namespace
from tests.support.openssh import (
    ECHO_PORT,
    FAR,
    NODE_INSIDE,
    NUMBER,
    SPEC,
    TUN,
    Net,
    alice,
    begun,
    connect,
    echo_server,
    eventually,
    new_key,
)

pytestmark = pytest.mark.netns


def tunnel(number: int = NUMBER) -> SshTunnel:
    found = TUN.tunnel(number)
    assert found is not None
    return found


def devices(namespace: Namespace) -> dict[str, dict[str, Any]]:
    """The tun devices by name; of each what stays the same while it lives."""
    found = json.loads(namespace.run("ip", "-j", "-d", "link", "show", "type", "tun"))
    return {link["ifname"]: {key: link.get(key) for key in ("ifindex", "ifalias", "linkinfo")} for link in found}


class Tunnel:
    """A client's end: the far host's address is reached by it."""

    def __init__(self, net: Net, local: int = 5, *, user: str = "alice", number: int = NUMBER, **login: Any) -> None:
        self.net, self.device, self.wanted = net, f"tun{local}", tunnel(number)
        self.process = net.ssh("-o", "Tunnel=point-to-point", "-w", f"{local}:{self.wanted.number}", user=user, **login)

    async def up(self) -> None:
        """Once the device is there: it comes with ssh, and goes with it."""

        async def there() -> bool:
            assert self.process.poll() is None, "ssh has ended"
            return self.device in devices(self.net.client)

        await eventually(there)
        client, server = str(self.wanted.client), str(self.wanted.server)
        self.net.client.run("ip", "address", "add", client, "peer", server, "dev", self.device)
        self.net.client.run("ip", "link", "set", self.device, "up")
        self.net.client.run("ip", "route", "replace", FAR, "dev", self.device)
        await eventually(self.passes)

    async def passes(self) -> bool:
        return await asyncio.to_thread(self._passes, FAR)

    async def reaches(self, address: str) -> bool:
        return await asyncio.to_thread(self._passes, address)

    def _passes(self, address: str) -> bool:
        with contextlib.suppress(OSError), connect(self.net.client, ECHO_PORT, address, timeout=2) as opened:
            opened.sendall(b"hello")
            return opened.recv(5) == b"hello"
        return False

    async def end(self) -> None:
        await asyncio.to_thread(self.net.client.end, self.process)


class Node:
    """What serves these logins, and what it tells of them."""

    def __init__(self, driver: Ssh, spec: SshServer, *credentials: Credential) -> None:
        self.drift = 0
        self._others: dict[Name, Payload] = {(str(Kind.CREDENTIAL), each.key): each for each in credentials}
        self._name = str(Kind.SSH_SERVER), spec.key
        self._others[self._name] = spec
        self._logins = Logins({"all": SimpleNamespace(others=self._others)}, 0)
        self._serving = Serving(driver, protect=self._protect, settled=self._settled, recheck_seconds=3600)
        self._serving.prune = True

    async def round(self) -> list[str]:
        """Of everything; return of whom it tells that something is wrong."""
        self._serving.become(self._logins)
        return await self._work()

    async def change(self, spec: SshServer) -> list[str]:
        self._others[self._name] = spec
        self._logins.refresh([self._name], 0)
        self._serving.touch(())
        return await self._work()

    async def _work(self) -> list[str]:
        await self._serving.work()
        return [key for _, key in self._serving.failures("all")]

    async def _protect(self) -> None:
        return None

    async def _settled(self, _serving: Serving, outcome: Outcome) -> None:
        self.drift += outcome.missing + outcome.altered


async def opened(net: Net, **options: Any) -> Tunnel:
    made = Tunnel(net, **options)
    await made.up()
    return made


async def refused(process: subprocess.Popen[Any]) -> bool:
    return await asyncio.to_thread(process.wait, 20) == 255


# --- what it gives ---


async def test_a_tunnel_leads_out_and_is_seen_as_the_node(net: Net, tun: Ssh) -> None:
    await opened(net)

    (session,) = await begun(tun)
    assert (session.username, session.address) == ("alice", str(tunnel().client))
    with await asyncio.to_thread(connect, net.client, ECHO_PORT, FAR) as through:
        await asyncio.to_thread(through.sendall, b"x" * 500_000)
        received = 0
        while received < 500_000:
            received += len(await asyncio.to_thread(through.recv, 65536))
        seen = net.far.run("ss", "-Htn", "state", "established")
        assert {line.split()[3].rpartition(":")[0] for line in seen.splitlines()} == {NODE_INSIDE}
    (after,) = await begun(tun)
    for grown in (after.rx - session.rx, after.tx - session.tx):
        assert 500_000 <= grown <= 650_000, grown


async def test_a_key_opens_one_as_well(net: Net, tun: Ssh) -> None:
    path, public = await asyncio.to_thread(new_key, net.directory)
    await tun.put([alice(keys=(public,), password=False, tunnel=NUMBER)])

    await opened(net, key=path)


async def test_without_tcp_forwarding_there_is_nothing_but_the_tunnel(net: Net, tun: Ssh) -> None:
    net.ssh("-L", f"127.0.0.1:9000:{FAR}:{ECHO_PORT}")
    await begun(tun)
    with await asyncio.to_thread(connect, net.client, 9000) as forwarded, contextlib.suppress(ConnectionResetError):
        forwarded.sendall(b"hello")
        assert await asyncio.to_thread(forwarded.recv, 5) == b""


async def test_both_go_together(net: Net, tun: Ssh) -> None:
    await tun.ensure(msgspec.structs.replace(TUN, tcp_forwarding=True))
    net.ssh("-L", f"127.0.0.1:9000:{FAR}:{ECHO_PORT}")
    await begun(tun)
    with await asyncio.to_thread(connect, net.client, 9000) as forwarded:
        forwarded.sendall(b"hello")
        assert await asyncio.to_thread(forwarded.recv, 5) == b"hello"
    await opened(net)

    assert sorted(session.address for session in await begun(tun, 2)) == ["", str(tunnel().client)]


async def test_only_whose_device_is_open_is_searched_for_it(
    net: Net, tun: Ssh, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[int] = []

    def tun_of(pid: int) -> str | None:
        searched.append(pid)
        return found(pid)

    found = processes.tun_of
    monkeypatch.setattr(processes, "tun_of", tun_of)
    await tun.put([alice("bob", tunnel=8)])
    net.ssh(user="bob")
    await begun(tun)
    assert searched == []

    await opened(net)
    assert sorted(session.address for session in await begun(tun, 2)) == ["", str(tunnel().client)]
    assert len(set(searched)) == 1


# --- what it must not give ---


@pytest.mark.parametrize("remote", ["any", "0", str(tunnel(8).number), str(tunnel(9).number)])
async def test_a_login_opens_no_device_but_its_own(net: Net, tun: Ssh, remote: str) -> None:
    await tun.put([alice("bob", tunnel=8)])
    before = devices(net.node)

    process = net.ssh("-o", "Tunnel=point-to-point", "-w", f"5:{remote}")

    assert await refused(process)
    assert devices(net.node) == before


async def test_a_second_session_by_tun_is_refused_and_the_first_lives(net: Net, tun: Ssh) -> None:
    first = await opened(net)

    assert await refused(Tunnel(net, local=6).process)
    assert await first.passes()


async def test_no_tunnel_where_it_is_off(net: Net, driver: Ssh) -> None:
    await driver.put([alice(tunnel=NUMBER)])

    assert await refused(Tunnel(net).process)
    assert devices(net.node) == {}


@pytest.mark.parametrize("source", ["203.0.113.9", "10.66.0.2", str(tunnel(8).client)])
async def test_an_address_that_is_not_the_clients_does_not_leave_the_tunnel(net: Net, tun: Ssh, source: str) -> None:
    """Nor does one of another client, whose device is there."""
    await tun.put([alice("bob", tunnel=8)])
    made = await opened(net)
    net.client.add_address(made.device, f"{source}/32")
    net.far.run("nft", "add table ip seen; add chain ip seen input { type filter hook input priority 0; }")
    net.far.run("nft", f"add rule ip seen input ip saddr {{ {source}, {NODE_INSIDE} }} icmp type echo-request counter")

    for address, packets in ((source, 0), (str(tunnel().client), 1)):
        net.client.run("ping", "-c", "1", "-W", "1", "-I", address, FAR, check=False)
        assert f"packets {packets} " in net.far.run("nft", "list", "table", "ip", "seen")


async def test_ipv6_does_not_leave_the_tunnel(net: Net, tun: Ssh) -> None:
    made = await opened(net)
    net.node.add_address("lo", "2001:db8:f::1/128")
    net.client.add_address(made.device, "2001:db8:f::2/64")

    assert "100% packet loss" in net.client.run("ping", "-6", "-c", "1", "-W", "1", "2001:db8:f::1", check=False)


async def test_clients_do_not_reach_each_other(net: Net, tun: Ssh) -> None:
    await tun.put([alice("bob", tunnel=8)])
    first = await opened(net)
    with Namespace("second") as second:
        net.node.connect(second, "192.0.3.1/24", "192.0.3.2/24")
        other = Net(net.node, second, net.far, net.directory)
        bob = await opened(other, user="bob", number=8, host="192.0.3.1")
        net.client.run("ip", "route", "add", str(tunnel(8).client), "dev", first.device)
        second.run("ip", "route", "add", str(tunnel().client), "dev", bob.device)
        with echo_server(second, "", ECHO_PORT):
            assert not await first.reaches(str(tunnel(8).client))
        assert await first.passes() and await bob.passes()


async def test_the_nodes_loopback_is_out_of_reach(net: Net, tun: Ssh) -> None:
    made = await opened(net)
    net.client.run("sysctl", "-q", "-w", f"net.ipv4.conf.{made.device}.route_localnet=1")
    net.client.run("ip", "route", "add", "table", "7", "127.9.9.9", "dev", made.device)
    for rule in ("add pref 10 lookup local", "add pref 5 to 127.9.9.9 lookup 7", "delete pref 0"):
        net.client.run("ip", "rule", *rule.split())
    with echo_server(net.node, "", ECHO_PORT):
        assert await made.reaches(str(made.wanted.server))
        net.node.run("nft", "add table ip seen; add chain ip seen raw { type filter hook prerouting priority -300; }")
        net.node.run("nft", "add rule ip seen raw ip daddr 127.9.9.9 counter")
        assert not await made.reaches("127.9.9.9")
        assert "packets 0 " not in net.node.run("nft", "list", "table", "ip", "seen"), "the test sent nothing"


# --- the devices ---


async def test_devices_follow_the_logins(net: Net, tun: Ssh) -> None:
    assert await tun.put([alice("bob", tunnel=8), alice("carol")]) == {}
    there = devices(net.node)
    assert set(there) == {tunnel(7).device, tunnel(8).device}
    owners = {link["linkinfo"]["info_data"]["user"] for link in there.values()}
    assert len(owners) == 2 and all(str(owner).isdecimal() or owner in ("alice", "bob") for owner in owners)

    await tun.remove(["alice", "carol"])
    assert set(devices(net.node)) == {tunnel(8).device}
    await tun.put([alice("dave", tunnel=8)])  # bob's number, before bob has gone
    await tun.remove(["bob"])
    await opened(net, user="dave", number=8)
    assert {name: each.tunnel for name, each in (await tun.credentials()).items()} == {"dave": 8}


async def test_a_device_that_somebody_took_away_is_made_again(net: Net, tun: Ssh) -> None:
    net.node.run("ip", "link", "delete", tunnel().device)

    await tun.ensure(TUN)

    await opened(net)


async def test_many_devices_are_made_in_several_rounds(net: Net, tun: Ssh, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a kick waits for a part of them only."""
    monkeypatch.setattr(tuns, "_AT_ONCE", 10)
    await tun.put([alice(f"user{number}", tunnel=number) for number in range(20, 44)])
    await tun.ensure(SPEC)
    assert devices(net.node) == {}

    for there, more in ((10, 1), (20, 1), (25, 0)):
        before = net.notified
        await tun.ensure(TUN)
        assert (len(devices(net.node)), net.notified - before) == (there, more)


async def test_a_device_that_is_not_ours_stays_as_it_is(net: Net, tun: Ssh) -> None:
    for name in ("tun0", tunnel(9).device):
        net.node.run("ip", "tuntap", "add", "dev", name, "mode", "tun", "user", "nobody")
    before = devices(net.node)

    refusals = await tun.put([alice("bob", tunnel=8), alice("carol", tunnel=9)])
    assert list(refusals) == ["carol"] and tunnel(9).device in refusals["carol"]
    with pytest.raises(DriverError, match=f"1 of 3 .*{tunnel(9).device}"):
        await tun.ensure(TUN)
    await opened(net, user="bob", number=8)
    await tun.stop()

    after = devices(net.node)
    assert after == {name: before[name] for name in ("tun0", tunnel(9).device)}


async def test_a_pool_that_is_too_small_is_told(net: Net, driver: Ssh) -> None:
    await driver.ensure(msgspec.structs.replace(TUN, ipv4_pool="10.70.0.0/28"))

    refusals = await driver.put([alice("bob", tunnel=13), alice("carol", tunnel=14)])

    assert list(refusals) == ["carol"] and "10.70.0.0/28" in refusals["carol"]
    assert set(devices(net.node)) == {tunnel(13).device}
    assert set(await driver.credentials()) == {"alice", "bob", "carol"}


@pytest.mark.parametrize("again", [False, True], ids=["next-round", "next-agent"])
async def test_a_login_without_an_address_stays_told(net: Net, driver: Ssh, again: bool) -> None:
    narrow = msgspec.structs.replace(TUN, ipv4_pool="10.70.0.0/28")
    node = Node(driver, narrow, alice("bob", tunnel=13), alice("carol", tunnel=14))
    assert await node.round() == ["ssh/carol"]

    if again:
        node = Node(net.driver(), narrow, alice("bob", tunnel=13), alice("carol", tunnel=14))
    assert await node.round() == ["ssh/carol"]
    assert node.drift == 0


async def test_a_narrower_pool_is_told_at_once_and_is_no_drift(net: Net, driver: Ssh) -> None:
    node = Node(driver, TUN, alice("carol", tunnel=14))
    assert await node.round() == []

    assert await node.change(msgspec.structs.replace(TUN, ipv4_pool="10.70.0.0/28")) == ["ssh/carol"]
    assert await node.change(TUN) == []
    assert node.drift == 0


async def test_a_removed_login_is_out_and_its_device_gone(net: Net, tun: Ssh) -> None:
    made = await opened(net)

    await tun.remove(["alice"])

    assert devices(net.node) == {}
    assert await refused(made.process)
    assert not await made.passes()


async def test_a_kick_ends_the_tunnel_and_leaves_the_device_for_the_next(net: Net, tun: Ssh) -> None:
    made = await opened(net)
    (session,) = await begun(tun)

    await tun.kick(session.id)

    assert await refused(made.process)
    (told,) = await tun.sessions()
    assert (bool(told.ended), told.reason, told.address) == (True, "kicked", str(tunnel().client))
    await opened(net)


async def test_another_agent_touches_no_live_device(net: Net, tun: Ssh) -> None:
    made = await opened(net)
    (session,) = await begun(tun)
    before = devices(net.node)
    await tun.close()

    second = net.driver()
    await second.ensure(TUN)
    assert await second.put([alice(tunnel=NUMBER), alice("bob", tunnel=8)]) == {}

    after = devices(net.node)
    assert {name: after[name]["ifindex"] for name in before} == {name: before[name]["ifindex"] for name in before}
    assert await made.passes()
    (adopted,) = await begun(second)
    assert (adopted.id, adopted.address) == (session.id, session.address)


async def test_turned_off_the_tunnels_end(net: Net, tun: Ssh) -> None:
    made = await opened(net)

    (before,) = await begun(tun)
    await tun.ensure(SPEC)

    assert devices(net.node) == {}
    assert not await made.passes()
    assert [session.id for session in await begun(tun)] == [before.id]


async def test_another_pool_is_taken_over(net: Net, tun: Ssh) -> None:
    made = await opened(net)

    await tun.ensure(msgspec.structs.replace(TUN, ipv4_pool="10.71.0.0/24"))

    assert set(devices(net.node)) == {tunnel().device}
    assert "10.71.0.1 peer 10.71.0.8/32" in net.node.run("ip", "address", "show", tunnel().device)
    assert not await made.passes()


async def test_stop_takes_all_devices_away(net: Net, tun: Ssh) -> None:
    await tun.put([alice(f"user{number}", tunnel=number) for number in range(20, 60)])
    assert len(devices(net.node)) == 41

    await tun.stop()

    assert devices(net.node) == {}


async def test_nothing_happens_where_nothing_differs(net: Net, tun: Ssh) -> None:
    before = devices(net.node)
    await tun.ensure(TUN)
    await tun.put([alice(tunnel=NUMBER)])

    assert devices(net.node) == before


# --- limits ---


async def test_an_allowance_that_is_used_up_stops_the_tunnel(net: Net, tun: Ssh) -> None:
    made = await opened(net)
    (session,) = await begun(tun)
    limits = KernelLimits()
    try:
        await limits.apply([Allowed(account=1, addresses=(session.address,), remaining=1_000_000, grant=1)])
        assert await made.passes()
        await limits.apply([Allowed(account=1, addresses=(session.address,), remaining=0, grant=2)])
        assert not await made.passes()
        await limits.apply([])
        assert await made.passes()
    finally:
        await limits.close()


def test_devices_are_of_one_family_of_names() -> None:
    largest = msgspec.structs.replace(TUN, ipv4_pool="10.0.0.0/8").tunnel(9_999_999)
    assert largest is not None and len(largest.device) <= 15
    assert Path(largest.device).name.startswith("tun190") and tunnel(1).device.startswith("tun190")
    assert TUN.tunnel_of(tunnel().device) == tunnel()
    assert TUN.tunnel_of("tun0") is None and TUN.tunnel_of("eth0") is None


def test_the_far_host_is_not_reached_past_the_tunnel(net: Net) -> None:
    with pytest.raises(CommandFailed):
        net.client.run("ping", "-c", "1", "-W", "1", FAR)
