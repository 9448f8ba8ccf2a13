"""The controller's own processes on a PostgreSQL that goes away and comes back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import aiohttp
import pytest
import yaml

from tests.support.postgresql import Cluster

PASSWORD = "correct horse battery"
SECONDS = 60.0 * int(os.environ.get("SKYNETVPN_TEST_SLOWDOWN", "1"))


@pytest.fixture
def engine() -> str:
    return "postgresql"


@pytest.fixture
async def directory(tmp_path: Path, empty_url: str) -> Path:
    """As docs/operations.md has it: init, then the URL in the settings."""
    made = tmp_path / "controller"
    status, _ = await controller("init", "--dir", str(made), "--listen", free(), "--node-listen", free())
    assert status == 0
    path = made / "controller.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"database_url": empty_url}))
    return made


def free() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


async def controller(*arguments: str, stdin: str = "", environ: Mapping[str, str] = {}) -> tuple[int | None, str]:
    """Its exit status and what it said on standard error."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "controller", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environ},
    )
    _, errors = await process.communicate(stdin.encode())
    return process.returncode, errors.decode()


@pytest.fixture
async def api(directory: Path) -> AsyncIterator[str]:
    """The running controller's address."""
    settings = str(directory / "controller.yaml")
    add = ("user", "add", "alice", "--email", "alice@example.org", "--password-stdin", "--config", settings)
    assert await controller(*add, stdin=PASSWORD) == (0, "")
    with (directory / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "controller", "run", "--config", settings), stderr=log
        )
    try:
        yield "http://" + yaml.safe_load((directory / "controller.yaml").read_text())["listen"]
        assert process.returncode is None
        process.terminate()
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def becomes(session: aiohttp.ClientSession, url: str, status: int) -> None:
    async with asyncio.timeout(SECONDS):
        while True:
            with contextlib.suppress(aiohttp.ClientConnectionError):  # it does not listen yet
                async with session.get(url) as answer:
                    if answer.status == status:
                        return
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["stopped", "crashed"])
async def test_it_answers_503_while_the_server_is_away_and_goes_on_by_itself(
    cluster: Cluster, api: str, directory: Path, how: signal.Signals
) -> None:
    async with aiohttp.ClientSession() as session:

        async def login() -> tuple[int, str | None]:
            credentials = {"username": "alice", "password": PASSWORD}
            async with session.post(f"{api}/skynet/api/auth/login", json=credentials) as answer:
                return answer.status, answer.headers.get("Retry-After")

        await becomes(session, f"{api}/readyz", 200)
        assert (await login())[0] == 200
        await asyncio.to_thread(cluster.stop, how)
        try:
            await becomes(session, f"{api}/readyz", 503)
            status, retry_after = await login()
            assert status == 503 and retry_after is not None
            await becomes(session, f"{api}/healthz", 200)
        finally:
            cluster.start()
        await becomes(session, f"{api}/readyz", 200)
        assert (await login())[0] == 200
    told = (directory / "log").read_text()
    assert "Traceback" not in told
    assert (told.count("store.connect_failed"), told.count("store.connect_restored")) == (1, 1)


@pytest.mark.parametrize("command", [("run",), ("user", "list")])
async def test_a_server_that_cannot_be_used_is_told_in_few_words(directory: Path, command: tuple[str, ...]) -> None:
    environ = {"SKYNETVPN_DATABASE_URL": f"postgresql+asyncpg://u:s3cr3t@/d?host={directory}"}
    status, errors = await controller(*command, "--config", str(directory / "controller.yaml"), environ=environ)
    assert status == 1
    [line] = errors.splitlines()
    assert line.startswith("skynetvpn-controller: the database is not available: ")
    assert line.count("No such file or directory") == 1 and "s3cr3t" not in line
