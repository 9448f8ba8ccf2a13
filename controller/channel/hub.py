"""All live sessions: wakes them after a commit, makes up for lost wake-ups, cuts off who is no longer admitted."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import structlog
from aiohttp import web

from controller.channel.connection import Connection
from controller.channel.intake import Intake, OnReport
from controller.channel.metrics import ChannelMetrics
from controller.channel.pace import Pace
from controller.channel.pushes import Push, Pushes
from controller.channel.session import Session, Wanted
from controller.desired import service as desired
from controller.desired.service import Changes
from controller.fleet.directory import Directory
from controller.fleet.errors import NodeDisabled, NodeLocked
from controller.fleet.identities import Admitted, Identities
from controller.fleet.nodes import NodeStatus
from controller.fleet.progress import Progress
from controller.fleet.protocols import Protocols
from controller.store.database import Committed, Database, StoreUnavailable, Topic
from controller.store.types import now
from shared.protocol import Bye, Received

log = structlog.get_logger()

Waiter = tuple[int, asyncio.Future[None]]


@dataclass(frozen=True, slots=True)
class Intervals:
    """Seconds between two rounds."""

    sweep: float = 5.0
    check: float = 30.0
    flush: float = 0.5  # an operator sees within a second what a node says
    purge: float = 600.0


@dataclass(slots=True)
class _Live:
    connection: Connection
    expires_at: datetime
    applied: dict[str, int] = field(default_factory=dict)


class Hub:
    def __init__(
        self,
        database: Database,
        epoch: str,
        identities: Identities,
        progress: Progress,
        directory: Directory,
        protocols: Protocols,
        on_report: OnReport,
        metrics: ChannelMetrics,
        *,
        intervals: Intervals | None = None,
    ) -> None:
        self._database = database
        self._epoch = epoch
        self._identities = identities
        self._progress = progress
        self._directory = directory
        self._protocols = protocols
        self._on_report = on_report
        self._metrics = metrics
        self._intervals = intervals or Intervals()
        self._pushes = Pushes(database, epoch)
        self.pace = Pace()
        self._live: dict[str, _Live] = {}
        self._listeners: dict[str, dict[str, Connection]] = {}  # scope -> node id -> connection
        self._waiters: dict[tuple[str, str], list[Waiter]] = {}
        self._sweep_now = asyncio.Event()
        self._check_now = asyncio.Event()
        self._closing = False
        database.listen(self._committed)

    @property
    def online(self) -> frozenset[str]:
        return frozenset(self._live)

    def poke(self, scopes: Iterable[str], told: Sequence[Changes] = ()) -> None:
        """The scopes changed, and what is known of how. Only a hint: a lost one is made up for by the sweep."""
        moment = time.monotonic()
        for scope in scopes:
            if (listeners := self._listeners.get(scope)) is None:
                continue
            self._pushes.changed(scope, [change for change in told if change.scope == scope])
            for connection in listeners.values():
                connection.session.poke(scope, moment)
                connection.wake()

    async def wait_applied(self, node_id: str, scope: str, revision: int, timeout: float) -> bool:
        """Wait until the node has applied the revision; False when it has not in time."""
        live = self._live.get(node_id)
        if live is not None and live.applied.get(scope, -1) >= revision:
            return True
        applied: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters = self._waiters.setdefault((node_id, scope), [])
        waiters.append((revision, applied))
        try:
            async with asyncio.timeout(timeout):
                await applied
        except TimeoutError:
            return False
        finally:
            self._forget_waiter(node_id, scope, (revision, applied))
        return True

    def acknowledge(self, node_id: str, sequence: int) -> None:
        """The node's reports up to this one are in the database."""
        if (live := self._live.get(node_id)) is not None:
            live.connection.send(Received(sequence=sequence))

    async def serve(
        self,
        socket: web.WebSocketResponse,
        transport: asyncio.Transport,
        node: Admitted,
        expires_at: datetime,
        address: str,
    ) -> None:
        """Run one node's session until it ends; a second one of the same node replaces the first."""
        session = Session(node.node_id, self._epoch, node.scopes)
        connection = Connection(socket, transport, node, session, self._metrics, self._read_push, self._pushes.known)
        live = _Live(connection, expires_at)
        intake = Intake(
            connection,
            address,
            pace=self.pace,
            identities=self._identities,
            progress=self._progress,
            directory=self._directory,
            protocols=self._protocols,
            on_report=self._on_report,
            metrics=self._metrics,
            still_admitted=lambda: self._still_admitted(live),
            greeted=lambda: self._up(connection),
            applied=lambda scope, revision: self._applied(connection, scope, revision),
        )
        if (former := self._live.get(node.node_id)) is not None:
            former.connection.end(Bye(reason="another session of this node began"))
            self._unlisten(former.connection)
        self._live[node.node_id] = live
        for scope in session.scopes:
            self._listeners.setdefault(scope, {})[node.node_id] = connection
        if self._closing:
            connection.end(Bye(reason="the controller is stopping"))
        try:
            await connection.run(intake.receive)
        finally:
            if self._live.get(node.node_id) is live:
                self._gone(connection)

    async def run(self) -> None:
        """Everything that is not caused by a node or a commit of this process."""
        every = self._intervals
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._rounds(self._sweep, every.sweep, self._sweep_now))
            tasks.create_task(self._rounds(self._check, every.check, self._check_now))
            tasks.create_task(self._rounds(self._seen, every.check))
            tasks.create_task(self._rounds(self._progress.flush, every.flush))
            tasks.create_task(self._rounds(self._purge, every.purge))

    async def close(self) -> None:
        """End all sessions; the nodes go on serving and come back."""
        self._closing = True
        for live in self._live.values():
            live.connection.end(Bye(reason="the controller is stopping"))
        try:
            await self._progress.flush()
        except StoreUnavailable:
            log.warning("channel.acknowledgements_lost")  # the nodes repeat them

    def _committed(self, committed: Committed) -> None:
        if committed.scopes is not None:
            self.poke(committed.scopes, [note for note in committed.notes if isinstance(note, Changes)])
        elif Topic.DESIRED in committed.topics:
            self._sweep_now.set()
        if Topic.NODES in committed.topics:
            self._check_now.set()

    async def _read_push(self, wanted: Wanted) -> Push:
        return await self._pushes.get(wanted, shared=len(self._listeners.get(wanted.scope, ())) > 1)

    def _up(self, connection: Connection) -> None:
        self._directory.set_online(connection.node.node_id, True)
        self._metrics.up.labels(connection.node.name).set(1)
        log.info("channel.node_up", node=connection.node.name)

    def _gone(self, connection: Connection) -> None:
        node = connection.node
        del self._live[node.node_id]
        self._unlisten(connection)
        self._directory.set_online(node.node_id, False)
        self._metrics.up.labels(node.name).set(0)
        for protocol in node.offer.protocols:
            self._metrics.protocol_up.labels(node.name, protocol).set(0)
        if connection.session.greeted:
            log.info("channel.node_down", node=node.name)

    def _unlisten(self, connection: Connection) -> None:
        for scope in connection.session.scopes:
            listeners = self._listeners[scope]
            del listeners[connection.node.node_id]
            if not listeners:
                del self._listeners[scope]
                self._pushes.forget(scope)

    def _applied(self, connection: Connection, scope: str, revision: int) -> None:
        node_id = connection.node.node_id
        live = self._live.get(node_id)
        if live is None or live.connection is not connection:
            return
        live.applied[scope] = revision
        for wanted, applied in self._waiters.get((node_id, scope), ()):
            if wanted <= revision and not applied.done():
                applied.set_result(None)

    def _forget_waiter(self, node_id: str, scope: str, waiter: Waiter) -> None:
        waiters = self._waiters[node_id, scope]
        waiters.remove(waiter)
        if not waiters:
            del self._waiters[node_id, scope]

    async def _rounds(
        self, work: Callable[[], Awaitable[None]], every: float, early: asyncio.Event | None = None
    ) -> None:
        failing = False
        early = early or asyncio.Event()
        while True:
            with contextlib.suppress(TimeoutError):  # the ordinary round
                async with asyncio.timeout(every):
                    await early.wait()
            early.clear()
            try:
                await work()
                failing = False
            except StoreUnavailable:
                if not failing:
                    log.warning("channel.store_unavailable", work=work.__name__)
                failing = True

    async def _sweep(self) -> None:
        """Compare the database's revisions with those that were sent."""
        scopes = list(self._listeners)
        current: dict[str, int] = {}
        async with self._database.connect() as connection:
            for start in range(0, len(scopes), 500):
                current |= await desired.revisions(connection, scopes[start : start + 500])
        moment = time.monotonic()
        for scope, revision in current.items():
            behind = [
                listener
                for listener in self._listeners.get(scope, {}).values()
                if listener.session.compare(scope, revision, moment)
            ]
            if behind:
                self._pushes.changed(scope)
            for listener in behind:
                listener.wake()

    async def _check(self) -> None:
        """Cut off every node whose status or certificate is no longer good, and release confirmed snapshots."""
        live = dict(self._live)
        await self._cut_off(live)
        for node_id, scope, revision in await self._progress.confirmed(live):
            if live[node_id].connection.session.confirm(scope, revision):
                live[node_id].connection.wake()

    async def _still_admitted(self, live: _Live) -> bool:
        """A check may have come between the node's admission and its place among the live ones."""
        await self._cut_off({live.connection.node.node_id: live})
        return not live.connection.ended

    async def _cut_off(self, live: Mapping[str, _Live]) -> None:
        moment = now()
        standing = await self._identities.standing(live)
        for node_id, session in live.items():
            reason = _inadmissible(session, standing.get(node_id), moment)
            if reason is not None:
                log.warning("channel.node_cut_off", node=session.connection.node.name, reason=reason.reason)
                session.connection.end(reason)

    async def _seen(self) -> None:
        if self._live:
            await self._progress.seen(self._live, now())

    async def _purge(self) -> None:
        purged = await self._progress.purge()
        if purged:
            log.info("channel.tombstones_purged", count=purged)


def _inadmissible(live: _Live, standing: tuple[NodeStatus, str | None] | None, moment: datetime) -> Bye | None:
    if standing is None:
        return Bye(reason="the node was removed", retry=False)
    status, serial = standing
    if status == NodeStatus.LOCKED:
        return Bye(reason=str(NodeLocked()), retry=False)
    if status == NodeStatus.DISABLED:
        return Bye(reason=str(NodeDisabled()))
    if serial != live.connection.node.serial:
        return Bye(reason="another certificate of this node is in use")
    if live.expires_at <= moment:
        return Bye(reason="the certificate of this session has expired")
    return None
