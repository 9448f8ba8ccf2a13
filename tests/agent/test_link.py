"""The whole agent on a model host, linked to a controller at the wire."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
import structlog.testing

from agent import certificates, config, renewal
from agent.enrolment import enrol
from agent.errors import AgentError
from agent.link import Backoff, Outbox
from agent.notify import Notifier
from agent.service import Agent
from shared.desired import digest
from shared.protocol import Applied, Bye, Certificate, Received, Renew, Report
from tests.agent.fake_controller import Authority, FakeController
from tests.agent.fleet import INTERFACE, Node, delta, peer, snapshot, until, welcome
from tests.agent.model_host import ModelFirewall, ModelWireGuard
from tests.agent.model_service import ModelLimits

PEERS = [peer(number) for number in range(20)]


class Running:
    def __init__(self, agent: Agent, wireguard: ModelWireGuard) -> None:
        self.agent, self.wireguard = agent, wireguard

    def present(self) -> set[bytes]:
        device = self.wireguard.devices.get("wg0")
        return set(device.peers) if device is not None else set()


@contextlib.asynccontextmanager
async def running(directory: Path, wireguard: ModelWireGuard | None = None) -> AsyncIterator[Running]:
    """The agent as the command runs it, but for the drivers and for short waits."""
    host = wireguard or ModelWireGuard()

    async def opened() -> ModelWireGuard:
        return host

    settings = config.load(
        directory / "agent.yaml", {"SKYNETVPN_AGENT_METRICS": "", "SKYNETVPN_AGENT_POLL_SECONDS": "0.05"}
    )
    agent = Agent(settings, open_wireguard=opened, firewall=ModelFirewall(), limits=ModelLimits())
    agent.link._backoff = Backoff(0.01, 0.05)
    agent.renewal._look_seconds = 0.02
    stop = asyncio.Event()
    task = asyncio.create_task(agent.run(stop, Notifier({})))
    try:
        yield Running(agent, host)
    finally:
        stop.set()
        await asyncio.wait_for(task, 20)


async def test_hello_welcome_snapshot_delta_report(tmp_path: Path) -> None:
    async with FakeController(tmp_path) as controller:
        await enrol(controller.token(), tmp_path / "agent")
        async with running(tmp_path / "agent") as node:
            await until(lambda: controller.hellos)
            assert (controller.hellos[0].epoch, controller.hellos[0].revisions) == ("", {})
            await controller.send(snapshot([INTERFACE, *PEERS]))
            applied = await controller.receive(Applied)
            assert applied == Applied(scope="node:1", revision=1, digest=digest([INTERFACE, *PEERS]))
            await controller.send(delta(1, 2, removals=PEERS[:1]))
            await controller.receive(Applied)
            assert node.present() == {item.public_key for item in PEERS[1:]}
            live = node.wireguard.devices["wg0"].peers[PEERS[5].public_key]
            live.rx, live.tx, live.handshake = 100, 200, int(time.time())
            while not (report := await controller.receive(Report)).peers:  # type: ignore[union-attr]
                pass
            assert [(item.public_key, item.rx, item.tx) for item in report.peers] == [(PEERS[5].public_key, 100, 200)]  # type: ignore[union-attr]


async def test_report_without_an_answer_is_sent_again_on_the_next_link(tmp_path: Path) -> None:
    async def with_peers() -> Report:
        while True:
            report = await controller.receive(Report)
            assert isinstance(report, Report)
            if report.peers:
                return report

    async with FakeController(tmp_path) as controller:
        await enrol(controller.token(), tmp_path / "agent")
        async with running(tmp_path / "agent") as node:
            await until(lambda: controller.hellos)
            await controller.send(snapshot([INTERFACE, *PEERS]))
            await controller.receive(Applied)
            node.wireguard.devices["wg0"].peers[PEERS[5].public_key].rx = 7
            first = await with_peers()
            assert controller.socket is not None
            await controller.socket.close()
            second = await with_peers()
            assert second.peers == first.peers
            assert second.sequence > first.sequence
            await controller.send(Received(sequence=second.sequence))
            await until(lambda: second.sequence not in node.agent.reports._pending)


async def test_controller_that_goes_away_and_comes_back_changes_nothing_on_the_host(tmp_path: Path) -> None:
    async with FakeController(tmp_path) as controller:
        await enrol(controller.token(), tmp_path / "agent")
        async with running(tmp_path / "agent") as node:
            await until(lambda: controller.hellos)
            await controller.send(snapshot([INTERFACE, *PEERS]))
            await controller.receive(Applied)
            with structlog.testing.capture_logs() as logs:
                await controller.stop()
                await until(lambda: not node.agent.counters.connected)
                node.wireguard.calls.clear()
                await until(lambda: node.agent.link._backoff._tries >= 10)  # many tries, one line
                assert [line["event"] for line in logs].count("disconnected") <= 2
                await controller.start()
                await until(lambda: len(controller.hellos) == 2)
            assert controller.hellos[1].revisions == {"node:1": 1}
            assert await controller.receive(Applied) is not None
            assert node.wireguard.writes() == []


async def test_unknown_frames_are_skipped_and_garbage_ends_the_link_only(tmp_path: Path) -> None:
    async with FakeController(tmp_path) as controller:
        await enrol(controller.token(), tmp_path / "agent")
        async with running(tmp_path / "agent"):
            await until(lambda: controller.hellos)
            assert controller.socket is not None
            await controller.socket.send_bytes(b"\x81\xa1t\xa7weather")
            await controller.send(snapshot([INTERFACE]))
            await controller.receive(Applied)
            await controller.socket.send_bytes(b"\xff\x00garbage")
            await until(lambda: len(controller.hellos) == 2)


async def test_dismissed_node_stays_away_and_serves(tmp_path: Path) -> None:
    async with FakeController(tmp_path) as controller:
        await enrol(controller.token(), tmp_path / "agent")
        async with running(tmp_path / "agent") as node:
            await until(lambda: controller.hellos)
            await controller.send(snapshot([INTERFACE, *PEERS]))
            await controller.receive(Applied)
            await controller.send(Bye(reason="this node was revoked", retry=False))
            await until(lambda: not node.agent.counters.connected)
            await asyncio.sleep(0.5)  # ten times the longest back-off of this test
            assert len(controller.hellos) == 1
            assert len(node.present()) == 20


async def test_renewed_certificate_is_promoted_once_it_was_accepted(tmp_path: Path) -> None:
    async with FakeController(tmp_path) as controller:
        controller.times = {"start": timedelta(days=-5)}  # past the half of its life
        await enrol(controller.token(), tmp_path / "agent")
        before = (tmp_path / "agent/node.key").read_bytes()
        async with running(tmp_path / "agent"):
            request = await controller.receive(Renew)
            assert isinstance(request, Renew)
            renewed = controller.authority.sign_request(request.csr)
            await controller.send(Certificate(certificate=renewed, ca=controller.authority.pem))
            await until(lambda: len(set(controller.serials)) == 2)
            await until(lambda: (tmp_path / "agent/node.crt").read_bytes() == renewed)
        assert (tmp_path / "agent/node.key").read_bytes() != before
        assert not list((tmp_path / "agent").glob("*.next.*"))


async def test_renewed_certificate_that_is_refused_gives_way_to_the_old_one(tmp_path: Path) -> None:
    async with FakeController(tmp_path) as controller:
        controller.times = {"start": timedelta(days=-5)}
        await enrol(controller.token(), tmp_path / "agent")
        old = (tmp_path / "agent/node.crt").read_bytes()
        async with running(tmp_path / "agent"):
            request = await controller.receive(Renew)
            assert isinstance(request, Renew)
            foreign = Authority().sign_request(request.csr)
            await controller.send(Certificate(certificate=foreign, ca=controller.authority.pem))
            await until(lambda: len(controller.hellos) >= 2)
            assert len(set(controller.serials)) == 1
        assert (tmp_path / "agent/node.crt").read_bytes() == old


async def test_renewal_that_was_not_answered_is_tried_again_on_another_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer to the first question would be a certificate that a second question has ended."""
    monkeypatch.setattr(renewal, "_ANSWER_SECONDS", 0.2)
    async with FakeController(tmp_path) as controller:
        controller.times = {"start": timedelta(days=-5)}
        await enrol(controller.token(), tmp_path / "agent")
        async with running(tmp_path / "agent"):
            await controller.receive(Renew)
            await until(lambda: len(controller.hellos) >= 2)
            assert isinstance(await controller.receive(Renew), Renew)
            assert len(set(controller.serials)) == 1


async def test_expired_certificate_is_named_and_the_host_keeps_serving(tmp_path: Path) -> None:
    async with FakeController(tmp_path) as controller:
        await enrol(controller.token(), tmp_path / "agent")
        key = (tmp_path / "agent/node.key").read_bytes()
        from agent.identity import signing_request

        stale = controller.authority.sign_request(signing_request(key), start=timedelta(days=-30))
        (tmp_path / "agent/node.crt").write_bytes(stale)
        async with Node(tmp_path / "agent") as node:
            await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        with structlog.testing.capture_logs() as logs:
            async with running(tmp_path / "agent") as rebooted:
                await until(lambda: any(line["event"] == "disconnected" for line in logs))
                assert len(rebooted.present()) == 20
    assert any("has expired" in str(line.get("reason")) for line in logs)


@pytest.mark.parametrize(
    ("status", "words"), [(401, "enrol this host again"), (403, "disabled or locked"), (502, "502")]
)
async def test_refusal_of_the_link_says_what_to_do(tmp_path: Path, status: int, words: str) -> None:
    async with FakeController(tmp_path) as controller:
        await enrol(controller.token(), tmp_path / "agent")
        controller.refuses_with = status
        with structlog.testing.capture_logs() as logs:
            async with running(tmp_path / "agent"):
                await until(lambda: any(words in str(line.get("reason")) for line in logs))


async def test_clock_that_is_far_off_is_named(tmp_path: Path) -> None:
    async with FakeController(tmp_path) as controller:
        await enrol(controller.token(), tmp_path / "agent")
        await controller.stop()
        controller.times = {"start": timedelta(days=400)}
        with structlog.testing.capture_logs() as logs:
            async with running(tmp_path / "agent"):
                await controller.start()
                await until(lambda: any("check the clock" in str(line.get("reason")) for line in logs))


async def test_key_that_others_can_read_stops_the_start(tmp_path: Path) -> None:
    async with FakeController(tmp_path) as controller:
        await enrol(controller.token(), tmp_path / "agent")
    (tmp_path / "agent/wireguard.key").chmod(0o644)
    with pytest.raises(AgentError, match="chmod 600"):
        async with running(tmp_path / "agent"):
            pass


def test_back_off_grows_to_its_most_and_starts_over() -> None:
    backoff = Backoff(0.5, 30)
    waits = [backoff.next() for _ in range(200)]
    assert all(0.5 <= wait <= 30 for wait in waits)
    assert max(waits) > 20
    backoff.reset()
    assert backoff.next() <= 1


async def test_controller_that_does_not_read_is_dropped_not_waited_for() -> None:
    outbox = Outbox(3)
    outbox.open()
    for number in range(4):
        outbox.send(Received(sequence=number))
    assert not outbox.connected


@pytest.mark.parametrize("start", [-30, 3])
def test_validity_is_read_without_a_library(start: int) -> None:
    from agent.identity import new_key, signing_request

    pem = Authority().sign_request(signing_request(new_key()), start=timedelta(days=start), days=10)
    times = certificates.validity(pem)
    assert times.not_after - times.not_before == 10 * 86400
    assert abs(times.not_before - time.time() - start * 86400) < 60
    assert times.not_before + 4 * 86400 <= times.renew_at(-1) < times.renew_at(1) <= times.not_before + 6 * 86400


@pytest.mark.parametrize("text", [b"", b"x", b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----"])
def test_text_that_is_no_certificate_is_refused(text: bytes) -> None:
    with pytest.raises(certificates.InvalidCertificate):
        certificates.validity(text)
