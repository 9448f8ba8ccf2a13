"""Who speaks on the node channel: a cloned disk, and an agent of the protocol before."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from collections.abc import Awaitable, Callable

import aiohttp
import msgspec
import pytest

from shared import desired
from shared.protocol import CHANNEL_PATH, CONTROLLER_NAME, PROTOCOL_VERSION
from tests.fleet.installation import CONTROLLER, INTERNET, Installation, script
from tests.support.host import Host

pytestmark = [pytest.mark.netns, pytest.mark.timeout(90)]

OLD = PROTOCOL_VERSION - 1


class OldAgent:
    """Speaks frames as maps, with the fields that the protocol's first version had, and one kind that it gave up."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._resources: dict[tuple[str, str], desired.Payload] = {}

    async def send(self, **frame: object) -> None:
        await self._socket.send_bytes(msgspec.msgpack.encode(frame))

    async def receive(self, *kinds: str) -> dict[str, object]:
        async with asyncio.timeout(15):
            while True:
                frame: dict[str, object] = msgspec.msgpack.decode(await self._socket.receive_bytes())
                if frame["t"] in kinds:
                    return frame

    async def apply(self, frame: dict[str, object]) -> None:
        for kind, key, payload in frame.get("resources", frame.get("upserts", ())):  # type: ignore[attr-defined]
            self._resources[kind, key] = desired.decode(kind, key, payload)
        for kind, key in frame.get("removals", ()):  # type: ignore[attr-defined]
            del self._resources[kind, key]
        await self.send(
            t="applied",
            scope=frame["scope"],
            revision=frame["revision"],
            digest=desired.digest(self._resources.values()),
        )

    def peers(self) -> set[str]:
        return {key for kind, key in self._resources if kind == desired.Kind.WIREGUARD_PEER}


def with_old_agent(fleet: Installation, scenario: Callable[[OldAgent], Awaitable[None]]) -> None:
    async def main() -> None:
        context = ssl.create_default_context(cafile=str(fleet.agent_home / "ca.crt"))
        context.load_cert_chain(fleet.agent_home / "node.crt", fleet.agent_home / "node.key")
        url = f"https://{CONTROLLER}:8443{CHANNEL_PATH}"
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(url, ssl=context, server_hostname=CONTROLLER_NAME) as socket,
        ):
            await scenario(OldAgent(socket))

    fleet.node.namespace.call(main)


def test_agent_of_the_protocol_before_is_served(fleet: Installation) -> None:
    fleet.stop_agent()
    boot_id = fleet.node.run("cat", "/proc/sys/kernel/random/boot_id").strip()

    async def scenario(agent: OldAgent) -> None:
        await agent.send(t="hello", version=OLD, agent="0.0.9", boot_id=boot_id)
        assert (await agent.receive("welcome"))["version"] == OLD
        await agent.send(t="gossip", about="what a controller of today does not know")
        await agent.apply(await agent.receive("snapshot"))
        await asyncio.to_thread(fleet.wait_online)
        waiting = asyncio.create_task(asyncio.to_thread(fleet.connect))
        await agent.apply(await agent.receive("delta"))
        mine = await waiting
        assert mine.public_key in agent.peers()
        await agent.send(
            t="report",
            sequence=1,
            boot_id=boot_id,
            generation="g1",
            peers=[[mine.private_key.public().raw, 1000, 2000, 0]],
        )
        assert (await agent.receive("received"))["sequence"] == 1
        shown = (await asyncio.to_thread(fleet.live))[mine.id]
        assert (shown["rx"], shown["tx"]) == (1000, 2000)
        waiting_end = asyncio.create_task(asyncio.to_thread(fleet.delete_connection, mine.id))
        await agent.apply(await agent.receive("delta"))
        assert (await waiting_end).headers["X-Applied"] == "true"
        assert mine.public_key not in agent.peers()

    with_old_agent(fleet, scenario)
    log = fleet.controller_log.read_text()
    assert "violation" not in log and "http.failed" not in log
    assert fleet.metric("skynetvpn_node_drift_total", node="fra1") == 0
    fleet.start_agent()
    fleet.wait_online()


def test_disk_that_two_hosts_run_is_locked_with_an_alarm_and_its_tunnels_stay(fleet: Installation) -> None:
    mine = fleet.connect()
    copied = fleet.directory / "clone"
    shutil.copytree(fleet.agent_home, copied)
    with fleet.tunnel(mine) as tunnel, tunnel.stream(INTERNET) as stream, Host("clone") as clone:
        clone.namespace.connect(fleet.controller.namespace, "192.0.2.3/24", "192.0.2.4/24")
        clone.run("ip", "route", "add", f"{CONTROLLER}/32", "via", "192.0.2.4")
        log = fleet.directory / "clone.log"
        run = ("run", "--config", str(copied / "agent.yaml"))
        clone.start(log, script("skynetvpn-agent"), *run, env={"SKYNETVPN_AGENT_DIRECTORY": str(copied)})
        fleet.wait(lambda: "fleet.node_locked" in fleet.controller_log.read_text(), "there is no alarm")
        fleet.wait(lambda: fleet.metric("skynetvpn_node_up", node="fra1") == 0, "a channel stays open")
        assert fleet.nodes().splitlines()[1].split("\t")[:2] == ["fra1", "locked"]
        assert fleet.metric("skynetvpn_node_locks_total") == 1
        assert mine.public_key in fleet.peers()
        stream.flows()
    assert stream.lost() == set()
