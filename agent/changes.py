"""Does changes of the desired state on the host and with its servers, and answers for every scope they touch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping

import structlog

from agent.allowances import Allowances
from agent.answers import PATIENCE, Answers
from agent.convergence import Convergence, log_actions
from agent.counters import Counters
from agent.desired import Change, Desired, Scope
from agent.logins import Name
from agent.services import Services
from agent.serving import Outcome, Serving
from shared.protocol import Drift, Frame

_WORK_SECONDS = 10.0  # so long the answer to a change of servers and logins waits for them

log = structlog.get_logger()


class Changes:
    """The caller sees to it that its methods never overlap."""

    def __init__(
        self,
        convergence: Convergence,
        services: Services,
        allowances: Allowances,
        answers: Answers,
        send: Callable[[Frame], None],
        counters: Counters,
        clock: Callable[[], float],
    ) -> None:
        self.last_added = 0.0  # monotonic time at which a peer was added that may be waited for
        self._convergence, self._services, self._allowances = convergence, services, allowances
        self._answers, self._send, self._counters, self._clock = answers, send, counters, clock

    @property
    def desired(self) -> Desired:
        return self._convergence.desired

    def state(self, scopes: Mapping[str, Scope]) -> Desired:
        return Desired(scopes, self._clock(), self._allowances.spent)

    async def become(self, desired: Desired) -> None:
        """Take over another desired state as a whole."""
        self.judge(desired)
        await self._convergence.become(desired)

    async def do(self, change: Change, *, reason: str, scope: str = "") -> None:
        """Do a change and answer for every scope that it touched."""
        others = self.touch(change.others, scope)
        actions = await self._convergence.apply(change)
        if change.admitted:
            self.last_added = time.monotonic()
        touched = {name for name, _ in (*change.withdrawn.values(), *change.admitted.values())}
        for name in touched.union(others, {scope} if scope else ()):
            self._answers.answer(name, _WORK_SECONDS if name in others else PATIENCE)
        asyncio.get_running_loop().call_soon(log_actions, actions, reason)  # once the answer has gone out

    async def let_go(self, change: Change, scope: str, reason: str) -> None:
        """Do a change that is not acknowledged."""
        self.touch(change.others, scope)
        log_actions(await self._convergence.apply(change), reason)

    async def bar_and_revive(self, joined: Collection[int]) -> None:
        """These accounts have used up what they may; others may have something again."""
        change = self.desired.bar(joined, self._clock())
        change.then(self.desired.revive(self._clock()))
        await self.do(change, reason="allowance")

    async def expire(self) -> None:
        await self.do(self.desired.expire(self._clock()), reason="lease_ended")

    async def revive(self, reason: str) -> None:
        revived = self.desired.revive(self._clock())
        if revived.admitted or revived.others:
            await self.do(revived, reason=reason)

    def settled(self, serving: Serving, outcome: Outcome) -> None:
        """A server is through with a round of work."""
        if serving.server is None:
            self._counters.server_up.pop(serving.protocol, None)
        elif serving.served:
            self._counters.server_up[serving.protocol] = serving.running is not None and serving.fault is None
        healed = outcome.missing + outcome.unexpected + outcome.altered
        owner = self.desired.logins.owner(serving.name)
        if healed and owner is not None:
            self._counters.drift += healed
            counts = {"missing": outcome.missing, "unexpected": outcome.unexpected, "changed": outcome.altered}
            log.warning("drift_healed", scope=owner, protocol=str(serving.protocol), **counts)
            self._send(Drift(scope=owner, **counts))
        for name in outcome.scopes.intersection(self.desired.scopes):
            if not self._services.busy(name):
                self._answers.answer(name)
        if outcome.changed:
            self._convergence.settle()
            self._answers.tell_news(self.desired.scopes)

    def judge(self, desired: Desired, accounts: Collection[int] | None = None) -> Change:
        """Bar in this state who has used up what he may, and let in who has something again."""
        now = self._clock()
        joined, left = self._allowances.judge(desired.metered, desired.logins.leases, accounts)
        change = desired.bar(joined, now) if joined else Change()
        if left:
            change.then(desired.revive(now))
        return change

    def touch(self, names: Collection[Name], scope: str) -> set[str]:
        """Set the servers to work on what changed; return the scopes that it is part of."""
        parts: dict[str, list[Name]] = {}
        for name in names:
            owner = scope or self.desired.logins.owner(name)
            if owner is not None:
                parts.setdefault(owner, []).append(name)
        for owner, part in parts.items():
            self._services.touch(part, owner)
        if parts:
            self._services.noticed()
        return set(parts)
