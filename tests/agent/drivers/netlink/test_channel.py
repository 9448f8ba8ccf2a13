"""The netlink socket against a kernel of the test's own: interrupted dumps, lost answers, strange datagrams."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from agent.drivers.base import DeviceMissing, DriverError
from agent.drivers.netlink import channel as channel_module
from agent.drivers.netlink.channel import Channel, KernelRefused
from agent.drivers.netlink.codec import (
    NLM_F_ACK,
    NLM_F_ACK_TLVS,
    NLM_F_CAPPED,
    NLM_F_DUMP_INTR,
    NLMSG_DONE,
    NLMSG_ERROR,
    attribute,
    message,
    messages,
)

_NOOP = 1
_RECORD = 40  # the type of a listed object's message
Answer = Callable[[int], list[bytes]]  # sequence number -> datagrams


def done(sequence: int, flags: int = 0) -> bytes:
    return message(NLMSG_DONE, flags, sequence, struct.pack("=i", 0))


def failed(sequence: int, code: int, words: str = "") -> bytes:
    payload = struct.pack("=i", -code) + bytes(16) + (attribute(1, words.encode() + b"\0") if words else b"")
    return message(NLMSG_ERROR, NLM_F_CAPPED | (NLM_F_ACK_TLVS if words else 0), sequence, payload)


@contextmanager
def kernel(*answers: Answer) -> Iterator[tuple[Channel, list[int]]]:
    """A channel whose kernel gives one answer to each request, and the requests' types."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asked: list[int] = []

    class Connected(Channel):
        def _open(self) -> socket.socket:
            return ours

    def serve() -> None:
        for answer in answers:
            (request,) = messages(theirs.recv(65536))
            asked.append(request.type)
            for datagram in answer(request.sequence):
                theirs.send(datagram)

    ours.settimeout(10)
    thread = threading.Thread(target=serve)
    thread.start()
    channel = Connected(0)
    try:
        yield channel, asked
    finally:
        channel.close()
        theirs.close()
        thread.join()


def listed(sequence: int, *payloads: bytes, flags: int = 0) -> bytes:
    return b"".join(message(_RECORD, flags, sequence, payload) for payload in payloads)


async def test_the_end_of_a_dump_may_share_the_last_datagram() -> None:
    with kernel(lambda n: [listed(n, b"one!"), listed(n, b"two!") + done(n)]) as (channel, _):
        assert await channel.dump("list", 1, b"") == [b"one!", b"two!"]


@pytest.mark.parametrize("where", ["record", "end"])
async def test_an_interrupted_dump_is_repeated(where: str) -> None:
    flags = (NLM_F_DUMP_INTR, 0) if where == "record" else (0, NLM_F_DUMP_INTR)
    with kernel(
        lambda n: [listed(n, b"old!", flags=flags[0]), done(n, flags[1])],
        lambda n: [listed(n, b"new!"), done(n)],
    ) as (channel, asked):
        assert await channel.dump("list", 1, b"") == [b"new!"]
        assert len(asked) == 2


async def test_a_dump_that_is_always_interrupted_is_an_error() -> None:
    with (
        kernel(*[lambda n: [done(n, NLM_F_DUMP_INTR)]] * 10) as (channel, _),
        pytest.raises(DriverError, match="list the peers: the list changed"),
    ):
        await channel.dump("list the peers", 1, b"")


async def test_what_is_left_of_an_older_exchange_is_skipped() -> None:
    with kernel(lambda n: [listed(n - 1, b"old!") + done(n - 1), listed(n, b"new!"), done(n)]) as (channel, _):
        assert await channel.dump("list", 1, b"") == [b"new!"]


async def test_a_refusal_has_the_kernels_words() -> None:
    with (
        kernel(lambda n: [failed(n, errno.EINVAL, "no such thing")]) as (channel, _),
        pytest.raises(KernelRefused, match=r"add it: Invalid argument \(no such thing\)") as caught,
    ):
        await channel.request("add it", 1, b"")
    assert caught.value.errno == errno.EINVAL


async def test_a_missing_device_is_told_apart() -> None:
    with (
        kernel(lambda n: [failed(n, errno.ENODEV)]) as (channel, _),
        pytest.raises(DeviceMissing, match="set wg0: No such device"),
    ):
        await channel.request("set wg0", 1, b"")


async def test_the_first_refused_request_ends_a_series() -> None:
    with (
        kernel(lambda n: [failed(n, 0)], lambda n: [failed(n, errno.EPERM)]) as (channel, asked),
        pytest.raises(DriverError, match="Operation not permitted"),
    ):
        await channel.requests("set", 1, [b"1", b"2", b"3"])
    assert len(asked) == 2


async def test_one_small_request_takes_no_way_through_a_thread() -> None:
    loop = asyncio.get_running_loop()
    with kernel(lambda n: [failed(n, 0)], lambda n: [failed(n, errno.EPERM)]) as (channel, asked):
        with ThreadPoolExecutor(1) as closed:
            loop.set_default_executor(closed)
        await channel.requests("set", 1, [b"1"])
        with pytest.raises(DriverError, match="set: Operation not permitted"):
            await channel.requests("set", 1, [b"1"])
        with pytest.raises(RuntimeError, match="cannot schedule"):
            await channel.requests("set", 1, [bytes(10_000)])
    assert len(asked) == 2


async def test_a_datagram_that_is_no_message_is_an_error() -> None:
    with kernel(lambda _: [b"\xff" * 64]) as (channel, _), pytest.raises(DriverError, match="list: netlink"):
        await channel.dump("list", 1, b"")


async def test_a_kernel_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "_TIMEOUT", struct.pack("@ll", 0, 50_000))
    channel = Channel(socket.NETLINK_ROUTE)
    try:
        with pytest.raises(DriverError, match="set wg0: netlink: no answer within 30 seconds"):
            channel._exchange("set wg0", _NOOP, b"", 0)  # nobody asks for an acknowledgement
        assert channel._exchange("set wg0", _NOOP, b"", NLM_F_ACK) == []
    finally:
        channel.close()
