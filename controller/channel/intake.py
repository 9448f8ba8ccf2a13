"""What each frame of a node does."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import assert_never

import structlog

from controller.channel.connection import Connection
from controller.channel.metrics import ChannelMetrics
from controller.channel.pace import Act, Pace
from controller.channel.session import ProtocolViolation
from controller.fleet.directory import Directory
from controller.fleet.identities import Identities
from controller.fleet.offer import Offer
from controller.fleet.progress import Progress
from controller.fleet.protocols import Protocols
from shared.protocol import (
    IDENTITY,
    OPENVPN_SERVER,
    Applied,
    Bye,
    Drift,
    FromAgent,
    Hello,
    Refused,
    Renew,
    Report,
    Resync,
)
from shared.resource import Protocol

OnReport = Callable[[str, Report], None]  # takes the node's id; Hub.acknowledge is called when it is stored

log = structlog.get_logger()


class Intake:
    """One session's. The node is the certificate's: no frame can speak of another one."""

    def __init__(
        self,
        connection: Connection,
        address: str,
        *,
        pace: Pace,
        identities: Identities,
        progress: Progress,
        directory: Directory,
        protocols: Protocols,
        on_report: OnReport,
        metrics: ChannelMetrics,
        still_admitted: Callable[[], Awaitable[bool]],
        greeted: Callable[[], None],
        applied: Callable[[str, int], None],
    ) -> None:
        self._connection = connection
        self._node = connection.node
        self._session = connection.session
        self._address = address
        self._pace = pace
        self._identities = identities
        self._progress = progress
        self._directory = directory
        self._protocols = protocols
        self._on_report = on_report
        self._metrics = metrics
        self._still_admitted = still_admitted
        self._greeted = greeted
        self._release = applied
        self._problems: dict[str, str | None] = {}  # by scope, as the log has it

    async def receive(self, frame: FromAgent) -> None:
        """Raises ProtocolViolation and DomainError; both end the session."""
        match frame:
            case Hello():
                await self._hello(frame)
            case Applied():
                self._applied(frame)
            case Refused():
                await self._refused(frame)
            case Resync():
                self._session.resync(frame, time.monotonic())
                log.info("channel.resync", node=self._node.name, scope=frame.scope, reason=frame.reason)
                self._connection.wake()
            case Drift():
                self._drift(frame)
            case Report():
                self._report(frame)
            case Renew():
                await self._renew(frame)
            case _:
                assert_never(frame)

    async def _hello(self, frame: Hello) -> None:
        self._session.check(frame)
        if not await self._still_admitted():
            return
        await self._identities.hello(self._node, frame, self._address)
        offer = Offer.of(frame)
        if excess := set(offer.protocols) - set(self._node.allowed):
            # It would be sent the logins of all accounts for them: that is not for the host to decide.
            log.warning("channel.protocols_not_allowed", node=self._node.name, protocols=sorted(excess))
            offer = replace(offer, protocols=tuple(name for name in offer.protocols if name in self._node.allowed))
        if offer != self._node.offer:
            await self._protocols.offer(self._node, offer)
        if offer.protocols != self._node.offer.protocols:
            self._connection.end(Bye(reason="the next session has the scopes of what this node offers now"))
            return
        standing = await self._progress.standing(self._node.node_id)
        confirmed = [scope for scope, known in standing.items() if known.confirmed]
        self._connection.send(self._session.hello(frame, confirmed))  # the welcome goes before any push
        self._greeted()

    def _applied(self, frame: Applied) -> None:
        acknowledged = self._session.applied(frame, time.monotonic())
        if acknowledged is None:
            return
        for seconds in acknowledged.seconds:
            self._metrics.push.observe(seconds)
        if acknowledged.mismatch:
            self._metrics.drift.labels(self._node.name).inc()
            log.warning("channel.digest_mismatch", node=self._node.name, scope=frame.scope, revision=frame.revision)
            self._connection.wake()
        self._note_problem(frame.scope, acknowledged.problem)
        self._progress.applied(
            self._node.node_id,
            frame.scope,
            frame.revision,
            frame.digest,
            acknowledged.problem,
            acknowledged.servers,
        )
        self._release(frame.scope, frame.revision)
        if frame.scope == self._node.scopes[0]:
            for protocol in self._node.offer.protocols:
                self._metrics.protocol_up.labels(self._node.name, protocol).set(protocol not in acknowledged.servers)

    def _note_problem(self, scope: str, problem: str | None) -> None:
        if self._problems.get(scope) == problem:
            return
        self._problems[scope] = problem
        if not self._pace.allows(self._node.node_id, Act.COMPLAINT):
            return
        if problem is not None:
            log.warning("channel.not_applied", node=self._node.name, scope=scope, problem=problem)
        else:
            log.info("channel.applied_again", node=self._node.name, scope=scope)

    async def _refused(self, frame: Refused) -> None:
        self._pace.check(self._node.node_id, Act.REFUSAL)
        self._metrics.refused.labels(self._node.name).inc()
        log.error(
            "channel.snapshot_refused",
            node=self._node.name,
            scope=frame.scope,
            revision=frame.revision,
            removes=frame.removes,
            present=frame.present,
            reason=frame.reason,
        )
        if self._session.owns(frame.scope):  # else it keeps a scope that it no longer has: an operator's matter
            self._session.refused(frame, time.monotonic())
            await self._progress.refused(self._node.node_id, frame.scope, frame.revision, frame.reason)

    async def _renew(self, frame: Renew) -> None:
        self._pace.check(self._node.node_id, Act.RENEWAL)
        if frame.purpose == IDENTITY:
            self._connection.send(await self._identities.renew(self._node, frame.csr))
        elif frame.purpose == OPENVPN_SERVER:
            if Protocol.OPENVPN not in self._node.offer.protocols:
                raise ProtocolViolation("this node does not offer openvpn")
            self._connection.send(self._protocols.certificate(self._node, frame.csr))
        else:  # of a newer agent
            log.info("channel.certificate_unknown", node=self._node.name, purpose=frame.purpose)

    def _drift(self, frame: Drift) -> None:
        self._metrics.drift.labels(self._node.name).inc()
        if not self._pace.allows(self._node.node_id, Act.COMPLAINT):
            return
        log.warning(
            "channel.drift",
            node=self._node.name,
            scope=frame.scope,
            missing=frame.missing,
            unexpected=frame.unexpected,
            changed=frame.changed,
        )

    def _report(self, frame: Report) -> None:
        if "\0" in frame.boot_id + frame.generation:  # PostgreSQL keeps no such text
            raise ProtocolViolation("the report names its boot or its interface with a NUL")
        if frame.load is not None:
            self._directory.set_load(self._node.node_id, frame.load)
        self._on_report(self._node.node_id, frame)
