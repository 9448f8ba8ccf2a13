"""One node's WebSocket: a reader, the one writer, and an end that cannot be held up by the other side."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import deque
from collections.abc import Awaitable, Callable

import structlog
from aiohttp import WSMsgType, web

from controller.channel.metrics import ChannelMetrics
from controller.channel.pace import NodeTooFast
from controller.channel.pushes import Push
from controller.channel.session import ProtocolViolation, Session, Wanted
from controller.errors import DomainError
from controller.fleet.identities import Admitted
from controller.secretbox import SecretUnreadable
from controller.store.database import StoreUnavailable
from shared.protocol import Bye, Frame, FromAgent, Hello, MalformedFrame, decode_from_agent, encode

HELLO_DEADLINE = 10.0  # seconds
SEND_DEADLINE = 10.0  # a node that takes nothing for so long is dropped; it resynchronises when it is back
FAREWELL = 0.5
_MAX_WAITING = 256  # frames that are no state: acknowledgements of reports and the like
_SMALL = 16 * 1024  # bytes that an empty transport always takes

log = structlog.get_logger()


class Connection:
    """`read_push` reads what a scope has to be sent, `known_push` tells it where nothing has to be read; `receive`
    takes what the node sends."""

    def __init__(
        self,
        socket: web.WebSocketResponse,
        transport: asyncio.Transport,
        node: Admitted,
        session: Session,
        metrics: ChannelMetrics,
        read_push: Callable[[Wanted], Awaitable[Push]],
        known_push: Callable[[Wanted], Push | None],
    ) -> None:
        self.node = node
        self.session = session
        self._socket = socket
        self._transport = transport
        self._metrics = metrics
        self._read_push, self._known_push = read_push, known_push
        self._waiting: deque[bytes] = deque()
        self._unreadable: set[str] = set()  # scopes, as the log has it
        self._idle = False  # the writer waits for work
        self._work = asyncio.Event()
        self._ended: asyncio.Future[Bye | None] = asyncio.get_running_loop().create_future()

    @property
    def ended(self) -> bool:
        return self._ended.done()

    def send(self, frame: Frame) -> None:
        if len(self._waiting) >= _MAX_WAITING:
            self._drop("too many frames wait")
            return
        self._waiting.append(encode(frame))
        self._work.set()

    def wake(self) -> None:
        """Something may be wanted by the session."""
        if not self._push_at_once():
            self._work.set()

    def end(self, bye: Bye | None) -> None:
        """End the session; the first reason counts."""
        if not self._ended.done():
            self._ended.set_result(bye)

    async def run(self, receive: Callable[[FromAgent], Awaitable[None]]) -> None:
        """Serve the node until either side ends it."""
        bye: Bye | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                reader = tasks.create_task(self._read(receive))
                writer = tasks.create_task(self._write())
                bye = await self._ended
                reader.cancel()
                writer.cancel()
        finally:
            await self._close(bye)

    async def _read(self, receive: Callable[[FromAgent], Awaitable[None]]) -> None:
        try:
            await self._receive_hello(receive)
            async for message in self._socket:
                await self._take(message.type, message.data, receive)
            self.end(None)
        except (ProtocolViolation, MalformedFrame) as error:
            self._metrics.violations.labels(self.node.name).inc()
            log.warning("channel.violation", node=self.node.name, reason=str(error))
            self.end(Bye(reason=str(error)))
        except NodeTooFast as error:
            self._metrics.violations.labels(self.node.name).inc()
            self.end(Bye(reason=str(error)))
        except StoreUnavailable as error:
            self.end(Bye(reason=str(error)))
        except DomainError as error:
            log.warning("channel.refused", node=self.node.name, code=error.code, reason=str(error))
            self.end(Bye(reason=str(error), retry=False))

    async def _receive_hello(self, receive: Callable[[FromAgent], Awaitable[None]]) -> None:
        try:
            message = await self._socket.receive(timeout=HELLO_DEADLINE)
        except TimeoutError as error:
            raise ProtocolViolation(f"no hello within {HELLO_DEADLINE:g} seconds") from error
        await self._take(message.type, message.data, receive)

    async def _take(self, kind: WSMsgType, data: object, receive: Callable[[FromAgent], Awaitable[None]]) -> None:
        if self._ended.done():
            return  # what comes after our Bye is for nobody
        if kind in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR):
            self.end(None)
            return
        if kind is not WSMsgType.BINARY or not isinstance(data, bytes):
            raise ProtocolViolation("a frame is one binary message")
        frame = decode_from_agent(data)
        if frame is None:
            return
        if not self.session.greeted and not isinstance(frame, Hello):
            raise ProtocolViolation("the first frame is a hello")
        await receive(frame)

    async def _write(self) -> None:
        while True:
            self._idle = True
            await self._work.wait()
            self._idle = False
            self._work.clear()
            await self._flush()
            unread: list[str] = []
            while (wanted := self.session.wanted()) is not None:
                if not await self._push(wanted):
                    unread.append(wanted.scope)  # the others have to go out all the same
                await self._flush()
            for scope in unread:
                self.session.postpone(scope)  # until something wakes us, as the sweep does

    async def _flush(self) -> None:
        while self._waiting:
            await self._transmit(self._waiting.popleft())

    async def _push(self, wanted: Wanted) -> bool:
        """Return False where it could not be read."""
        try:
            push = await self._read_push(wanted)
        except StoreUnavailable:
            return False
        except SecretUnreadable as error:  # the node keeps what it has; never is it sent less than all
            if wanted.scope not in self._unreadable:
                log.error("channel.desired_unreadable", node=self.node.name, scope=wanted.scope, reason=str(error))
            self._unreadable.add(wanted.scope)
            return False
        self._unreadable.discard(wanted.scope)
        if self.session.pushing(wanted, push.revision, push.digest):
            for frame in push.frames:
                await self._transmit(frame)
        return True

    def _push_at_once(self) -> bool:
        """Write what is wanted from here, or return False: what has to be read, or has to wait, is the writer's.

        A push is then on its way before its commit has returned to whoever asked for it, and no task is woken.
        """
        busy = not self._idle or self._work.is_set() or self._ended.done()
        if busy or self._transport.is_closing() or self._transport.get_write_buffer_size():
            return False
        while (wanted := self.session.wanted()) is not None:
            push = self._known_push(wanted)
            if push is None or sum(map(len, push.frames)) > _SMALL:
                self.session.postpone(wanted.scope)
                return False
            if self.session.pushing(wanted, push.revision, push.digest):
                self._transport.write(b"".join(map(_message, push.frames)))
        return True

    async def _transmit(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(SEND_DEADLINE):
                await self._socket.send_bytes(data)
        except TimeoutError:
            self._drop(f"it took nothing for {SEND_DEADLINE:g} seconds")
        except ConnectionError:
            self.end(None)

    def _drop(self, reason: str) -> None:
        if not self._ended.done():
            self._metrics.dropped.labels(self.node.name).inc()
            log.warning("channel.node_dropped", node=self.node.name, reason=reason)
        self.end(Bye(reason="too slow"))

    async def _close(self, bye: Bye | None) -> None:
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(FAREWELL):
                if bye is not None and not self._socket.closed:
                    await self._socket.send_bytes(encode(bye))
                await self._socket.close()
        self._transport.abort()


def _message(data: bytes) -> bytes:
    """A whole binary message of less than 64 KiB, as a server writes it (RFC 6455 §5.2)."""
    size = len(data)
    return (struct.pack("!BB", 0x82, size) if size < 126 else struct.pack("!BBH", 0x82, 126, size)) + data
