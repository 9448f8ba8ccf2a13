"""Renews the node's certificate at half of its life, with a new key, keeping the old pair until the new one works."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from agent import certificates
from agent.errors import AgentError
from agent.identity import Identity, signing_request
from agent.link import Outbox
from shared.protocol import Certificate, Renew

_ANSWER_SECONDS = 60.0
_LOOK_SECONDS = 60.0  # the wall clock may be set at any time
_MOST_SECONDS = 3600.0

log = structlog.get_logger()


class Renewal:
    def __init__(
        self, identity: Identity, outbox: Outbox, reconnect: Callable[[], None], *, look_seconds: float = _LOOK_SECONDS
    ) -> None:
        self._identity, self._outbox, self._reconnect = identity, outbox, reconnect
        self._look_seconds = look_seconds
        self._answer: asyncio.Queue[Certificate] = asyncio.Queue(1)
        self._jitter = certificates.jitter()

    def take(self, frame: Certificate) -> None:
        """A certificate that nobody waits for any more is dropped: its key is not known to be the newest."""
        if self._answer.empty():
            self._answer.put_nowait(frame)

    async def run(self) -> None:
        wait = self._look_seconds
        while True:
            await asyncio.sleep(wait)
            wait = self._look_seconds
            if self._due() and self._outbox.connected and not await self._renewed():
                wait = min(wait * 4, _MOST_SECONDS)

    def _due(self) -> bool:
        if self._identity.pending():
            return False
        try:
            return time.time() >= self._identity.validity().renew_at(self._jitter)
        except AgentError:
            return False

    async def _renewed(self) -> bool:
        while not self._answer.empty():
            self._answer.get_nowait()
        try:
            self._outbox.send(Renew(csr=await asyncio.to_thread(self._request)))
            async with asyncio.timeout(_ANSWER_SECONDS):
                frame = await self._answer.get()
            await asyncio.to_thread(self._identity.store, self._identity.next, frame.certificate, frame.ca)
        except TimeoutError:
            log.warning("certificate_not_renewed", reason="the controller did not answer")
            self._reconnect()  # or a late answer might be taken for that to the next question
            return False
        except (AgentError, certificates.InvalidCertificate) as error:
            log.error("certificate_not_renewed", reason=str(error))
            return False
        log.info("certificate_renewed")
        self._jitter = certificates.jitter()
        self._reconnect()
        return True

    def _request(self) -> bytes:
        return signing_request(self._identity.ensure_key(self._identity.next.key))
