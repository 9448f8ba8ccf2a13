"""Programs: their words on failure, their end in time, and nothing else of ours in their hands."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from agent.drivers import commands
from agent.drivers.base import DriverError, Unsupported


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


async def test_the_output_is_returned_and_stdin_is_passed() -> None:
    assert await commands.run(script("print(input()[::-1])"), stdin="abc\n") == "cba\n"


async def test_a_failure_has_the_programs_words_and_not_its_input() -> None:
    with pytest.raises(DriverError, match=r"exit 3.*no such rule") as caught:
        await commands.run(script("import sys; sys.stderr.write('no such rule'); sys.exit(3)"), stdin="secret")
    assert "secret" not in str(caught.value)


async def test_a_program_ended_by_a_signal_is_a_failure() -> None:
    with pytest.raises(DriverError, match="SIGKILL"):
        await commands.run(script("import os; os.kill(os.getpid(), 9)"))


async def test_a_missing_program_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="no-such-program is not installed"):
        await commands.run(["no-such-program"])


async def test_a_program_that_cannot_be_started_says_why(tmp_path: Path) -> None:
    with pytest.raises(DriverError, match="Permission denied"):
        await commands.run([str(tmp_path)])


async def test_a_program_that_does_not_end_is_killed_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    text = (
        "import os, pathlib, time\n"
        "child = os.fork()\n"
        f"child and pathlib.Path({str(pids)!r}).write_text(f'{{os.getpid()}} {{child}}')\n"
        "time.sleep(60)"
    )
    with pytest.raises(DriverError, match=r"did not end within 2 s"):
        await commands.run(script(text), timeout=2)

    async with asyncio.timeout(10):
        while any(is_running(int(pid)) for pid in pids.read_text().split()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_the_agents_environment_stays_with_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYNETVPN_AGENT_TOKEN", "secret")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    printed = await commands.run(
        script("import os; print(dict(os.environ)['LC_ALL'], 'SKYNETVPN_AGENT_TOKEN' in os.environ)")
    )
    assert printed == "C False\n"


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z" and os.getpid() != pid
