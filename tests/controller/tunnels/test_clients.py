"""What an account is given connects: real clients, by the files that it downloads, to what the node gets to run."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from agent.drivers.base import LiveSession, ServiceDriver
from controller.fleet.identities import Admitted
from controller.fleet.offer import Offer
from controller.fleet.tables import NodeRow
from shared.resource import Protocol
from tests.support.openvpn import CONNECTED, OpenVpnRig

pytestmark = pytest.mark.netns


async def until(condition: Callable[[], Awaitable[object]], timeout: float = 30) -> None:
    async with asyncio.timeout(timeout):
        while not await condition():  # noqa: ASYNC110 — another process changes it
            await asyncio.sleep(0.02)


async def live(driver: ServiceDriver) -> list[LiveSession]:
    return [session for session in await driver.sessions() if not session.ended]


async def download(world: Any, protocol: Protocol, address: str, path: Path) -> Any:
    """Connect to the node, which has this address, and keep the configuration as a file."""
    async with world.database.transaction() as tx:
        await tx.session.execute(sa.update(NodeRow).where(NodeRow.id == world.nodes[-1]).values(endpoint=address))
    await world.directory.refresh()
    made = await world.tunnels().create(world.alice, "skynet", world.nodes[-1], protocol)
    config = await world.tunnels().client_config(world.alice, made.id)
    save(path, config.to_conf())
    return config


def save(path: Path, text: str) -> None:
    path.touch(0o600)
    path.write_text(text)


@pytest.mark.parametrize("transport", ["udp", "tcp"])
async def test_openvpn_connects_by_the_profile_as_it_is(world: Any, tmp_path: Path, transport: str) -> None:
    if transport == "tcp":
        await world.protocols.configure("openvpn", settings={"transports": ["tcp"]})
    profile, said = tmp_path / "skynetvpn.ovpn", tmp_path / "log"
    config = await download(world, Protocol.OPENVPN, "192.0.2.1", profile)
    [login] = await world.credentials()
    node = Admitted(world.nodes[-1], "lon1", "1", Offer())
    with OpenVpnRig(tmp_path) as rig:
        driver = rig.driver(lambda _: None, lambda: None)
        request = await driver.certificate_request()
        assert request is not None
        issued = world.protocols.certificate(node, request)
        await driver.install_certificate(issued.certificate, issued.ca)
        await driver.ensure(world.protocols.server_of(node.node_id, Protocol.OPENVPN))
        assert await driver.put([login]) == {}
        with said.open("wb") as log:
            argv = ("openvpn", "--config", str(profile))
            client = rig.far.popen(*argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

        async def connected() -> bool:
            return CONNECTED in said.read_text(errors="replace")

        await until(connected)
        [session] = await live(driver)
        assert session.username == login.username == config.username
        reached = await asyncio.to_thread(rig.far.run, "ping", "-c", "1", "-W", "5", str(gateway(session.address)))
        assert " 1 received" in reached

        await driver.remove([login.username])

        assert await live(driver) == []
        rig.far.end(client)
        await driver.stop()
        await driver.close()


def gateway(address: str) -> str:
    """The server's own address in the half of the pool that the client's is in (10.67.0.0/16)."""
    return "10.67.128.1" if int(address.split(".")[2]) >= 128 else "10.67.0.1"
