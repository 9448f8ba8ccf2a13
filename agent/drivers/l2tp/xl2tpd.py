"""xl2tpd as an instance of our own; it starts one pppd for each session, and takes them along when it ends."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from agent.drivers import commands
from agent.drivers.l2tp import privately
from agent.drivers.l2tp.files import ETC_PPP, SESSIONS, hooks, ppp_options, xl2tpd_conf
from agent.drivers.l2tp.processes import Daemon, end
from agent.drivers.l2tp.records import write
from shared.services import L2tpServer

PROGRAM = "/usr/sbin/xl2tpd"
PPPD = "/usr/sbin/pppd"
_END_WITHIN = 3.0  # it says farewell to its clients


class Xl2tpd:
    def __init__(self, directory: Path) -> None:
        self.directory = directory  # /etc/ppp to it and its pppds
        self._daemon = Daemon(directory / "xl2tpd.pid")
        self._privately = [sys.executable, "-I", str(privately.__file__), str(directory), str(ETC_PPP)]

    def running(self, spec: L2tpServer | None = None) -> bool:
        """Whether it runs, with these settings or with any."""
        return self._daemon.find(_mark(spec) if spec is not None else "") is not None

    async def check(self, spec: L2tpServer) -> None:
        """Let pppd's own parser read the options."""
        candidate = self.directory / "options.candidate"
        await asyncio.to_thread(write, candidate, ppp_options(spec))
        try:
            options = f"{ETC_PPP}/{candidate.name}"
            # Without noauth it would also want a secret to be there.
            await commands.run([*self._privately, PPPD, "dryrun", "nodetach", "notty", "file", options, "noauth"])
        finally:
            candidate.unlink(missing_ok=True)

    async def start(self, spec: L2tpServer) -> None:
        await asyncio.to_thread(self._write, spec)
        files = ["-c", f"{ETC_PPP}/xl2tpd.conf", "-p", f"{ETC_PPP}/xl2tpd.pid", "-C", f"{ETC_PPP}/xl2tpd.control"]
        await self._daemon.start(_mark(spec), "xl2tpd", [*self._privately, PROGRAM, *files])

    def watch(self, ended: Callable[[], None]) -> None:
        if (process := self._daemon.find()) is not None:
            self._daemon.watch(process, ended)

    async def stop(self) -> None:
        self._daemon.unwatch()
        if (process := self._daemon.find()) is not None:
            await end([process], _END_WITHIN)

    def close(self) -> None:
        self._daemon.unwatch()

    def _write(self, spec: L2tpServer) -> None:
        (self.directory / SESSIONS).mkdir(mode=0o700, exist_ok=True)
        write(self.directory / "xl2tpd.conf", xl2tpd_conf(spec))
        write(self.directory / "options.l2tp", ppp_options(spec))
        for name, text in hooks().items():
            write(self.directory / name, text, mode=0o700)


def _mark(spec: L2tpServer) -> str:
    """The hash of everything that one has read at its start."""
    return sha256("\0".join([xl2tpd_conf(spec), ppp_options(spec), *hooks().values()]).encode()).hexdigest()[:16]
