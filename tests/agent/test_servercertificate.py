"""Threat 29: the OpenVPN server's certificate is renewed in time, and its end is announced while nobody renews it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from agent import certificates, config
from agent.counters import Counters
from agent.drivers.base import Admit, DriverError, Notify
from agent.enrolment import enrol
from agent.identity import new_key, signing_request
from agent.link import Backoff, Outbox
from agent.notify import Notifier
from agent.servercertificate import ServerCertificate
from agent.service import Agent
from shared.protocol import Certificate, Frame, Renew
from shared.resource import Protocol
from tests.agent.fake_controller import Authority, FakeController
from tests.agent.fleet import OPENVPN, SCOPE, Node, snapshot, until, welcome
from tests.agent.model_host import ModelFirewall, ModelWireGuard
from tests.agent.model_service import ModelHosts, ModelLimits, ModelService

DAY = 86400


class Needy:
    """What an OpenVPN driver has beside the port: it asks until it has a certificate."""

    def __init__(self, driver: ModelService) -> None:
        self.key = new_key()
        self.installed: list[tuple[bytes, bytes]] = []
        self.asked = 0
        driver.certificate_request = self.request  # type: ignore[attr-defined]
        driver.install_certificate = self.install  # type: ignore[attr-defined]
        driver.failing["ensure"] = DriverError("the server waits for its certificate")
        self._driver = driver

    async def request(self) -> bytes | None:
        self.asked += 1
        return None if self.installed else signing_request(self.key)

    async def install(self, certificate: bytes, ca: bytes) -> None:
        self.installed.append((certificate, ca))
        self._driver.failing.clear()


class Rig:
    def __init__(self, node: Node, directory: Path) -> None:
        self.node, self.authority, self.counters = node, Authority(), Counters()
        self.needy = Needy(node.driver(Protocol.OPENVPN))
        self.outbox = Outbox()
        self.now = 0.0
        self.keeper = ServerCertificate(
            node.services.of(Protocol.OPENVPN),
            self.outbox,
            self.counters,
            directory,
            clock=lambda: self.now,
            waiting_seconds=0.01,
        )

    def answer(self, renew: Renew, **times: object) -> Certificate:
        signed = self.authority.sign_request(renew.csr, **times)  # type: ignore[arg-type]
        return Certificate(certificate=signed, ca=self.authority.pem, purpose=renew.purpose)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with Node(tmp_path) as node:
        yield Rig(node, tmp_path)


async def asked(queue: asyncio.Queue[Frame | None]) -> Renew:
    async with asyncio.timeout(20):
        frame = await queue.get()
    assert isinstance(frame, Renew)
    return frame


async def test_certificate_is_asked_for_once_there_is_a_link_and_starts_the_server(rig: Rig) -> None:
    await rig.node.send(welcome(SCOPE), snapshot([OPENVPN]))
    running = asyncio.create_task(rig.keeper.run())
    try:
        await asyncio.sleep(0)
        assert rig.needy.asked == 0  # what nobody would hear is not asked
        renew = await asked(rig.outbox.open())
        assert renew.purpose == "openvpn"
        certificate = rig.answer(renew)
        rig.keeper.take(certificate)
        await until(lambda: rig.needy.installed == [(certificate.certificate, certificate.ca)])
        await until(lambda: rig.node.hosts.hosts[Protocol.OPENVPN].spec == OPENVPN)
        end = certificates.validity(certificate.certificate).not_after
        await until(lambda: rig.counters.server_certificate_not_after == end)
    finally:
        running.cancel()


async def test_end_of_the_certificate_is_announced_at_30_7_and_1_days(rig: Rig) -> None:
    running = asyncio.create_task(rig.keeper.run())
    rig.keeper.take(rig.answer(await asked(rig.outbox.open()), start=timedelta(), days=365))
    await until(lambda: rig.counters.server_certificate_not_after)  # its copy is on the disk, too
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    end = certificates.validity(rig.needy.installed[0][0]).not_after
    with capture_logs() as logs:
        for days in (300.0, 31.0, 29.9, 29.0, 8.0, 6.9, 2.0, 0.9, 0.5, -1.0):
            rig.now = end - days * DAY
            await rig.keeper._watch()
    warned = [entry["days"] for entry in logs if entry["event"] == "server_certificate_ends_soon"]
    assert warned == [30, 7, 1]


async def test_certificate_that_the_driver_refuses_is_asked_for_again(rig: Rig) -> None:
    async def refuse(_certificate: bytes, _ca: bytes) -> None:
        raise DriverError("the certificate is for another key")

    driver = rig.node.driver(Protocol.OPENVPN)
    install, driver.install_certificate = driver.install_certificate, refuse  # type: ignore[attr-defined]
    running = asyncio.create_task(rig.keeper.run())
    queue = rig.outbox.open()
    try:
        rig.keeper.take(rig.answer(await asked(queue)))
        again = await asked(queue)
        driver.install_certificate = install  # type: ignore[attr-defined]
        rig.keeper.take(rig.answer(again))
        await until(lambda: rig.needy.installed)
    finally:
        running.cancel()


async def test_certificate_is_asked_for_again_on_a_new_link(rig: Rig) -> None:
    running = asyncio.create_task(rig.keeper.run())
    try:
        await asked(rig.outbox.open())
        rig.outbox.close()
        rig.keeper.ask_again()
        queue = rig.outbox.open()
        rig.keeper.take(rig.answer(await asked(queue)))
        await until(lambda: rig.needy.installed)
    finally:
        running.cancel()


async def test_request_lives_as_long_as_the_link_that_it_was_sent_on(tmp_path: Path) -> None:
    """It is sent before the Welcome of its own link, which gives up nothing; the end of the link does."""
    hosts, needy = ModelHosts(), list[Needy]()

    def opened(protocol: Protocol, admit: Admit, notify: Notify) -> ModelService:
        driver = hosts.open(protocol, admit, notify)
        if protocol == Protocol.OPENVPN:
            needy.append(Needy(driver))
        return driver

    async def wireguard() -> ModelWireGuard:
        return ModelWireGuard()

    async with FakeController(tmp_path) as controller:
        await enrol(controller.token(), tmp_path / "agent", (Protocol.WIREGUARD, Protocol.OPENVPN))
        agent = Agent(
            config.load(tmp_path / "agent" / "agent.yaml", {"SKYNETVPN_AGENT_METRICS": ""}),
            open_wireguard=wireguard,
            firewall=ModelFirewall(),
            limits=ModelLimits(),
            open_service=opened,
        )
        agent.link._backoff = Backoff(0.01, 0.05)
        assert agent.server_certificate is not None
        agent.server_certificate._waiting_seconds = 0.01
        controller.welcome = None
        stop = asyncio.Event()
        task = asyncio.create_task(agent.run(stop, Notifier({})))
        try:
            await controller.receive(Renew)
            assert controller.socket is not None
            await controller.socket.close()
            renew = await controller.receive(Renew)  # the answer to the first one is not waited for
            assert isinstance(renew, Renew)
            await controller.send(welcome(SCOPE))
            await until(lambda: agent.counters.connected)
            signed = controller.authority.sign_request(renew.csr)
            await controller.send(Certificate(certificate=signed, ca=controller.authority.pem, purpose=renew.purpose))
            await until(lambda: needy[0].installed)
            assert needy[0].asked == 2
        finally:
            stop.set()
            await asyncio.wait_for(task, 20)
