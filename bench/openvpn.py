"""OpenVPN: what a decision on a client costs, by the agent and by the scripts that OpenVPN can start.

A hundred clients come at once, as after a restart. OpenVPN's side of the management socket is a thread here: it says of
each what OpenVPN 2.6.14 says of a client that logs in by password, and waits for the answers. A script is started as
OpenVPN starts it (`auth-user-pass-verify … via-file`), one after the other, because OpenVPN has one thread and serves
nobody meanwhile; it looks the pair up in a file of 100, in plain text.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.drivers.openvpn.config import settings
from agent.drivers.openvpn.logins import Logins
from agent.drivers.openvpn.management import Management
from agent.drivers.openvpn.process import Detached, Process
from agent.drivers.openvpn.server import Server
from bench.harness import Goal, Ratio, Result, absolute, compared, interleaved
from shared.access import Credential
from shared.crypt import hash_password
from shared.resource import Protocol
from shared.services import OpenVpnServer
from tests.support.openvpn import Authority

ROW = "openvpn"
_MEASURE = "one decision on a client"
_USER, _PASSWORD = "user50", "correct horse battery staple"
_DECISIONS, _SCRIPTS = 100, 5  # in each run of a pair
_LOGINS = 100
_VARIABLES = 40  # that OpenVPN tells of a client beside these
_SHELL = """#!/bin/sh
{ read -r user; read -r password; } < "$1"
while IFS=: read -r name secret; do
  [ "$name" = "$user" ] && [ "$secret" = "$password" ] && exit 0
done < "$LOGINS"
exit 1
"""
_PYTHON = """#!{interpreter}
import os, sys
user, password = open(sys.argv[1]).read().split("\\n")[:2]
logins = dict(line.rstrip("\\n").split(":", 1) for line in open(os.environ["LOGINS"]))
sys.exit(logins.get(user) != password)
"""


def measure(*, quick: bool) -> list[Result]:
    return asyncio.run(_measure(pairs=3 if quick else 11))


async def _measure(pairs: int) -> list[Result]:
    with tempfile.TemporaryDirectory(prefix="skynetvpn-bench-") as name:
        directory = Path(name)
        shell, python = _scripts(directory)
        agent = await _Agent.start()
        try:
            decisions = agent.per_decision
            await decisions()
            started = _Started()
            await decisions()
            forks = started.count
            against_shell = await interleaved(decisions, _spawned(shell, directory), pairs)
            against_python = await interleaved(decisions, _spawned(python, directory), pairs)
        finally:
            await agent.close()
    goals: list[tuple[str, Any, float]] = [("a sh script", against_shell, 20), ("a Python script", against_python, 500)]
    return [
        *(
            compared(ROW, _MEASURE, "ms", found, against=what, kind=Ratio.FASTER, goal=Goal(at_least=goal))
            for what, found, goal in goals
        ),
        absolute(ROW, f"processes started for {_DECISIONS} decisions", "", float(forks), goal=Goal(at_most=0)),
    ]


class _Agent:
    """The agent's end of the socket, and OpenVPN's."""

    def __init__(self, server: Server, openvpn: socket.socket) -> None:
        self._server = server
        self._openvpn = openvpn
        self._cid = 0

    @classmethod
    async def start(cls) -> _Agent:
        ours, openvpn = socket.socketpair()
        ours.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        logins = Logins(lambda _: None)
        secret = hash_password(_PASSWORD)
        logins.put(
            [
                Credential(protocol=Protocol.OPENVPN, username=f"user{n}", account=n, secret=secret)
                for n in range(_LOGINS)
            ]
        )
        authority = Authority()
        spec = OpenVpnServer(port=1194, ipv4_pool="10.70.0.0/16", ca=authority.pem, tls_crypt=authority.tls_crypt)
        server = Server(
            Process(os.getpid(), 0),
            settings(spec, "udp", "server.0123456789abcdef.pem", dual_stack=True),
            "udp",
            Management(ours, reader, writer),
            launcher=Detached(Path("/nonexistent")),
            boot_id="bench",
            logins=logins,
            ended=lambda _: None,
            notify=lambda: None,
        )
        return cls(server, openvpn)

    async def per_decision(self) -> float:
        """Milliseconds from the first question to the last answer, for each of them."""
        first, self._cid = self._cid, self._cid + _DECISIONS
        clients = range(first, self._cid)
        questions = b"".join(map(_question, clients))
        answers = b"".join(b"client-auth-nt %d 1\n" % cid for cid in clients)
        took = await asyncio.to_thread(self._ask, questions, answers)
        self._openvpn.sendall(b"".join(map(_farewell, clients)))
        return took

    async def close(self) -> None:
        await self._server.close()
        self._openvpn.close()

    def _ask(self, questions: bytes, answers: bytes) -> float:
        began = time.perf_counter()
        self._openvpn.sendall(questions)
        received = b""
        while len(received) < len(answers):
            received += self._openvpn.recv(65536)
        took = time.perf_counter() - began
        assert sorted(received.split(b"\n")) == sorted(answers.split(b"\n")), received
        return took / _DECISIONS * 1000


def _question(cid: int) -> bytes:
    variables = {"username": _USER, "password": _PASSWORD, "common_name": "", "untrusted_ip": "192.0.2.2"}
    variables |= {f"variable_{number}": "as long as they are" for number in range(_VARIABLES)}
    lines = [f">CLIENT:CONNECT,{cid},1", *(f">CLIENT:ENV,{name}={value}" for name, value in variables.items())]
    return "".join(f"{line}\r\n" for line in [*lines, ">CLIENT:ENV,END"]).encode()


def _farewell(cid: int) -> bytes:
    return b"SUCCESS: client-auth command succeeded\r\n>CLIENT:DISCONNECT,%d\r\n>CLIENT:ENV,END\r\n" % cid


def _scripts(directory: Path) -> tuple[Path, Path]:
    shell, python = directory / "verify.sh", directory / "verify.py"
    shell.write_text(_SHELL)
    python.write_text(_PYTHON.format(interpreter=Path(sys.executable).resolve()))
    for script in (shell, python):
        script.chmod(stat.S_IRWXU)
    (directory / "logins").write_text("".join(f"user{number}:{_PASSWORD}\n" for number in range(_LOGINS)))
    (directory / "asked").write_text(f"{_USER}\n{_PASSWORD}\n")
    return shell, python


def _spawned(script: Path, directory: Path) -> Callable[[], Any]:
    environment = {"LOGINS": str(directory / "logins"), "PATH": "/usr/bin:/bin"}
    environment |= {f"variable_{number}": "as long as they are" for number in range(_VARIABLES)}

    def run() -> float:
        began = time.perf_counter()
        for _ in range(_SCRIPTS):
            pid = os.posix_spawn(script, [str(script), str(directory / "asked")], environment)
            _, status = os.waitpid(pid, 0)
            assert os.waitstatus_to_exitcode(status) == 0
        return (time.perf_counter() - began) / _SCRIPTS * 1000

    async def per_decision() -> float:
        return await asyncio.to_thread(run)

    return per_decision


class _Started:
    """Counts the processes that this one starts from now on, by the interpreter's audit events."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()
        sys.addaudithook(self._seen)

    def _seen(self, event: str, arguments: Any) -> None:
        if event in ("os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "subprocess.Popen"):
            with self._lock:
                self.count += 1
