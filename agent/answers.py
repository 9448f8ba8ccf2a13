"""What the node says about its desired state: acknowledgements, refusals, and requests for a snapshot, paced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import structlog

from agent.counters import Counters
from agent.desired import IMPORTED
from shared.protocol import Applied, Frame, Refused, Resync

PATIENCE = 1.0  # seconds that the answer to a change of peers waits for the servers' work of the same scope

log = structlog.get_logger()


class Answers:
    """`applied` says what the host has of a scope, `busy` whether a server has work of it left."""

    def __init__(
        self,
        send: Callable[[Frame], None],
        counters: Counters,
        *,
        applied: Callable[[str], Applied],
        busy: Callable[[str], bool],
    ) -> None:
        self._send, self._counters = send, counters
        self._applied, self._busy = applied, busy
        self._told: dict[str, Applied] = {}
        self._late: asyncio.Queue[str] = asyncio.Queue()  # scopes whose answer must wait no longer
        self._held: dict[str, asyncio.TimerHandle] = {}
        self._resyncs: dict[str, tuple[int, asyncio.TimerHandle | None]] = {}

    def answer(self, name: str, patience: float = PATIENCE) -> None:
        """Acknowledge what the host has of the scope, once the servers are through with their part of it.

        Should that take long, the answer names them as failing: others of the same scope do not wait for ever.
        """
        held = self._held.get(name)
        if not self._busy(name):
            self._let_go(name)
            self._emit(self._applied(name))
        elif held is None or held.when() > asyncio.get_running_loop().time() + patience:
            self._let_go(name)
            self._held[name] = asyncio.get_running_loop().call_later(patience, self._late.put_nowait, name)

    async def late(self) -> str:
        """The next scope whose answer has been waited for long enough."""
        return await self._late.get()

    def answer_late(self, name: str) -> None:
        """Tell what there is by now, unless that has been done meanwhile."""
        if self._held.pop(name, None) is not None:
            self._emit(self._applied(name))

    def tell_news(self, names: Iterable[str]) -> None:
        """Answer for those of the scopes that have something else now than was told last."""
        for name in names:
            if not self._busy(name) and (answer := self._applied(name)) != self._told.get(name):
                self._emit(answer)

    def close(self) -> None:
        for name in list(self._held):
            self._let_go(name)
        self.forget_resyncs()

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

    def _emit(self, answer: Applied) -> None:
        if answer.scope == IMPORTED:
            return
        self._told[answer.scope] = answer
        self._counters.applied_revision[answer.scope] = answer.revision
        self._send(answer)

    def _let_go(self, name: str) -> None:
        if (timer := self._held.pop(name, None)) is not None:
            timer.cancel()
