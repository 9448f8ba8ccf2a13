"""Counters are read in time, only news is sent, and what has no answer is sent again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from agent import reconciler
from agent.allowances import Allowances
from agent.drivers.base import DriverError
from agent.ledger import Ledger
from agent.link import Outbox
from agent.load import LoadReader
from agent.reporter import Reporter
from agent.reports import Reports
from agent.sessionlog import SessionLog
from shared.protocol import Frame, PeerStats, Report
from tests.agent.fleet import INTERFACE, Node, delta, peer, snapshot, welcome
from tests.agent.model_host import ModelPeer

PEERS = [peer(number) for number in range(5)]


class Rig:
    def __init__(self, node: Node, **pace: float) -> None:
        self.node, self.outbox = node, Outbox()
        self.queue = self.outbox.open()
        self.reports = Reports(
            state=node.state,
            outbox=self.outbox,
            sessions=SessionLog(),
            allowances=Allowances(),
            ledger=Ledger(node.state.path.parent),
            boot_id="boot",
        )
        self.reporter = Reporter(
            reconciler=node.reconciler,
            reports=self.reports,
            allowances=Allowances(),
            ledger=Ledger(node.state.path.parent),
            counters=node.counters,
            load=LoadReader(capacity_mbit=1000, max_peers=100, proc=Path("/nowhere")),
            clock=lambda: node.now,
            **pace,
        )

    def peer(self, number: int) -> ModelPeer:
        return self.node.wireguard.devices["wg0"].peers[PEERS[number].public_key]

    async def poll(self) -> list[PeerStats]:
        """Read once; the peers that were reported."""
        await self.reporter.poll()
        return [peer for report in self.sent() for peer in report.peers]

    def sent(self) -> list[Report]:
        frames: list[Frame | None] = []
        while not self.queue.empty():
            frames.append(self.queue.get_nowait())
        self.last = [frame for frame in frames if isinstance(frame, Report)]
        return self.last


@pytest.fixture
async def reports(tmp_path: Path) -> AsyncIterator[Rig]:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        yield Rig(node)


async def test_what_a_link_did_not_live_to_be_told_is_told_on_the_next(
    reports: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, asked, go = reports.node.state, asyncio.Event(), asyncio.Event()
    number = state.next_sequence

    async def slow() -> int:
        asked.set()
        await go.wait()
        return await number()

    monkeypatch.setattr(state, "next_sequence", slow)
    reports.peer(1).rx = 10
    polling = asyncio.create_task(reports.reporter.poll())
    await asked.wait()
    reports.outbox.close()
    reports.reports.disconnected()
    go.set()
    await polling
    reports.queue = reports.outbox.open()
    assert [item.rx for item in await reports.poll()] == [10]


async def test_only_peers_with_news_are_reported(reports: Rig) -> None:
    assert await reports.poll() == []
    reports.peer(1).rx = 10
    (found,) = await reports.poll()
    assert (found.public_key, found.rx) == (PEERS[1].public_key, 10)
    assert await reports.poll() == []
    reports.peer(1).tx = 5
    assert [item.tx for item in await reports.poll()] == [5]


async def test_report_names_the_boot_and_the_generation_of_the_interface(reports: Rig) -> None:
    reports.peer(1).rx = 10
    await reports.poll()
    assert (reports.last[0].boot_id, reports.last[0].generation) == ("boot", "generation-1")


async def test_unanswered_reports_are_sent_again_and_answered_ones_are_not(reports: Rig) -> None:
    reports.peer(1).rx = 10
    await reports.poll()
    reports.reports.received(reports.last[0].sequence)
    reports.peer(2).rx = 20
    await reports.poll()
    reports.reports.disconnected()
    assert [item.public_key for item in await reports.poll()] == [PEERS[2].public_key]


async def test_interface_made_anew_is_noticed_before_its_counters_are_reported(reports: Rig) -> None:
    reports.peer(1).rx = 1000
    await reports.poll()
    reports.node.wireguard.devices.clear()
    reports.node.wireguard.create(INTERFACE, None)
    await reports.node.wireguard.apply_peers("wg0", PEERS)
    assert await reports.poll() == []
    reports.peer(1).rx = 7
    assert [item.rx for item in await reports.poll()] == [7]
    assert reports.last[0].generation == "generation-2"


async def test_peer_that_was_removed_and_added_again_starts_over(reports: Rig) -> None:
    reports.peer(1).rx = 1000
    await reports.poll()
    await reports.node.send(delta(1, 2, removals=[PEERS[1]]))
    await reports.poll()
    await reports.node.send(delta(2, 3, [PEERS[1]]))
    reports.peer(1).rx = 3
    assert [item.rx for item in await reports.poll()] == [3]


async def test_client_that_comes_back_between_two_readings_does_not_wait_for_a_third(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        reports = Rig(node, poll_seconds=60, fast_seconds=0.01)
        reports.peer(1).rx = 1000
        assert await reports.poll()
        await node.send(delta(1, 2, removals=[PEERS[1]]), delta(2, 3, [PEERS[1]]))
        reports.peer(1).rx = 3
        running = asyncio.create_task(reports.reporter.run())
        try:
            async with asyncio.timeout(30):
                frame = await reports.queue.get()
            assert isinstance(frame, Report) and [item.rx for item in frame.peers] == [3]
        finally:
            running.cancel()


async def test_sessions_are_counted_from_handshakes(reports: Rig) -> None:
    reports.peer(1).handshake = int(reports.node.now)
    await reports.poll()
    assert reports.node.counters.sessions == 1
    reports.node.now += 200
    await reports.poll()
    assert reports.node.counters.sessions == 0


async def test_waiting_for_the_host_does_not_slow_the_readings_down(
    reports: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=1000.0)  # a busy machine has no part in it
    monkeypatch.setattr(reconciler, "time", clock)
    before = reports.reporter._pause()
    async with reports.node.reconciler._turn():
        polling = asyncio.create_task(reports.reporter.poll())
        await asyncio.sleep(0)  # it has begun, and waits for its turn
        clock.now += 60
    await polling
    assert reports.reporter._pause() == before


async def test_host_that_does_not_answer_is_survived(reports: Rig) -> None:
    reports.node.wireguard.failing["stats"] = DriverError("interrupted")
    assert await reports.poll() == []
    reports.node.wireguard.failing.clear()
    reports.peer(1).rx = 1
    assert len(await reports.poll()) == 1


async def test_without_a_link_nothing_is_counted_as_reported(reports: Rig) -> None:
    reports.outbox.close()
    reports.peer(1).rx = 1
    await reports.poll()
    reports.queue = reports.outbox.open()
    assert len(await reports.poll()) == 1
