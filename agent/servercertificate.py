"""The certificate of the OpenVPN server: asked for over the node channel when it is due, watched until its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol as Port
from typing import cast

import structlog

from agent import certificates, files
from agent.counters import Counters
from agent.drivers.base import DriverError
from agent.errors import AgentError
from agent.link import Outbox
from agent.serving import Serving
from shared.protocol import OPENVPN_SERVER, Certificate, Renew

WARN_DAYS = (30, 7, 1)
_DAY = 86400
_ANSWER_SECONDS = 60.0
_WAITING_SECONDS = 1.0  # between two looks while the server does not run
_LOOK_SECONDS = 60.0
_MOST_SECONDS = 3600.0

log = structlog.get_logger()


class NeedsCertificate(Port):
    """What a driver has beside the port of all, where its server shows a certificate."""

    async def certificate_request(self) -> bytes | None: ...

    async def install_certificate(self, certificate: bytes, ca: bytes) -> None: ...


class ServerCertificate:
    """The driver makes the key and keeps it; `directory` has a copy of the certificate for its dates."""

    def __init__(
        self,
        serving: Serving,
        outbox: Outbox,
        counters: Counters,
        directory: Path,
        *,
        clock: Callable[[], float] = time.time,
        waiting_seconds: float = _WAITING_SECONDS,
    ) -> None:
        self._serving, self._outbox, self._counters = serving, outbox, counters
        self._driver = cast(NeedsCertificate, serving.driver)
        self._copy = directory / "openvpn.crt"
        self._clock, self._waiting_seconds = clock, waiting_seconds
        self._answer: asyncio.Queue[Certificate | None] = asyncio.Queue(1)  # None: the link has ended
        self._warned: int | None = None  # days

    def take(self, frame: Certificate) -> None:
        if self._answer.empty():
            self._answer.put_nowait(frame)

    def ask_again(self) -> None:
        """The link has ended: what was asked on it is lost."""
        if self._answer.empty():
            self._answer.put_nowait(None)

    async def run(self) -> None:
        tries = 0
        while True:
            if self._outbox.connected:
                tries = 0 if await self._renewed() else tries + 1
            await self._watch()
            hurried = tries or self._serving.fault is not None or not self._outbox.connected
            pause = self._waiting_seconds if hurried else max(self._waiting_seconds, _LOOK_SECONDS)
            await asyncio.sleep(min(pause * 2 ** min(tries, 12), _MOST_SECONDS))

    async def _renewed(self) -> bool:
        """Ask for a certificate where one is due; False where none could be had."""
        try:
            request = await self._serving.ask(self._driver.certificate_request)
            if request is None:
                return True
            while not self._answer.empty():
                self._answer.get_nowait()
            if not self._outbox.connected:
                return False
            self._outbox.send(Renew(csr=request, purpose=OPENVPN_SERVER))
            async with asyncio.timeout(_ANSWER_SECONDS):
                frame = await self._answer.get()
            if frame is None:
                return False
            await self._serving.ask(lambda: self._driver.install_certificate(frame.certificate, frame.ca))
            await asyncio.to_thread(files.write_private, self._copy, frame.certificate)
        except TimeoutError:
            log.warning("server_certificate_not_renewed", reason="the controller did not answer")
            return False
        except (AgentError, DriverError) as error:
            log.error("server_certificate_not_renewed", reason=str(error))
            return False
        log.info("server_certificate_renewed")
        self._warned = None
        self._serving.look()
        return True

    async def _watch(self) -> None:
        """Warn once for each of the last days that were agreed on."""
        try:
            validity = certificates.validity(await asyncio.to_thread(self._copy.read_bytes))
        except (OSError, certificates.InvalidCertificate):
            return
        self._counters.server_certificate_not_after = validity.not_after
        left = validity.not_after - self._clock()
        days = min((days for days in WARN_DAYS if left <= days * _DAY), default=None)
        if days is not None and (self._warned is None or days < self._warned):
            log.warning("server_certificate_ends_soon", protocol="openvpn", days=days, seconds=int(max(left, 0)))
            self._warned = days
