"""The link to the controller: dialled from here, mutual TLS 1.3, kept up with jittered back-off."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Awaitable, Callable

import aiohttp
import structlog

from agent.counters import Counters
from agent.errors import AgentError, in_words
from agent.identity import Identity, Pair
from shared.protocol import (
    CHANNEL_PATH,
    CONTROLLER_NAME,
    MAX_FRAME_BYTES,
    Bye,
    Frame,
    FromController,
    Hello,
    MalformedFrame,
    Welcome,
    decode_from_controller,
    encode,
)

_HEARTBEAT = 20.0
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10)
_ANSWER_SECONDS = 15  # for the upgrade, and again for the Welcome
_DISMISSED_SECONDS = 600.0
_NOT_YET_VALID, _EXPIRED = 9, 10  # X509_V_ERR_* of OpenSSL
_REFUSALS = {
    401: "the controller does not know the certificate of this node: enrol this host again with a new token",
    403: "the controller has disabled or locked this node: `skynetvpn-controller node list` tells there",
}

log = structlog.get_logger()


class Dropped(Exception):
    """The link ended for a reason of the protocol; `seconds` says how long to stay away."""

    def __init__(self, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.seconds = seconds


class Outbox:
    """What waits to be written; without a link frames are dropped, for the next Hello tells it all."""

    def __init__(self, size: int = 1000) -> None:
        self._size = size
        self._queue: asyncio.Queue[Frame | None] | None = None

    @property
    def connected(self) -> bool:
        return self._queue is not None

    def send(self, frame: Frame) -> None:
        if self._queue is None:
            return
        try:
            self._queue.put_nowait(frame)
        except asyncio.QueueFull:
            # The controller does not read. It will learn the truth from the next Hello.
            self.close()

    def open(self) -> asyncio.Queue[Frame | None]:
        self._queue = asyncio.Queue(self._size)
        return self._queue

    def close(self) -> None:
        """End the link: the writer stops where it is."""
        queue, self._queue = self._queue, None
        if queue is not None:
            while not queue.empty():
                queue.get_nowait()
            queue.put_nowait(None)


class Backoff:
    """Full jitter between half a second and half a minute."""

    def __init__(self, first: float = 0.5, most: float = 30.0) -> None:
        self._first, self._most = first, most
        self._tries = 0

    def reset(self) -> None:
        self._tries = 0

    def next(self) -> float:
        self._tries += 1
        ceiling = min(self._most, self._first * 2 ** min(self._tries, 16))
        return random.uniform(self._first, ceiling)  # noqa: S311  spreads a fleet, guards nothing


class Link:
    def __init__(
        self,
        *,
        address: str,
        identity: Identity,
        outbox: Outbox,
        hello: Callable[[], Hello],
        deliver: Callable[[FromController], Awaitable[None]],
        disconnected: Callable[[], None],
        counters: Counters,
        backoff: Backoff | None = None,
    ) -> None:
        self._url = f"https://{address}{CHANNEL_PATH}"
        self._identity, self._outbox, self._counters = identity, outbox, counters
        self._hello, self._deliver, self._disconnected = hello, deliver, disconnected
        self._backoff = backoff or Backoff()
        self._refused_next = False
        self._trouble: str | None = None  # what was logged last

    async def run(self) -> None:
        while True:
            delay = None
            pair = self._identity.next if self._prefer_next() else self._identity.current
            try:
                await self._connect(pair)
            except* (aiohttp.ClientError, OSError, TimeoutError, MalformedFrame, AgentError, Dropped) as group:
                delay = self._failed(_first(group), pair)
            finally:
                self._counters.connected = False
                self._outbox.close()
                self._disconnected()
            if (task := asyncio.current_task()) is not None and task.cancelling():
                # Where both come at once, Python 3.11's TaskGroup raises only the child's error: we would never end.
                raise asyncio.CancelledError
            await asyncio.sleep(self._backoff.next() if delay is None else delay)

    def reconnect(self) -> None:
        """Dial anew, as with a renewed certificate."""
        self._outbox.close()

    def _prefer_next(self) -> bool:
        return self._identity.pending() and not self._refused_next

    async def _connect(self, pair: Pair) -> None:
        """Hold one link until it ends; leaving without an error means that this side wanted so."""
        context = await asyncio.to_thread(self._identity.tls, pair)
        async with (
            aiohttp.ClientSession(timeout=_TIMEOUT, connector=aiohttp.TCPConnector(limit=1)) as session,
            asyncio.timeout(_ANSWER_SECONDS) as deadline,
            session.ws_connect(
                self._url,
                ssl=context,
                server_hostname=CONTROLLER_NAME,
                heartbeat=_HEARTBEAT,
                max_msg_size=MAX_FRAME_BYTES,
            ) as socket,
        ):
            deadline.reschedule(None)
            await socket.send_bytes(encode(self._hello()))
            queue = self._outbox.open()
            async with asyncio.TaskGroup() as tasks:
                reader = tasks.create_task(self._read(socket, pair))
                await self._write(socket, queue)
                reader.cancel()

    async def _write(self, socket: aiohttp.ClientWebSocketResponse, queue: asyncio.Queue[Frame | None]) -> None:
        while (frame := await queue.get()) is not None:
            await socket.send_bytes(encode(frame))

    async def _read(self, socket: aiohttp.ClientWebSocketResponse, pair: Pair) -> None:
        async with asyncio.timeout(_ANSWER_SECONDS):
            first = await self._frame(socket)
        if not isinstance(first, Welcome):
            raise Dropped("the controller began without a Welcome")
        self._accepted(pair, first)
        await self._deliver(first)
        while True:
            await self._deliver(await self._frame(socket))

    async def _frame(self, socket: aiohttp.ClientWebSocketResponse) -> FromController:
        """The next frame of a kind that this version knows."""
        while True:
            message = await socket.receive()
            if message.type is aiohttp.WSMsgType.BINARY:
                frame = decode_from_controller(message.data)
                if isinstance(frame, Bye):
                    raise Dropped(frame.reason, None if frame.retry else _DISMISSED_SECONDS)
                if frame is not None:
                    return frame
            elif message.type is aiohttp.WSMsgType.ERROR:
                raise Dropped(f"the link broke: {socket.exception()}")
            elif message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.CLOSED):
                raise Dropped(f"the controller closed the link ({socket.close_code})")
            else:
                raise MalformedFrame("a text message")

    def _accepted(self, pair: Pair, welcome: Welcome) -> None:
        self._backoff.reset()
        self._counters.connected = True
        if pair is self._identity.next:
            self._identity.promote()
            log.info("certificate_promoted")
        elif self._identity.pending():
            self._identity.discard_next()
            log.warning("renewed_certificate_given_up")
        self._refused_next = False
        self._counters.certificate_not_after = self._identity.validity().not_after
        self._trouble = None
        log.info("connected", controller=self._url, node=welcome.node_id, epoch=welcome.epoch)

    def _failed(self, error: BaseException, pair: Pair) -> float | None:
        """Log the transition, not each try; return how long to stay away where the controller said so."""
        unreachable = isinstance(error, TimeoutError) or (
            isinstance(error, aiohttp.ClientConnectorError) and not isinstance(error, aiohttp.ClientSSLError)
        )
        if pair is self._identity.next and not unreachable:
            self._refused_next = True
            log.warning("renewed_certificate_refused", error=in_words(error))
        trouble = self._explain(error)
        if trouble != self._trouble:
            self._trouble = trouble
            log.warning("disconnected", controller=self._url, reason=trouble, serving=True)
        return error.seconds if isinstance(error, Dropped) else None

    def _explain(self, error: BaseException) -> str:
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            cause = error.certificate_error
            if isinstance(cause, ssl.SSLCertVerificationError) and cause.verify_code in (_NOT_YET_VALID, _EXPIRED):
                clock = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime())
                return f"the controller's certificate is not valid at this host's time, {clock}: check the clock"
        try:
            times = self._identity.validity()
        except AgentError as broken:
            return str(broken)
        if time.time() >= times.not_after:
            return "the node's certificate has expired: enrol this host again with a new token"
        if time.time() < times.not_before:
            return "the node's certificate is not valid yet: check the clock of this host"
        if isinstance(error, aiohttp.WSServerHandshakeError):
            return _REFUSALS.get(error.status, f"the controller answered {error.status}")
        return in_words(error)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
