"""What an account is given connects: real clients, by the files that it downloads, to what the node gets to run."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from agent.drivers.base import LiveSession, ServiceDriver
from controller.access.ssh import PROXY
from controller.fleet.identities import Admitted
from controller.fleet.offer import Offer
from controller.fleet.tables import NodeRow
from shared.resource import Protocol
from tests.support.openssh import ECHO_PORT, FAR, NODE, Net, connect, network
from tests.support.openvpn import CONNECTED, OpenVpnRig

pytestmark = pytest.mark.netns


async def until(condition: Callable[[], Awaitable[object]], timeout: float = 30) -> None:
    async with asyncio.timeout(timeout):
        while not await condition():  # noqa: ASYNC110
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


async def test_ssh_connects_by_the_fragment_as_it_is(world: Any, tmp_path: Path) -> None:
    fragment, known, node = tmp_path / "skynetvpn-ssh.conf", tmp_path / "known_hosts", world.nodes[-1]
    with network(tmp_path) as net:
        driver = net.driver()
        offer = Offer(tuple(Protocol), tuple(await driver.host_keys()))
        await world.protocols.offer(Admitted(node, "lon1", "1", offer), offer)
        config = await download(world, Protocol.SSH, NODE, fragment)
        assert config.host_keys == offer.ssh_host_keys
        [login] = await world.credentials()
        await driver.ensure(world.protocols.server_of(node, Protocol.SSH))
        assert await driver.put([login]) == {}
        save(known, "".join(f"{line[4:]}\n" for line in config.to_conf().splitlines() if line.startswith("#   ")))
        argv = ("sshpass", "-e", "ssh", "-F", str(fragment), "-o", f"UserKnownHostsFile={known}", config.alias)
        client = net.client.popen(*argv, env={"SSHPASS": config.password}, stdin=subprocess.DEVNULL)

        async def proxied() -> bool:
            return await asyncio.to_thread(echoed, net)

        await until(proxied)
        [session] = await live(driver)
        assert session.username == login.username == config.username

        await driver.remove([login.username])

        assert not await proxied()
        client.wait(20)
        await driver.stop()
        await driver.close()


def echoed(net: Net) -> bool:
    """Whether the echo server behind the node answers through the SOCKS proxy on the client (RFC 1928)."""
    host, _, port = PROXY.partition(":")
    with contextlib.suppress(OSError), connect(net.client, int(port), host) as proxy:
        proxy.sendall(b"\x05\x01\x00")
        if proxy.recv(2) == b"\x05\x00":
            proxy.sendall(b"\x05\x01\x00\x01" + socket.inet_aton(FAR) + ECHO_PORT.to_bytes(2))
            if proxy.recv(10)[:2] == b"\x05\x00":
                proxy.sendall(b"hello")
                return proxy.recv(5) == b"hello"
    return False


def gateway(address: str) -> str:
    """The server's own address in the half of the pool that the client's is in (10.67.0.0/16)."""
    return "10.67.128.1" if int(address.split(".")[2]) >= 128 else "10.67.0.1"
