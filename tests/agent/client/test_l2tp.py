"""`connect --protocol l2tp`: the real programs, against the server that a node runs; in the virtual machine."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.client.profile import Profile
from agent.drivers.l2tp import L2tp
from shared.access import Credential
from shared.resource import Protocol
from shared.services import L2tpServer
from tests.support.l2tp import BOOT_ID, PASSWORD, PSK, SLOWDOWN, require_l2tp
from tests.support.netns import Namespace, unique, wait_until

from .conftest import Cli, FakeController, in_arguments, left_by_programs, readable_by_others, report, server

SERVER, INSIDE = "192.0.2.1", "10.71.0.1"
MATERIAL = {"protocol": "l2tp", "host": SERVER, "psk": PSK, "username": "alice", "password": PASSWORD}


@pytest.fixture
def place() -> Iterator[Namespace]:
    """The client's host, whose default route leads by the server; the test itself is on the server."""
    require_l2tp()
    with Namespace("lns") as node, Namespace("lac") as here:
        node.connect(here, f"{SERVER}/24", "192.0.2.2/24")
        here.run("ip", "route", "add", "default", "via", SERVER)
        with node.entered():
            yield here


@pytest.fixture
async def driver(place: Namespace) -> AsyncIterator[L2tp]:
    """Serving, with one login: alice."""
    directory = Path(tempfile.mkdtemp(prefix="l2tp-"))  # a test's own is too long for a socket
    made = L2tp(directory, boot_id=BOOT_ID.read_text().strip(), admit=lambda _: None, notify=lambda: None)
    await made.ensure(L2tpServer(psk=PSK, ipv4_pool="10.71.0.0/24", dns=(INSIDE,)))
    await made.put([Credential(protocol=Protocol.L2TP, username="alice", account=1, secret=PASSWORD)])
    yield made
    await made.stop()
    await made.close()
    shutil.rmtree(directory)


def resolver_file(place: Namespace) -> Path:
    return Path("/etc/netns", place.name, "resolv.conf")


def far_ends() -> set[str]:
    """Addresses and ports of the server's clients."""
    argv = ("ss", "-Hun", "sport", "=", ":1701")
    listed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in listed.splitlines()}


def nothing_is_left(place: Namespace, controller: FakeController, home: Path, routes: str) -> bool:
    assert place.pids() == []
    assert place.run("ip", "route") == routes
    assert place.run("ip", "xfrm", "policy") == ""
    assert not resolver_file(place).exists()
    assert left_by_programs(home) == []
    assert list(Path("/run").glob("skynetvpn-c*")) == []
    assert controller.connections == []
    return Profile.of_user().tunnels() == []


@pytest.mark.kernel
@pytest.mark.netns
async def test_refused_then_connected_and_taken_down_again(
    place: Namespace, driver: L2tp, logged_in: Cli, controller: FakeController, home: Path
) -> None:
    controller.servers = [server("s1", name="fra1")]
    report(controller)
    routes, interface = place.run("ip", "route"), unique("cli")
    options = ("--protocol", "l2tp", "--netns", place.name, "--interface", interface)

    controller.config = MATERIAL | {"password": "a wrong one"}
    outcome = await logged_in("connect", *options)
    assert outcome.status == 1 and "fra1 refuses the login" in outcome.err.splitlines()[-1], outcome.err
    assert nothing_is_left(place, controller, home, routes)

    controller.config = MATERIAL
    outcome = await logged_in("-o", "json", "connect", "fra1", *options)
    assert outcome.status == 0, outcome.err
    assert (outcome.json["interface"], outcome.json["endpoint"]) == (interface, SERVER)
    assert outcome.json["resolver"] == "netns"
    assert await asyncio.to_thread(resolver_file(place).read_text) == f"nameserver {INSIDE}\n"
    assert f"dev {interface}" in place.run("ip", "route", "get", "203.0.113.9")
    assert interface not in place.run("ip", "route", "get", SERVER)
    place.run("ping", "-c", "1", "-W", str(5 * SLOWDOWN), INSIDE)
    assert in_arguments(PASSWORD, PSK) == []
    assert readable_by_others(home / "state") == []
    (row,) = (await logged_in("-o", "json", "status")).json
    assert row["local"]["rx"] >= 84 and row["local"]["tx"] >= 84

    assert (await logged_in("disconnect")).status == 0
    assert nothing_is_left(place, controller, home, routes)


@pytest.mark.kernel
@pytest.mark.netns
async def test_one_that_broke_off_comes_back_at_once(
    place: Namespace, driver: L2tp, logged_in: Cli, controller: FakeController
) -> None:
    """The server has heard no farewell, and keeps the first tunnel for a minute: the second comes from another port."""
    controller.servers = [server("s1", name="fra1")]
    controller.config = MATERIAL
    report(controller)
    options = ("--protocol", "l2tp", "--netns", place.name, "--interface", unique("cli"))
    for _ in range(2):
        assert (outcome := await logged_in("connect", "fra1", *options)).status == 0, outcome.err
        place.run("ping", "-c", "1", "-W", str(5 * SLOWDOWN), INSIDE)
        for pid in place.pids():
            os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(wait_until, lambda: place.pids() == [], 10 * SLOWDOWN)
        place.run("ip", "xfrm", "state", "flush")
        place.run("ip", "xfrm", "policy", "flush")
        assert (await logged_in("disconnect")).status == 0
    assert len([session for session in await driver.sessions() if not session.ended]) == 2
    assert len(far_ends()) == 2


@pytest.mark.netns
@pytest.mark.parametrize(
    "wrong",
    [
        {"host": "not a host"},
        {"psk": 'x"\n'},
        {"username": 'alice" * "x'},
        {"password": "line\nbreak"},
        {"password": "@/etc/shadow"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
async def test_a_config_that_cannot_be_used_starts_nothing(
    logged_in: Cli, controller: FakeController, home: Path, wrong: dict[str, Any]
) -> None:
    controller.servers = [server("s1", name="fra1")]
    controller.config = MATERIAL | wrong

    outcome = await logged_in("connect", "--protocol", "l2tp", "--interface", unique("cli"))

    assert outcome.status == 1
    assert "cannot be used" in outcome.err or "no IPv4 address" in outcome.err
    assert left_by_programs(home) == []
    assert controller.connections == []
    assert Profile.of_user().tunnels() == []
