"""The agent as a process with real drivers of three protocols: real clients come in, outlive a kill, and go."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shared.access import Credential, SessionEnd
from shared.desired import Interface, digest
from shared.protocol import OPENVPN_SERVER, Applied, Certificate, Delta, Frame, FromAgent, Received, Renew, Report
from shared.protocol import SessionStats as Stats
from shared.resource import Protocol
from shared.services import OpenVpnServer, SshServer
from tests.agent.fake_controller import FakeController
from tests.agent.fleet import delta, login, peer, snapshot, until
from tests.support import openssh, openvpn
from tests.support.netns import unique

pytestmark = pytest.mark.netns

ROOT = Path(__file__).parents[2]


class Controller(FakeController):
    """It signs what the OpenVPN server asks for, and stores reports."""

    def __init__(self, directory: Path, authority: openvpn.Authority) -> None:
        super().__init__(directory)
        self.vpn = authority
        self.sessions: dict[str, Stats] = {}
        self.completes = 0
        self.applied: dict[str, Applied] = {}

    async def listen(self) -> None:
        while True:
            frame: FromAgent = await self.frames.get()
            answer: Frame | None = None
            match frame:
                case Renew(purpose="openvpn"):
                    signed = self.vpn.sign_server(frame.csr)
                    answer = Certificate(certificate=signed, ca=self.vpn.pem.encode(), purpose=OPENVPN_SERVER)
                case Report():
                    self.sessions |= {stats.id: stats for stats in frame.sessions}
                    self.completes += frame.complete
                    answer = Received(sequence=frame.sequence)
                case Applied():
                    self.applied[frame.scope] = frame
            if answer is not None and self.socket is not None and not self.socket.closed:
                await self.send(answer)

    def session(self, username: str) -> Stats | None:
        return next((stats for stats in self.sessions.values() if stats.username == username and not stats.ended), None)

    def done(self, revision: int) -> bool:
        applied = self.applied.get("node:1")
        return applied is not None and applied.revision == revision and not applied.failures


@asynccontextmanager
async def running(directory: Path, log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "agent", "run", "--config", str(directory / "agent.yaml")),
            cwd=ROOT,
            env={**os.environ, "SKYNETVPN_AGENT_METRICS": ""},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), 30)


async def enrol(directory: Path, token: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agent", "enroll", "--token", "-", "--dir", str(directory)),
        *("--protocols", "wireguard,openvpn,ssh"),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
    )
    await process.communicate(token.encode())
    assert process.returncode == 0


async def moved(controller: Controller, username: str, more_than: int) -> Stats:
    def found() -> bool:
        stats = controller.session(username)
        return stats is not None and stats.rx + stats.tx > more_than

    await until(found, 30)
    stats = controller.session(username)
    assert stats is not None
    return stats


async def inside(function: Callable[[], object]) -> None:
    await asyncio.to_thread(function)


def test_real_clients_of_three_protocols_live_through_a_killed_agent_and_end_on_order(tmp_path: Path) -> None:
    with openssh.network(tmp_path) as net:
        try:
            asyncio.run(_scenario(net, tmp_path))
        finally:
            print((tmp_path / "agent.log").read_text())


async def _scenario(net: openssh.Net, tmp_path: Path) -> None:
    authority = openvpn.Authority()
    home, log = tmp_path / "agent", tmp_path / "agent.log"
    wireguard = Interface(name=unique("wga"), listen_port=51820, addresses=("10.66.0.1/16",))
    tunnels = OpenVpnServer(port=1194, ipv4_pool="10.70.0.0/16", ca=authority.pem, tls_crypt=authority.tls_crypt)
    shell = SshServer(port=openssh.PORT, ipv4_pool="10.71.0.0/24")
    material = authority.client("alice")
    people: list[Credential] = [
        login(1, Protocol.OPENVPN, username="alice", secret="", fingerprint=material.fingerprint),
        openssh.alice("bob"),
    ]
    wanted = [wireguard, tunnels, shell, *people, peer(1)]
    async with Controller(tmp_path, authority) as controller:
        await enrol(home, controller.token())
        listening = asyncio.create_task(controller.listen())
        vpn = openvpn.Client(net.client, tmp_path, authority, material=material)
        ssh = openssh.Client(net, "bob", openssh.PASSWORD)
        try:
            async with running(home, log) as process:
                await until(lambda: controller.hellos, 30)
                hello = controller.hellos[0]
                assert hello.protocols == ["wireguard", "openvpn", "ssh"]
                assert hello.ssh_host_keys and hello.ledger
                await controller.send(snapshot(wanted))
                await until(lambda: controller.done(1), 30)
                assert controller.applied["node:1"].digest == digest(wanted)
                await inside(vpn.connect)
                await inside(ssh.connect)
                first = {name: await moved(controller, name, 0) for name in ("alice", "bob")}
                assert first["alice"].account == 1
                process.kill()
                await process.wait()
            assert vpn.passes() and ssh.passes()
            controller.applied.clear()
            async with running(home, log):
                await until(lambda: len(controller.hellos) == 2 and controller.completes == 2, 30)
                assert controller.hellos[1].ledger == hello.ledger
                assert controller.hellos[1].ssh_host_keys == hello.ssh_host_keys
                assert vpn.passes() and ssh.passes()
                for name, before in first.items():
                    after = await moved(controller, name, before.rx + before.tx)
                    assert (after.id, after.since) == (before.id, before.since)
                await until(lambda: controller.done(1), 30)
                await _ends(controller, first["alice"].id, delta(1, 2, [SessionEnd(session=first["alice"].id)]))
                await _ends(controller, first["bob"].id, delta(2, 3, removals=[people[1]]))
                await until(lambda: controller.done(3), 30)
                await until(lambda: not ssh.passes())
                await controller.send(delta(3, 4, removals=[tunnels, shell]))
                await until(lambda: controller.done(4), 30)
                assert not [line for line in net.sshds() if "agent" in line]
        finally:
            vpn.end()
            ssh.end()
            listening.cancel()
            await (await asyncio.create_subprocess_exec("ip", "link", "del", wireguard.name)).wait()


async def _ends(controller: Controller, session: str, change: Delta) -> None:
    started = time.monotonic()
    await controller.send(change)
    await until(lambda: controller.sessions[session].ended, 30)
    print(f"ended after {time.monotonic() - started:.3f} s: {controller.sessions[session].reason}")
    assert time.monotonic() - started < 5
