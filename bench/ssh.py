"""SSH: a thousand logins pushed at once, against a shell loop; and a kick, until the far end sees the traffic end.

The loop is what an admin would write: `useradd`, then `chpasswd -e`, for each name of a list. Both sides start from the
same /etc, a copy that nobody else sees.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from agent.drivers.ssh import Ssh
from agent.drivers.ssh.accounts import Accounts
from bench.harness import Goal, Ratio, Result, absolute, compared, interleaved, percentile
from tests.support.openssh import FAR, SPEC, Net, alice, connect, network, own_etc

ROW = "ssh"
_PORT = 7100
_LOOP = """while read -r name; do
  useradd --no-create-home --no-user-group --shell /usr/sbin/nologin "$name" || exit 1
  printf '%s:%s\\n' "$name" "$HASH" | chpasswd --encrypted || exit 1
done"""
_FILES = [Path("/etc", name) for name in ("passwd", "shadow", "group", "gshadow", "subuid", "subgid")]


def measure(*, quick: bool) -> list[Result]:
    users, pairs, kicks = (50, 1, 5) if quick else (1000, 2, 100)
    with tempfile.TemporaryDirectory(prefix="skynetvpn-bench-") as name, own_etc(Path(name) / "etc"):
        pushed = asyncio.run(_push(users, pairs))
    with tempfile.TemporaryDirectory(prefix="skynetvpn-bench-") as name, network(Path(name)) as net:
        ended = asyncio.run(_kick(net, kicks))
    measure = "kick at the driver → traffic of the session ends at its far end"
    return [
        compared(
            ROW,
            f"{users:,} logins pushed at once",
            "s",
            pushed,
            against="a shell loop of useradd and chpasswd",
            kind=Ratio.FASTER,
            goal=Goal(at_least=3),
        ),
        absolute(ROW, f"{measure}, p50", "ms", percentile(ended, 0.5)),
        absolute(ROW, f"{measure}, p99", "ms", percentile(ended, 0.99), goal=Goal(at_most=300)),
    ]


async def _push(users: int, pairs: int) -> list[tuple[float, float]]:
    names = [f"user{number}" for number in range(users)]
    accounts = Accounts()
    await accounts.prepare()
    before = {path: path.read_bytes() for path in _FILES}

    def reset() -> None:
        for path, content in before.items():
            path.write_bytes(content)

    async def ours() -> float:
        reset()
        credentials = [alice(name) for name in names]
        began = time.perf_counter()
        refused = await accounts.put(credentials)
        took = time.perf_counter() - began
        if refused or len(await accounts.read()) != users:
            raise RuntimeError(f"{len(refused)} logins were refused")
        return took

    async def theirs() -> float:
        reset()
        return await asyncio.to_thread(_loop, names)

    return await interleaved(ours, theirs, pairs, warm_up=0)


def _loop(names: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(
        ["/bin/sh", "-c", _LOOP],
        input="".join(f"{name}\n" for name in names),
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HASH": alice().secret},
        text=True,
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - began


async def _kick(net: Net, kicks: int) -> list[float]:
    """Milliseconds of each."""
    driver = net.driver()
    await driver.ensure(SPEC)
    await driver.put([alice()])
    try:
        return [await _one_kick(net, driver) for _ in range(kicks)]
    finally:
        await driver.stop()
        await driver.close()


async def _one_kick(net: Net, driver: Ssh) -> float:
    """A client sends without end; the far end notes when nothing comes any more."""
    flowing, ended = asyncio.Event(), asyncio.Event()

    async def receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):
                flowing.set()
        ended.set()
        writer.close()

    listening = await asyncio.start_server(receive, sock=await asyncio.to_thread(_listen, net))
    client = net.ssh("-L", f"127.0.0.1:{_PORT}:{FAR}:{_PORT}")
    sending = asyncio.create_task(_send(net))
    try:
        async with asyncio.timeout(30):
            await flowing.wait()
            (session,) = [each for each in await driver.sessions() if not each.ended]
            began = time.perf_counter()
            await driver.kick(session.id)
            await ended.wait()
            return (time.perf_counter() - began) * 1000
    finally:
        listening.close()
        await asyncio.to_thread(net.client.end, client)
        await sending


async def _send(net: Net) -> None:
    opened = await asyncio.to_thread(_connect, net)
    with opened:
        opened.setblocking(False)
        with contextlib.suppress(ConnectionError):
            while True:
                await asyncio.get_running_loop().sock_sendall(opened, bytes(65536))


def _connect(net: Net) -> socket.socket:
    """Once the client listens."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return connect(net.client, _PORT)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _listen(net: Net) -> socket.socket:
    with net.far.entered():
        return socket.create_server((FAR, _PORT))
