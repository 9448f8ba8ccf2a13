"""Work inside another network namespace, while the rest of the process stays where it is."""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import TypeVar

from agent.client.errors import Misuse

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_DIRECTORY = Path("/run/netns")  # ip-netns(8)


async def within(netns: str | None, function: Callable[[], Awaitable[T]]) -> T:
    """Run the coroutine function in the named namespace: its sockets and processes are made there.

    A namespace belongs to a thread, so it gets a thread and an event loop of its own. When the caller is cancelled,
    what has begun is finished first: whoever cleans up then finds a host that nobody else changes.
    """
    if netns is None:
        return await function()
    with _opened(netns) as namespace, ThreadPoolExecutor(1) as executor:
        work = asyncio.get_running_loop().run_in_executor(executor, _enter_and_run, namespace.fileno(), function)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.gather(work, return_exceptions=True)
            raise


def exists(netns: str) -> bool:
    return (_DIRECTORY / netns).exists()


def _opened(netns: str) -> FileIO:
    if "/" in netns or netns in ("", ".", ".."):
        raise Misuse(f"{netns!r} is no name of a network namespace")
    try:
        return (_DIRECTORY / netns).open("rb", buffering=0)
    except OSError as error:
        raise Misuse(f"network namespace {netns!r}: {error.strerror} (ip netns list shows those that exist)") from error


def _enter_and_run(namespace: int, function: Callable[[], Awaitable[T]]) -> T:
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12
    if libc.setns(namespace, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot enter the network namespace: {os.strerror(code)}")

    async def main() -> T:
        return await function()

    return asyncio.run(main())
