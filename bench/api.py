"""Row 7: GET /api/servers/{id} with a token, against the twin and against our own bare handler.

Each server has core 0 for itself while it is asked, wrk has core 1.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import venv
from bench.harness import Goal, Result, compared, interleaved, not_measured
from bench.stack import API_PORT, Stack
from tests.support.netns import Namespace, wait_until

ROW = "api"
_MEASURE = "GET /api/servers/{id} with a token"
_SERVER_CORE, _LOAD_CORE = 0, 1
_TWIN_PORT, _BARE_PORT = 8081, 8082
_CONNECTIONS = 32
_ROOT = Path(__file__).resolve().parent.parent
_RATE = re.compile(r"Requests/sec:\s*([0-9.]+)")
_BAD = re.compile(r"Non-2xx or 3xx responses: (\d+)|Socket errors: (.*)")


def measure(*, quick: bool) -> list[Result]:
    if shutil.which("wrk") is None:
        return [not_measured(ROW, _MEASURE, "wrk is not installed")]
    if (os.cpu_count() or 1) < 2:
        return [not_measured(ROW, _MEASURE, "server and load need a core each")]
    try:
        interpreter = venv.python("bench")
    except (RuntimeError, OSError) as error:
        return [not_measured(ROW, _MEASURE, f"the twin cannot be installed: {error}")]
    with ExitStack() as exits:
        stack = exits.enter_context(Stack(core=_SERVER_CORE))
        place = stack.controller.namespace
        answer = stack.call("GET", f"/api/servers/{stack.server_id}")
        twin_id, twin_token = _start_twin(place, stack.directory, interpreter)
        _start_bare(place, stack.directory, json.dumps(answer, separators=(",", ":")))
        seconds, pairs = (2, 2) if quick else (4, 7)

        def asked(port: int, server_id: str, token: str) -> Any:
            async def rate() -> float:
                return _wrk(place, f"http://127.0.0.1:{port}/api/servers/{server_id}", token, seconds)

            return rate

        ours = asked(API_PORT, stack.server_id, stack.token)
        against_twin = asyncio.run(interleaved(ours, asked(_TWIN_PORT, twin_id, twin_token), pairs))
        against_bare = asyncio.run(interleaved(ours, asked(_BARE_PORT, stack.server_id, stack.token), pairs))
    return [
        compared(
            ROW,
            _MEASURE,
            "requests/s",
            against_twin,
            against="FastAPI + PyJWT + async ORM + pydantic",
            goal=Goal(at_least=10),
        ),
        compared(
            ROW, _MEASURE, "requests/s", against_bare, against="our own bare aiohttp handler", goal=Goal(at_least=0.7)
        ),
    ]


def _start_twin(place: Namespace, directory: Path, interpreter: str) -> tuple[str, str]:
    """Fill the twin's database and serve it; return a server's id and a token."""
    environment = {"DATABASE": str(directory / "twin.db"), "SECRET": secrets.token_hex(32), "PYTHONPATH": str(_ROOT)}
    filled = subprocess.run(
        (interpreter, "-m", "bench.peers.twin"),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    server_id, token = filled.stdout.split()
    options = ("--port", str(_TWIN_PORT), "--no-access-log", "--loop", "uvloop", "--http", "httptools")
    with (directory / "twin.log").open("wb") as log:
        place.popen(
            *("taskset", "-c", str(_SERVER_CORE), interpreter, "-m", "uvicorn", "bench.peers.twin:app", *options),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    _wait_for(place, _TWIN_PORT, server_id, token)
    return server_id, token


def _start_bare(place: Namespace, directory: Path, body: str) -> None:
    with (directory / "bare.log").open("wb") as log:
        place.popen(
            *("taskset", "-c", str(_SERVER_CORE), sys.executable, "-m", "bench.peers.bare", str(_BARE_PORT), body),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    _wait_for(place, _BARE_PORT, "any", "none")


def _wait_for(place: Namespace, port: int, server_id: str, token: str) -> None:
    url = f"http://127.0.0.1:{port}/api/servers/{server_id}"
    asking = ("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-H", f"Authorization: Bearer {token}", url)
    wait_until(lambda: place.run(*asking, check=False) == "200", 30)


def _wrk(place: Namespace, url: str, token: str, seconds: int) -> float:
    """Requests per second; an answer that is not 200 is a failure of the measurement."""
    load = ("taskset", "-c", str(_LOAD_CORE), "wrk", "-t1", f"-c{_CONNECTIONS}", f"-d{seconds}s")
    told = place.run(*load, "-H", f"Authorization: Bearer {token}", url, timeout=seconds + 30)
    found = _RATE.search(told)
    if found is None or _BAD.search(told):
        raise RuntimeError(f"wrk {url}: {told}")
    return float(found[1])
