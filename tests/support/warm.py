"""Hosts on which our own programs are forked from one process that has imported them, instead of started anew.

For the emulated processor of the virtual machine: a start imports for half a minute there. The programs are the same
processes otherwise: with their own arguments, environment, standard streams and namespaces.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import IO, Any

from tests.support.host import SECONDS, Host
from tests.support.netns import CommandFailed, Running

_MAINS = {"skynetvpn-controller": "controller.__main__", "skynetvpn-agent": "agent.__main__"}
_IMPORTED = (
    *_MAINS.values(),
    *("controller.cli", "agent.cli"),
    *("controller.app", "controller.setup", "sqlalchemy.dialects.sqlite.aiosqlite"),
    *("agent.service", "agent.enrolment", "agent.drivers.limits", "agent.drivers.nftables"),
    *(f"agent.drivers.{name}" for name in ("wireguard", "openvpn", "ssh", "l2tp")),
)
_context = multiprocessing.get_context("forkserver")


def warm_up() -> None:
    """Begin to import, in the background."""
    from multiprocessing import forkserver

    _context.set_forkserver_preload(list(_IMPORTED))
    forkserver.ensure_running()


class Forked:
    """As much of subprocess.Popen as those need who watch and end a process."""

    stdin: IO[Any] | None = None
    stdout: IO[Any] | None = None
    stderr: IO[Any] | None = None

    def __init__(self, process: ForkServerProcess) -> None:
        process.start()
        self._process = process
        self.pid: int = process.pid or 0

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return self._process.exitcode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class WarmHost(Host):
    def run(self, *argv: str, stdin: str | None = None, timeout: float = SECONDS, check: bool = True) -> str:
        if Path(argv[0]).name not in _MAINS:
            return super().run(*argv, stdin=stdin, timeout=timeout, check=check)
        with tempfile.TemporaryDirectory() as name:
            given, said = Path(name) / "stdin", Path(name) / "output"
            given.write_text(stdin or "")
            status = self._fork(argv, {}, given, said).wait(timeout)
            text = said.read_text(errors="replace")
        if check and status:
            raise CommandFailed(f"{' '.join(argv)}: exit {status}: {text.strip()}")
        return text

    def start(self, log: Path, *argv: str, env: Mapping[str, str] | None = None) -> Running:
        if Path(argv[0]).name not in _MAINS:
            return super().start(log, *argv, env=env)
        return self._fork(argv, env or {}, Path(os.devnull), log)

    def _fork(self, argv: tuple[str, ...], env: Mapping[str, str], stdin: Path, output: Path) -> Forked:
        namespaces = (str(self.namespace.path), f"/proc/{self.holder}/ns/mnt")  # the second one changes what paths mean
        arguments = (argv, dict(env), namespaces, str(stdin), str(output))
        return Forked(_context.Process(target=_become, args=arguments, name=Path(argv[0]).name, daemon=True))


def _become(argv: tuple[str, ...], env: dict[str, str], namespaces: tuple[str, ...], stdin: str, output: str) -> None:
    os.setsid()
    streams = [
        os.open(stdin, os.O_RDONLY),
        os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
    ]
    libc = ctypes.CDLL(None, use_errno=True)
    for entered in [os.open(path, os.O_RDONLY) for path in namespaces]:
        if libc.setns(entered, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(entered)
    for standard, opened in zip((0, 1, 2), (streams[0], streams[1], streams[1]), strict=True):
        os.dup2(opened, standard)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.argv = list(argv)
    os.environ.update(env)
    sys.exit(importlib.import_module(_MAINS[Path(argv[0]).name]).main())
