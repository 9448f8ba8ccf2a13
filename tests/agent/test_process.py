"""The agent as a process with its real drivers, in a network namespace: killed, restarted, rebooted, stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shared.desired import Interface, digest
from shared.protocol import Applied
from tests.agent.fake_controller import FakeController
from tests.agent.fleet import delta, peer, snapshot, until
from tests.support.netns import Namespace, unique

pytestmark = pytest.mark.netns

ROOT = Path(__file__).parents[2]
PEERS = [peer(number) for number in range(12)]


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace("agent") as made:
        yield made


class Host:
    """A directory, an interface name, and the agent's processes; everything runs inside the namespace."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "agent"
        self.interface = unique("wga")
        self.spec = Interface(name=self.interface, listen_port=51820, addresses=("10.66.0.1/16",))

    async def enrol(self, controller: FakeController) -> None:
        process = await self._start("enroll", "--token", "-", "--dir", str(self.directory), stdin=True)
        _, errors = await process.communicate(controller.token().encode())
        assert process.returncode == 0, errors.decode()

    @asynccontextmanager
    async def agent(self, **environ: str) -> AsyncIterator[asyncio.subprocess.Process]:
        process = await self._start("run", "--config", str(self.directory / "agent.yaml"), **environ)
        try:
            yield process
        finally:
            if process.returncode is None:
                process.terminate()
            _, errors = await asyncio.wait_for(process.communicate(), 20)
            print(errors.decode())

    async def peers(self) -> set[str]:
        wg = await asyncio.create_subprocess_exec(
            "wg", "show", self.interface, "peers", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        output, _ = await wg.communicate()
        return set(output.decode().split())

    async def shows(self, keys: set[str]) -> None:
        async with asyncio.timeout(20):
            while await self.peers() != keys:  # noqa: ASYNC110  the interface belongs to another process
                await asyncio.sleep(0.05)

    async def delete_interface(self) -> None:
        await (await asyncio.create_subprocess_exec("ip", "link", "del", self.interface)).wait()

    @staticmethod
    async def _start(*arguments: str, stdin: bool = False, **environ: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "agent",
            *arguments,
            cwd=ROOT,
            env={**os.environ, "SKYNETVPN_AGENT_METRICS": "", **environ},
            stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )


async def inside(namespace: Namespace, scenario: Callable[[], Awaitable[None]]) -> None:
    await asyncio.to_thread(namespace.call, scenario)


async def test_killed_agent_leaves_the_tunnels_and_the_next_one_adopts_them(
    namespace: Namespace, tmp_path: Path
) -> None:
    async def scenario() -> None:
        host, wanted = Host(tmp_path), {item.key for item in PEERS}
        async with FakeController(tmp_path) as controller:
            await host.enrol(controller)
            async with host.agent() as process:
                await until(lambda: controller.hellos)
                await controller.send(snapshot([host.spec, *PEERS]))
                first = await controller.receive(Applied)
                assert first == Applied(scope="node:1", revision=1, digest=digest([host.spec, *PEERS]))
                assert await host.peers() == wanted
                process.kill()
            assert await host.peers() == wanted
            async with host.agent():
                await until(lambda: len(controller.hellos) == 2)
                assert controller.hellos[1].revisions == {"node:1": 1}
                assert controller.hellos[1].backend in ("kernel", "userspace")
                assert await controller.receive(Applied) == first
                await controller.send(delta(1, 2, removals=PEERS[:1]))
                await controller.receive(Applied)
                assert await host.peers() == wanted - {PEERS[0].key}
        await host.delete_interface()

    await inside(namespace, scenario)


async def test_rebooted_host_serves_its_peers_without_the_controller(namespace: Namespace, tmp_path: Path) -> None:
    async def scenario() -> None:
        host = Host(tmp_path)
        async with FakeController(tmp_path) as controller:
            await host.enrol(controller)
            async with host.agent():
                await until(lambda: controller.hellos)
                await controller.send(snapshot([host.spec, *PEERS]))
                await controller.receive(Applied)
        await host.delete_interface()
        assert await host.peers() == set()
        async with host.agent():
            await host.shows({item.key for item in PEERS})
        await host.delete_interface()

    await inside(namespace, scenario)


async def test_stopped_agent_tells_the_service_manager_and_tears_nothing_down(
    namespace: Namespace, tmp_path: Path
) -> None:
    async def scenario() -> None:
        host = Host(tmp_path)
        address = f"\0{unique('notify')}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(address)
            manager.setblocking(False)
            told: list[str] = []

            async def hear(message: str) -> None:
                async with asyncio.timeout(20):
                    while not any(message in line for line in told):
                        told.append((await asyncio.get_running_loop().sock_recv(manager, 4096)).decode())

            async with FakeController(tmp_path) as controller:
                await host.enrol(controller)
                notify = {"NOTIFY_SOCKET": "@" + address[1:], "WATCHDOG_USEC": "300000"}
                async with host.agent(**notify) as process:
                    await hear("READY=1")
                    await hear("WATCHDOG=1")
                    await until(lambda: controller.hellos)
                    await controller.send(snapshot([host.spec, *PEERS]))
                    await controller.receive(Applied)
                    await hear("12 peers")
                    process.send_signal(signal.SIGTERM)
                    await hear("STOPPING=1")
                    assert await asyncio.wait_for(process.wait(), 20) == 0
                assert len(await host.peers()) == 12
        await host.delete_interface()

    await inside(namespace, scenario)


async def test_second_agent_on_one_directory_is_refused(namespace: Namespace, tmp_path: Path) -> None:
    async def scenario() -> None:
        host = Host(tmp_path)
        async with FakeController(tmp_path) as controller:
            await host.enrol(controller)
            async with host.agent():
                await until(lambda: controller.hellos)
                async with host.agent() as second:
                    assert second.stderr is not None
                    assert b"in use by a running agent" in await second.stderr.read()
                    assert await second.wait() == 1

    await inside(namespace, scenario)
