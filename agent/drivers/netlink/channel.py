"""A netlink socket: requests with their acknowledgement, whole dumps; the exchange itself runs in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import socket
import struct
import threading
from collections.abc import Callable, Iterable

from agent.drivers.base import DeviceMissing, DriverError
from agent.drivers.netlink.codec import (
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    Acknowledgement,
    MalformedMessage,
    Message,
    acknowledgement,
    message,
    messages,
    succeeded,
)

_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
# The kernel fills a dump's messages up to the size of the reader's buffer, at most 32 KiB; a smaller one costs more
# round trips, and one with no room for a single record makes the kernel answer for ever.
_RECEIVE_BYTES = 64 * 1024
_SOCKET_BUFFER = 4 * 1024 * 1024
_SMALL_BYTES = 1024
# The kernel's own timeout: with Python's, each call would be two, as it polls first.
_TIMEOUT_SECONDS = 30
_TIMEOUT = struct.pack("@ll", _TIMEOUT_SECONDS, 0)
_DUMP_ATTEMPTS = 10


class KernelRefused(DriverError):
    """The kernel's answer to a request was an error."""

    def __init__(self, what: str, answer: Acknowledgement) -> None:
        super().__init__(f"{what}: {answer}")
        self.errno = answer.errno


class _Interrupted(Exception):
    """The listed objects changed while they were read, or the receive buffer overflowed: the dump must be repeated."""


class Channel:
    """One socket of one netlink protocol, in the network namespace of the thread that made it."""

    def __init__(self, protocol: int) -> None:
        self._protocol = protocol
        self._lock = threading.Lock()
        self._sequence = itertools.count(1)
        self._socket = self._open()

    async def request(self, what: str, type_: int, payload: bytes, flags: int = 0) -> list[bytes]:
        """Send one request and return the payloads of its answer (none where it is only acknowledged).

        `what` opens the error's text: it names the attempt, as in "add address 10.0.0.1/24 to wg0".
        """
        return await asyncio.to_thread(self._locked, lambda: self._request(what, type_, payload, flags))

    async def requests(self, what: str, type_: int, payloads: Iterable[bytes]) -> None:
        """Send requests one after the other; the first error ends it. The thread also takes them from the iterable.

        A list of one small request is not worth a thread: the kernel has done it when the send returns.
        """
        only = payloads[0] if isinstance(payloads, list) and len(payloads) == 1 else None
        # The lock is taken while the exchange of a caller that was cancelled still runs.
        if only is not None and len(only) <= _SMALL_BYTES and self._lock.acquire(blocking=False):
            try:
                self._request(what, type_, only, 0)
            finally:
                self._lock.release()
            return

        def all_of_them() -> list[bytes]:
            for payload in payloads:
                self._request(what, type_, payload, 0)
            return []

        await asyncio.to_thread(self._locked, all_of_them)

    async def dump(self, what: str, type_: int, payload: bytes) -> list[bytes]:
        """List all objects of a kind: the payloads of one consistent dump."""
        return await asyncio.to_thread(self._locked, lambda: self._dump(what, type_, payload))

    def close(self) -> None:
        self._socket.close()

    def _open(self) -> socket.socket:
        opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, self._protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER)
        opened.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        opened.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        opened.bind((0, 0))
        return opened

    def _locked(self, exchange: Callable[[], list[bytes]]) -> list[bytes]:
        # A caller that was cancelled leaves its exchange running: the next one waits here for the socket.
        with self._lock:
            return exchange()

    def _request(self, what: str, type_: int, payload: bytes, flags: int) -> list[bytes]:
        try:
            return self._exchange(what, type_, payload, NLM_F_ACK | flags)
        except _Interrupted as error:
            raise DriverError(f"{what}: the kernel's answer was lost") from error

    def _dump(self, what: str, type_: int, payload: bytes) -> list[bytes]:
        for _attempt in range(_DUMP_ATTEMPTS):
            with contextlib.suppress(_Interrupted):
                return self._exchange(what, type_, payload, NLM_F_DUMP)
        raise DriverError(f"{what}: the list changed during each of {_DUMP_ATTEMPTS} readings")

    def _exchange(self, what: str, type_: int, payload: bytes, flags: int) -> list[bytes]:
        sequence = next(self._sequence) & 0xFFFFFFFF
        try:
            self._socket.send(message(type_, NLM_F_REQUEST | flags, sequence, payload))
            return self._answer(what, sequence)
        except (OSError, MalformedMessage) as error:
            # What is still queued belongs to this exchange; a new socket has nothing queued and no dump half done.
            self._socket.close()
            self._socket = self._open()
            if isinstance(error, OSError) and error.errno == errno.ENOBUFS:
                raise _Interrupted from error
            late = isinstance(error, BlockingIOError)
            reason = f"no answer within {_TIMEOUT_SECONDS} seconds" if late else str(error)
            raise DriverError(f"{what}: netlink: {reason}") from error

    def _answer(self, what: str, sequence: int) -> list[bytes]:
        payloads: list[bytes] = []
        interrupted = False
        while True:
            datagram = self._socket.recv(_RECEIVE_BYTES)
            if succeeded(datagram, sequence):
                return payloads
            for part in messages(datagram):
                if part.sequence != sequence:
                    continue
                interrupted = interrupted or bool(part.flags & NLM_F_DUMP_INTR)
                if part.type not in (NLMSG_ERROR, NLMSG_DONE):
                    payloads.append(bytes(part.payload))
                    continue
                _check(what, part)
                if interrupted:
                    raise _Interrupted
                return payloads


def _check(what: str, end: Message) -> None:
    answer = acknowledgement(end)
    if answer.errno == errno.ENODEV:
        raise DeviceMissing(f"{what}: {answer}")
    if answer.errno == errno.EINTR:
        raise _Interrupted
    if answer.errno:
        raise KernelRefused(what, answer)
