"""Threat 28 on the node: what the agent cannot reach or get, the tunnels do not need."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from agent.enrolment import enrol
from shared.protocol import Applied
from tests.agent.fake_controller import FakeController
from tests.agent.fleet import INTERFACE, peer, snapshot, until
from tests.agent.test_link import running

PEERS = [peer(number) for number in range(20)]


@pytest.mark.parametrize("code", [socket.EAI_AGAIN, socket.EAI_NONAME, socket.EAI_FAIL])
async def test_a_rebooted_host_serves_while_the_controllers_name_cannot_be_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    home, asked, resolve = tmp_path / "agent", [], socket.getaddrinfo

    def dead(host: object, *rest: object, **options: object) -> object:
        if host != "controller.test":
            return resolve(host, *rest, **options)  # type: ignore[arg-type]
        asked.append(host)
        raise socket.gaierror(code, "the resolver is away")

    async with FakeController(tmp_path) as controller:
        await enrol(controller.token(), home)
        async with running(home):
            await until(lambda: controller.hellos)
            await controller.send(snapshot([INTERFACE, *PEERS]))
            await controller.receive(Applied)
        settings = (home / "agent.yaml").read_text()
        (home / "agent.yaml").write_text(settings.replace("127.0.0.1:", "controller.test:"))
        monkeypatch.setattr(socket, "getaddrinfo", dead)
        async with running(home) as rebooted:
            await until(lambda: len(asked) >= 3)
            assert rebooted.present() == {item.public_key for item in PEERS}
            assert not rebooted.agent.counters.connected
            monkeypatch.setattr(
                socket, "getaddrinfo", lambda _host, *rest, **options: resolve("127.0.0.1", *rest, **options)
            )
            await until(lambda: len(controller.hellos) == 2)
            assert controller.hellos[1].revisions == {"node:1": 1}
