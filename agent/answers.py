"""What the node says about its desired state: acknowledgements, refusals, and requests for a snapshot, paced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from agent.counters import Counters
from agent.desired import IMPORTED
from shared.protocol import Applied, Frame, Refused, Resync

log = structlog.get_logger()


class Answers:
    def __init__(self, send: Callable[[Frame], None], counters: Counters) -> None:
        self._send, self._counters = send, counters
        self._told: dict[str, Applied] = {}
        self._resyncs: dict[str, tuple[int, asyncio.TimerHandle | None]] = {}

    def emit(self, answer: Applied) -> None:
        if answer.scope == IMPORTED:
            return
        self._told[answer.scope] = answer
        self._counters.applied_revision[answer.scope] = answer.revision
        self._send(answer)

    def emit_news(self, answer: Applied) -> None:
        if self._told.get(answer.scope) != answer:
            self.emit(answer)

    def refuse(self, name: str, revision: int, reason: str, removes: int = 0, present: int = 0) -> None:
        self._counters.refused_snapshots += 1
        log.error("snapshot_refused", scope=name, revision=revision, reason=reason, removes=removes, present=present)
        self._send(Refused(scope=name, revision=revision, reason=reason, removes=removes, present=present))

    def resync(self, name: str, reason: str) -> None:
        """Ask for a snapshot: the first time at once, then less and less often until one could be stored."""
        loop, ask = asyncio.get_running_loop(), Resync(scope=name, reason=reason)
        tries, timer = self._resyncs.get(name, (0, None))
        if tries == 0:
            log.warning("resync_asked", scope=name, reason=reason)
            self._send(ask)
        elif timer is not None and not timer.cancelled() and timer.when() > loop.time():
            return
        else:
            timer = loop.call_later(min(2.0 ** (tries - 1), 30.0), self._send, ask)
        self._resyncs[name] = (tries + 1, timer)

    def synchronised(self, name: str) -> None:
        _, timer = self._resyncs.pop(name, (0, None))
        if timer is not None:
            timer.cancel()

    def forget_resyncs(self) -> None:
        """A new session tells from the start what is missing."""
        for name in list(self._resyncs):
            self.synchronised(name)
