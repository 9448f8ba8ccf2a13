"""A node with all that follows sessions and counts bytes, on model hosts; it can be killed and started again."""

from __future__ import annotations

import asyncio
from pathlib import Path

from agent.allowances import Allowances
from agent.keeper import Keeper
from agent.ledger import Ledger
from agent.link import Outbox
from agent.load import LoadReader
from agent.reporter import Reporter
from agent.reports import Reports
from agent.sessionlog import SessionLog
from shared.protocol import Frame, Report, SessionStats
from shared.resource import Protocol
from tests.agent.fleet import Node
from tests.agent.model_host import ModelWireGuard
from tests.agent.model_service import ModelHosts, ModelLimits


class Household(Node):
    """`stored` is what a controller would have of the reports that were acknowledged: sessions and usage."""

    def __init__(
        self,
        directory: Path,
        wireguard: ModelWireGuard | None = None,
        hosts: ModelHosts | None = None,
        *,
        connected: bool = True,
        **changes: object,
    ) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        self.ledger = Ledger(directory)
        records = self.ledger.open()
        self.allowances = Allowances(records.ledger, records.used, records.meters, fresh=records.fresh)
        self.log = SessionLog(records.sessions)
        super().__init__(directory, wireguard, hosts=hosts, allowances=self.allowances, **changes)  # type: ignore[arg-type]
        self.outbox = Outbox()
        self.queue = self.outbox.open() if connected else None
        self.limits = ModelLimits()
        self.reports = Reports(
            state=self.state,
            outbox=self.outbox,
            sessions=self.log,
            allowances=self.allowances,
            ledger=self.ledger,
            boot_id="boot",
        )
        self.reporter = Reporter(
            reconciler=self.reconciler,
            reports=self.reports,
            allowances=self.allowances,
            ledger=self.ledger,
            counters=self.counters,
            load=LoadReader(capacity_mbit=1000, max_peers=100, proc=Path("/nowhere")),
            poll_seconds=0.05,
            fast_seconds=0.02,
            clock=lambda: self.now,
        )
        self.keeper = Keeper(
            services=self.services,
            reconciler=self.reconciler,
            reporter=self.reporter,
            sessions=self.log,
            allowances=self.allowances,
            ledger=self.ledger,
            limits=self.limits,
            counters=self.counters,
            fresh=records.fresh,
            poll_seconds=0.05,
            live_seconds=0.02,
            clock=lambda: self.now,
        )
        self.sessions: dict[str, SessionStats] = {}
        self.usage: dict[int, int] = {}
        self.received: list[Report] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._killed = False

    async def __aenter__(self) -> Household:
        await super().__aenter__()
        self._tasks = [asyncio.create_task(self.keeper.run()), asyncio.create_task(self.reporter.run())]
        return self

    async def __aexit__(self, *rest: object) -> None:
        if self._killed:
            return
        await self._end_tasks()
        await super().__aexit__(*rest)
        await self.ledger.close()

    async def kill(self) -> None:
        """End without a last word: what is not on the disk by now is lost."""
        self._killed = True
        assert self._task is not None
        self._tasks.append(self._task)
        await self._end_tasks()
        self.ledger._close()
        await self.state.close()

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def take_reports(self, *, acknowledge: bool = True) -> list[Report]:
        """What has been sent since the last call, as the controller stores it."""
        assert self.queue is not None
        found: list[Frame | None] = []
        while not self.queue.empty():
            found.append(self.queue.get_nowait())
        reports = [frame for frame in found if isinstance(frame, Report)]
        for report in reports:
            self.received.append(report)
            self.sessions |= {stats.id: stats for stats in report.sessions}
            self.usage |= {entry.account: entry.used for entry in report.usage}
            if acknowledge:
                self.reports.received(report.sequence)
        return reports

    def live(self, protocol: Protocol = Protocol.SSH) -> set[str]:
        return set(self.hosts.hosts[protocol].live)
