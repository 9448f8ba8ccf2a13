"""The composition root of the running agent: builds the parts, and owns their tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import structlog

from agent.allowances import Allowances
from agent.config import Config, split_address
from agent.counters import Counters
from agent.drivers.base import FirewallDriver, LimitsDriver, WireGuardDriver
from agent.drivers.nftables import Nftables
from agent.drivers.wireguard import choose
from agent.host import Host
from agent.identity import Identity
from agent.intake import Guard
from agent.keeper import Keeper
from agent.ledger import Ledger
from agent.leftover import LeftOver
from agent.link import Link, Outbox
from agent.load import PROC, LoadReader
from agent.metrics import MetricsServer, all_lines
from agent.notify import Notifier
from agent.reconciler import Reconciler
from agent.renewal import Renewal
from agent.reporter import Reporter
from agent.reports import Reports
from agent.servercertificate import ServerCertificate
from agent.services import OpenDriver, Services, open_driver, open_limits
from agent.sessionlog import SessionLog
from agent.state import State
from shared.protocol import IDENTITY, OPENVPN_SERVER, Certificate, Delta, FromController, Received, Snapshot, Welcome
from shared.resource import Protocol

log = structlog.get_logger()


class Agent:
    def __init__(
        self,
        config: Config,
        *,
        open_wireguard: Callable[[], Awaitable[WireGuardDriver]] | None = None,
        firewall: FirewallDriver | None = None,
        boot_id: str | None = None,
        open_service: OpenDriver | None = None,
        limits: LimitsDriver | None = None,
    ) -> None:
        self.counters = Counters()
        self.outbox = Outbox()
        self._config = config
        boot_id = boot_id or (PROC / "sys/kernel/random/boot_id").read_text().strip()
        self.identity = Identity(config.directory)
        self.identity.recover()
        key = self.identity.wireguard_key()
        self.counters.certificate_not_after = self.identity.validity().not_after
        self._state = State(config.directory)
        public_key = self.identity.public_key()

        async def chosen() -> WireGuardDriver:
            return await choose(config.backend, known_keys={key.raw: public_key})

        host = Host(open_wireguard or chosen, firewall or Nftables(), key, public_key)
        self.services = Services(
            config.protocols,
            open_service or open_driver(config, boot_id),
            left_over=LeftOver(config.directory, config.protocols),
            recheck_seconds=config.recheck_seconds,
        )
        self._ledger = Ledger(config.directory)
        records = self._ledger.open()
        allowances = Allowances(records.ledger, records.used, records.meters, fresh=records.fresh)
        sessions = SessionLog(records.sessions)
        self.reconciler = Reconciler(
            state=self._state,
            host=host,
            send=self.outbox.send,
            counters=self.counters,
            boot_id=boot_id,
            guard=Guard(config.guard_share, config.guard_minimum),
            recheck_seconds=config.recheck_seconds,
            services=self.services,
            allowances=allowances,
        )
        self.reports = Reports(
            state=self._state,
            outbox=self.outbox,
            sessions=sessions,
            allowances=allowances,
            ledger=self._ledger,
            boot_id=boot_id,
        )
        self.reporter = Reporter(
            reconciler=self.reconciler,
            reports=self.reports,
            allowances=allowances,
            ledger=self._ledger,
            counters=self.counters,
            load=LoadReader(capacity_mbit=config.capacity_mbit, max_peers=config.max_peers, directory=config.directory),
            poll_seconds=config.poll_seconds,
        )
        self.keeper = Keeper(
            services=self.services,
            reconciler=self.reconciler,
            reporter=self.reporter,
            sessions=sessions,
            allowances=allowances,
            ledger=self._ledger,
            limits=limits or open_limits(),
            counters=self.counters,
            fresh=records.fresh,
            poll_seconds=config.poll_seconds,
        )
        self.link = Link(
            address=config.controller,
            identity=self.identity,
            outbox=self.outbox,
            hello=self.reconciler.hello,
            deliver=self._deliver,
            disconnected=self._disconnected,
            counters=self.counters,
        )
        openvpn = self.services.of(Protocol.OPENVPN)
        self.server_certificate = (
            ServerCertificate(openvpn, self.outbox, self.counters, config.directory)
            if hasattr(openvpn.driver, "certificate_request")
            else None
        )
        self.renewal = Renewal(self.identity, self.outbox, self.link.reconnect)
        self.metrics: MetricsServer | None = None
        if config.metrics:
            self.metrics = MetricsServer(*split_address(config.metrics), self._lines(), self.reconciler.alive)

    async def run(self, stop: asyncio.Event, notifier: Notifier) -> None:
        """Serve until `stop` is set; what runs on the host stays."""
        if self.metrics is not None:
            await self.metrics.start()
        try:
            await self.reconciler.start()
            await self.services.prepare()
            notifier.ready()
            async with asyncio.TaskGroup() as tasks:
                owned = [
                    tasks.create_task(work)
                    for work in (
                        self.reconciler.run(),
                        self.link.run(),
                        self.reporter.run(),
                        self.keeper.run(),
                        self.renewal.run(),
                        *([self.server_certificate.run()] if self.server_certificate is not None else []),
                        notifier.feed(self.reconciler.alive),
                        self._tell_status(notifier),
                    )
                ]
                await stop.wait()
                notifier.stopping()
                for task in owned:
                    task.cancel()
        finally:
            if self.metrics is not None:
                await self.metrics.close()
            await self.keeper.close()
            await self.reconciler.close()
            await self._ledger.close()
            log.info("stopped", tunnels="stay up")

    async def _deliver(self, frame: FromController) -> None:
        match frame:
            case Welcome() | Delta() | Snapshot():
                await self.reconciler.inbox.put(frame)
            case Received():
                self.reports.received(frame.sequence)
            case Certificate():
                if frame.purpose == IDENTITY:
                    self.renewal.take(frame)
                elif frame.purpose == OPENVPN_SERVER and self.server_certificate is not None:
                    self.server_certificate.take(frame)

    def _disconnected(self) -> None:
        self.reports.disconnected()
        if self.server_certificate is not None:
            self.server_certificate.ask_again()

    async def _tell_status(self, notifier: Notifier) -> None:
        while True:
            link = "connected" if self.counters.connected else "no link to the controller, serving from disk"
            notifier.status(f"{self.counters.peers} peers, {self.counters.sessions} sessions; {link}")
            await asyncio.sleep(5)

    def _lines(self) -> Callable[[], Iterator[str]]:
        return all_lines(
            self.counters,
            lambda: self.reconciler.interface,
            lambda: self.reporter.latest,
            lambda: self.reconciler.peers,
        )


async def serve(config: Config, stop: asyncio.Event) -> None:
    agent = await asyncio.to_thread(Agent, config)
    await agent.run(stop, Notifier())
