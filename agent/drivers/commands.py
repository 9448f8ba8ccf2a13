"""The only place that starts a process: an argument list, a deadline, and the program's own words on failure."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence

from agent.drivers.base import DriverError, Unsupported

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MAX_WORDS = 2000


async def run(
    argv: Sequence[str], *, stdin: str | None = None, timeout: float = 15, environ: Mapping[str, str] | None = None
) -> str:
    """Run a program to its end and return what it printed.

    Also starts daemons: one that goes to the background when it is ready outlives the agent, because it gets a session
    of its own and inherits no descriptor. The environment is only PATH, LC_ALL=C and `environ`, so that messages can
    be read and no variable of the agent changes what a program does.

    Raises Unsupported where the program is not there, else DriverError with its words (never with `stdin`).
    """
    program = argv[0]
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": os.environ.get("PATH", _PATH), "LC_ALL": "C", **(environ or {})},
            cwd="/",
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise Unsupported(f"{program} is not installed on this host") from error
    except OSError as error:
        raise DriverError(f"{program} cannot be started: {error.strerror}") from error
    try:
        async with asyncio.timeout(timeout):
            stdout, stderr = await process.communicate(None if stdin is None else stdin.encode())
    except TimeoutError as error:
        raise DriverError(f"{program} did not end within {timeout:g} s") from error
    finally:
        await _end(process)
    if process.returncode:
        words = (stderr or stdout).decode(errors="replace").strip()[:_MAX_WORDS]
        raise DriverError(f"{program} failed ({_how(process.returncode)}): {words or 'no message'}")
    return stdout.decode(errors="replace")


async def start(argv: Sequence[str], *, output: int) -> asyncio.subprocess.Process:
    """Start a program that stays, with our environment; both its streams go to the descriptor `output`.

    It is the caller's to end; should the caller be killed before, the kernel sends it SIGTERM (PR_SET_PDEATHSIG).
    A terminal's Ctrl-C does not reach it, so that the caller decides the order in which its children end.
    """
    try:
        return await asyncio.create_subprocess_exec(
            "setpriv",
            "--pdeathsig",
            "TERM",
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise Unsupported("setpriv (Debian package util-linux) is not installed on this host") from error


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill what still runs (the deadline passed, or the caller was cancelled) with all that it started."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _how(returncode: int) -> str:
    if returncode < 0:
        return f"signal {signal.Signals(-returncode).name}"
    return f"exit {returncode}"
