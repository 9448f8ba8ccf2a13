"""Tunnels of this machine go, whatever the controller still knows of the account."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from agent.client import programs
from agent.client.profile import LocalTunnel, Profile

from .conftest import Cli, FakeController, error, left_by_programs, server


class Proxy:
    """What `connect --protocol ssh` leaves running: a program of that name, its files, and the note of the tunnel."""

    def __init__(self, local: LocalTunnel, process: asyncio.subprocess.Process) -> None:
        self.local, self.process = local, process

    @classmethod
    async def start(cls, id: str) -> Proxy:
        profile = Profile.of_user()
        local = LocalTunnel(
            id, "s1", "fra1", "127.0.0.1:1080", "ssh", str(profile.program_file(id)),
            endpoint="127.0.0.1:2222", protocol="ssh",
        )  # fmt: skip
        profile.save_tunnel(local)
        programs.write(local, b"a host's key", ".known")
        # The client knows its programs by their name and by the files in their arguments.
        argv = ("ssh", "-S", "-c", "import signal; signal.pause()", local.key_file)
        process = await asyncio.create_subprocess_exec(*argv, executable=sys.executable)
        programs.write(local, str(process.pid).encode(), ".pid")
        return cls(local, process)

    async def gone(self) -> bool:
        async with asyncio.timeout(20):
            await self.process.wait()
        return left_by_programs_of(self.local) == [] and Profile.of_user().tunnels() == []


def left_by_programs_of(local: LocalTunnel) -> list[Path]:
    path = programs.file_of(local)
    return list(path.parent.glob(f"{path.name}*"))


@pytest.fixture
async def proxy(home: Path) -> AsyncIterator[Proxy]:
    proxy = await Proxy.start("c1")
    yield proxy
    if proxy.process.returncode is None:
        proxy.process.kill()
        await proxy.process.wait()


@pytest.mark.parametrize("command", ["logout", "disconnect"])
async def test_nothing_is_left_when_the_account_is_gone(
    logged_in: Cli, controller: FakeController, proxy: Proxy, home: Path, command: str
) -> None:
    for operation in ("DELETE /connections/{id}", "POST /auth/logout"):
        controller.answers[operation] = lambda: error(401, "the token is not valid")

    outcome = await logged_in(command)

    assert await proxy.gone()
    assert left_by_programs(home) == []
    if command == "disconnect":
        assert outcome.status == 3
        assert "nothing is left of it" in outcome.err and "disconnect c1" in outcome.err
    else:
        assert outcome.status == 0
        assert (await logged_in("servers")).status == 3


async def test_disconnect_needs_no_session_to_take_down_what_is_here(
    logged_in: Cli, controller: FakeController, proxy: Proxy
) -> None:
    Profile.of_user().forget_session()

    outcome = await logged_in("disconnect")

    assert outcome.status == 3 and "run skynetvpn login" in outcome.err
    assert await proxy.gone()
    assert controller.requests == []


async def test_logout_ends_the_connections_of_this_machine(
    logged_in: Cli, controller: FakeController, proxy: Proxy
) -> None:
    controller.servers = [server("s1", name="fra1")]
    controller.connections = [{"connection_id": "c1"}, {"connection_id": "another device's"}]

    outcome = await logged_in("-o", "json", "logout")

    assert outcome.json == {"url": controller.url, "disconnected": ["c1"]}
    assert await proxy.gone()
    assert controller.connections == [{"connection_id": "another device's"}]
    assert [name for name, _ in controller.requests] == ["DELETE /connections/{id}", "POST /auth/logout"]


async def test_interrupted_while_it_asks_for_a_refusals_reason_it_leaves_nothing(
    logged_in: Cli, controller: FakeController
) -> None:
    controller.servers = [server("s1", name="fra1")]
    controller.config = {"host": "no host", "port": 0}  # of no use
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agent.client", "connect", "--protocol", "ssh"), stderr=asyncio.subprocess.PIPE
    )

    def interrupt() -> web.StreamResponse:
        process.send_signal(signal.SIGINT)
        return web.json_response(controller.connections)

    controller.answers["GET /connections"] = interrupt
    _, words = await process.communicate()

    assert process.returncode == 130 and b"Traceback" not in words
    assert controller.seen("GET /connections")
    assert controller.connections == []
    assert Profile.of_user().tunnels() == []


async def test_what_the_controller_could_not_be_told_is_told_again(
    logged_in: Cli, controller: FakeController, proxy: Proxy
) -> None:
    controller.connections = [{"connection_id": "c1"}]
    controller.answers["DELETE /connections/{id}"] = lambda: web.Response(status=502, text="bad gateway")

    outcome = await logged_in("disconnect")

    assert outcome.status == 1 and "still counts" in outcome.err
    assert left_by_programs_of(proxy.local) == []
    del controller.answers["DELETE /connections/{id}"]
    assert (await logged_in("disconnect")).status == 0
    assert await proxy.gone()
    assert controller.connections == []
