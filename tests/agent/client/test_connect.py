"""connect and disconnect: both halves, or neither; with a real interface in a namespace where one is needed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import unused_port

from agent.client.profile import Profile, Session
from tests.support.netns import Namespace, unique, wait_until

from .conftest import TOKEN, Cli, FakeController, error, server


@pytest.fixture
def place() -> Iterator[Namespace]:
    """A namespace with a way to the server, where nobody answers."""
    with Namespace("cli") as here, Namespace("srv") as there:
        here.connect(there, "192.0.2.2/24", "192.0.2.1/24")
        yield here


@pytest.fixture
def interface() -> str:
    return unique("cli")


async def test_connect_needs_a_session(cli: Cli) -> None:
    assert (await cli("connect")).status == 3


async def test_connect_without_an_online_server_fails(logged_in: Cli, controller: FakeController) -> None:
    controller.servers = [server("s1", status="offline"), server("s2", status="maintenance")]

    outcome = await logged_in("connect")

    assert outcome.status == 1 and "no server is online" in outcome.err
    assert controller.seen("POST /connections") == []


@pytest.mark.parametrize(
    "arguments",
    [["nowhere"], ["--netns", "no-such-ns"], ["--netns", "../x"], ["--interface", "a/b"], ["--interface", "lo"]],
)
async def test_connect_with_what_is_not_there_is_wrong_usage(
    logged_in: Cli, controller: FakeController, arguments: list[str]
) -> None:
    controller.servers = [server("s1")]

    outcome = await logged_in("connect", *arguments)

    assert outcome.status == 2
    assert controller.seen("POST /connections") == []


async def test_the_least_loaded_server_is_asked_and_its_refusal_told(
    logged_in: Cli, controller: FakeController, home: Path
) -> None:
    controller.servers = [server("busy", load=80), server("idle", load=3), server("down", load=0, status="offline")]
    controller.answers["POST /connections"] = lambda: error(403, "the plan allows 2 connections")

    outcome = await logged_in("connect")

    assert outcome.status == 1 and "the plan allows 2 connections" in outcome.err
    (body,) = controller.seen("POST /connections")
    assert body is not None and body["server_id"] == "idle" and body["protocol"] == "wireguard"
    assert Profile.of_user().tunnels() == []


async def test_the_same_key_is_used_again_and_only_its_public_half_leaves(
    logged_in: Cli, controller: FakeController, home: Path
) -> None:
    controller.servers = [server("s1")]
    controller.answers["POST /connections"] = lambda: error(400, "not now")
    await logged_in("connect")
    await logged_in("connect")

    first, second = controller.seen("POST /connections")
    assert first == second
    private = (home / "config" / "skynetvpn" / "keys" / "s1.key").read_text().strip()
    assert private not in json.dumps(controller.requests)


@pytest.mark.parametrize(
    "wrong",
    [
        {"endpoint": "192.0.2.1"},
        {"endpoint": "192.0.2.1:0"},
        {"server_public_key": "AAAA"},
        {"addresses": []},
        {"addresses": ["10.66.0.2/32\nPostUp = x"]},
        {"allowed_ips": ["everything"]},
        {"mtu": 70000},
        {"preshared_key": "x"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
async def test_a_config_that_cannot_be_used_ends_the_connection_again(
    logged_in: Cli, controller: FakeController, wrong: dict[str, object]
) -> None:
    controller.servers = [server("s1")]
    controller.config |= wrong

    outcome = await logged_in("connect")

    assert outcome.status == 1 and "cannot be used" in outcome.err
    assert controller.connections == []
    assert Profile.of_user().tunnels() == []


@pytest.mark.netns
async def test_a_host_is_not_led_through_a_tunnel_to_itself(
    logged_in: Cli, controller: FakeController, place: Namespace
) -> None:
    controller.servers = [server("s1", ip="192.0.2.2")]
    controller.answers["POST /connections"] = lambda: error(400, "not now")

    outcome = await logged_in("connect", "--netns", place.name)

    assert outcome.status == 1 and "192.0.2.2" in outcome.err
    assert "own" in outcome.err and "--no-routes" in outcome.err and "--netns" in outcome.err
    assert controller.seen("POST /connections") == []

    for options in (["--no-routes"], ["--protocol", "ssh"]):  # a proxy changes no route
        assert "not now" in (await logged_in("connect", "--netns", place.name, *options)).err


@pytest.mark.netns
async def test_a_namespace_needs_a_way_to_the_server(logged_in: Cli, controller: FakeController) -> None:
    controller.servers = [server("s1")]

    with Namespace("cli") as alone:
        outcome = await logged_in("connect", "--netns", alone.name)

    assert outcome.status == 1 and "no route to the server at 192.0.2.1" in outcome.err
    assert "a way of its own" in outcome.err and alone.name in outcome.err
    assert controller.seen("POST /connections") == []


@pytest.mark.netns
async def test_without_a_handshake_nothing_is_left(
    logged_in: Cli, controller: FakeController, place: Namespace, interface: str
) -> None:
    controller.servers = [server("s1", name="fra1")]
    routes = place.run("ip", "route")

    outcome = await logged_in(
        "connect", "fra1", "--netns", place.name, "--interface", interface, "--timeout", "1", "--backend", "userspace"
    )

    assert outcome.status == 1
    assert "fra1 did not answer at 192.0.2.1:51820" in outcome.err
    assert interface not in place.run("ip", "-o", "link")
    assert place.run("ip", "route") == routes
    assert not resolver_file(place).exists()
    assert controller.connections == []
    assert Profile.of_user().tunnels() == []


@pytest.mark.netns
async def test_interrupting_connect_leaves_nothing(
    logged_in: Cli, controller: FakeController, place: Namespace, interface: str
) -> None:
    controller.servers = [server("s1", name="fra1")]
    arguments = ("connect", "--netns", place.name, "--interface", interface, "--backend", "userspace")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "agent.client", *arguments, stderr=asyncio.subprocess.PIPE, env=os.environ
    )
    assert process.stderr is not None
    async with asyncio.timeout(30):
        while b"waiting for the handshake" not in await process.stderr.readline():
            assert not process.stderr.at_eof()
        assert interface in place.run("ip", "-o", "link")
        process.send_signal(signal.SIGINT)
        words = await process.stderr.read()

    assert await process.wait() == 130
    assert b"Traceback" not in words
    assert interface not in place.run("ip", "-o", "link")
    assert controller.connections == []
    assert Profile.of_user().tunnels() == []


@pytest.mark.netns
async def test_the_second_of_two_at_a_time_waits_and_leaves_the_first_alone(
    logged_in: Cli, controller: FakeController, place: Namespace
) -> None:
    controller.servers = [server("s1", name="fra1")]
    opened = controller.held["POST /connections"] = asyncio.Event()
    # In another namespace each of them would find the same name free as well.
    async with connecting("--netns", place.name) as first:
        await first.says("opening a connection")
        async with connecting("--netns", place.name) as second:
            await second.says("another skynetvpn connect")
            opened.set()
            await first.says("waiting for the handshake")
            assert await second.process.wait() == 1
            assert "connected to fra1 already by skyvpn" in await second.rest()
        (local,) = Profile.of_user().tunnels()
        assert first.process.returncode is None
        assert local.interface in place.run("ip", "-o", "link")
        assert len(controller.connections) == len(controller.seen("POST /connections")) == 1


@pytest.mark.netns
async def test_the_turn_of_a_killed_connect_is_over(
    logged_in: Cli, controller: FakeController, place: Namespace
) -> None:
    controller.servers = [server("s1", name="fra1")]
    opened = controller.held["POST /connections"] = asyncio.Event()
    async with connecting("--netns", place.name) as first:
        await first.says("opening a connection")
        async with connecting("--netns", place.name) as second:
            await second.says("another skynetvpn connect")
            first.process.kill()
            opened.set()
            await second.says("waiting for the handshake")


@pytest.mark.netns
async def test_an_interface_that_another_program_has_made_meanwhile_stays(
    logged_in: Cli, controller: FakeController, place: Namespace, interface: str
) -> None:
    controller.servers = [server("s1", name="fra1")]
    asked = controller.held["GET /connections/{id}/config"] = asyncio.Event()
    async with connecting("--netns", place.name, "--interface", interface) as client:
        await client.says("bringing up")
        place.run("ip", "link", "add", interface, "type", "veth", "peer", unique("peer"))
        asked.set()
        assert await client.process.wait() == 2
        assert f"an interface {interface} is there already" in await client.rest()

    assert interface in place.run("ip", "-o", "link")
    assert controller.connections == []
    assert Profile.of_user().tunnels() == []


@pytest.mark.netns
async def test_disconnect_takes_the_tunnel_down_also_when_the_controller_is_away(
    logged_in: Cli, controller: FakeController, place: Namespace, interface: str
) -> None:
    await killed_while_connecting(controller, place, interface)
    assert resolver_file(place).read_text() == "nameserver 1.1.1.1\n"
    profile, away = Profile.of_user(), f"http://127.0.0.1:{unused_port()}"
    profile.save_session(Session(away, "alice", TOKEN, ""))

    outcome = await logged_in("disconnect")

    assert outcome.status == 1 and "the tunnel is down here" in outcome.err
    assert interface not in place.run("ip", "-o", "link")
    assert not resolver_file(place).parent.exists()
    assert len(controller.connections) == 1

    profile.save_session(Session(controller.url, "alice", TOKEN, ""))
    outcome = await logged_in("disconnect", interface)

    assert outcome.status == 0, outcome.err
    assert controller.connections == []
    assert profile.tunnels() == []


@pytest.mark.netns
async def test_connect_refuses_a_second_tunnel_and_clears_one_that_a_reboot_ended(
    logged_in: Cli, controller: FakeController, place: Namespace, interface: str
) -> None:
    await killed_while_connecting(controller, place, interface)
    again = ("connect", "fra1", "--netns", place.name, "--interface", unique("cli"))

    outcome = await logged_in(*again)
    assert outcome.status == 1 and f"connected to fra1 already by {interface}" in outcome.err

    place.run("ip", "link", "delete", interface)
    controller.answers["POST /connections"] = lambda: web.json_response({"error": "enough seen"}, status=400)
    outcome = await logged_in(*again)
    assert "enough seen" in outcome.err
    assert controller.seen("DELETE /connections/{id}") == [None]
    assert Profile.of_user().tunnels() == []


async def test_disconnect_of_an_unknown_connection_fails(logged_in: Cli, controller: FakeController) -> None:
    outcome = await logged_in("disconnect", "c404")

    assert outcome.status == 1 and "not found" in outcome.err


async def test_disconnect_without_a_tunnel_is_done_already(logged_in: Cli, controller: FakeController) -> None:
    outcome = await logged_in("disconnect")

    assert outcome.status == 0 and "no tunnel of this machine is up" in outcome.err
    assert controller.requests == []


class Connecting:
    """A `connect` that runs in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, stderr: asyncio.StreamReader) -> None:
        self.process, self._stderr = process, stderr

    async def says(self, words: str) -> None:
        async with asyncio.timeout(30):
            while words not in (line := (await self._stderr.readline()).decode()):
                assert line, f"it ended and did not say {words!r}"

    async def rest(self) -> str:
        return (await self._stderr.read()).decode()


@contextlib.asynccontextmanager
async def connecting(*arguments: str) -> AsyncIterator[Connecting]:
    argv = (sys.executable, "-m", "agent.client", "connect", "--backend", "userspace", *arguments)
    process = await asyncio.create_subprocess_exec(*argv, stderr=asyncio.subprocess.PIPE, env=os.environ)
    assert process.stderr is not None
    try:
        yield Connecting(process, process.stderr)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        await process.communicate()


def resolver_file(place: Namespace) -> Path:
    return Path("/etc/netns", place.name, "resolv.conf")


async def killed_while_connecting(controller: FakeController, place: Namespace, interface: str) -> None:
    """A client that was killed when its tunnel was up: nobody cleaned up after it."""
    controller.servers = [server("s1", name="fra1")]
    arguments = ("connect", "--netns", place.name, "--interface", interface, "--backend", "userspace")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "agent.client", *arguments, stderr=asyncio.subprocess.PIPE, env=os.environ
    )
    assert process.stderr is not None
    async with asyncio.timeout(30):
        while b"waiting for the handshake" not in await process.stderr.readline():
            assert not process.stderr.at_eof()
    process.kill()
    await process.wait()
    await asyncio.to_thread(wait_until, lambda: interface in place.run("ip", "-o", "link"))
    controller.requests.clear()
