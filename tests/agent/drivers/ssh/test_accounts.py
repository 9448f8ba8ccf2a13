"""The account files under kills and beside other writers."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from agent.drivers.base import DriverError
from agent.drivers.ssh.accounts import Accounts
from tests.support.openssh import alice, own_etc, text_of

pytestmark = pytest.mark.netns

WRITER = """
import asyncio, sys
from agent.drivers.ssh.accounts import Accounts
from tests.support.openssh import alice

async def main():
    accounts = Accounts()
    print("begins", flush=True)
    while True:
        await accounts.put([alice(f"user{number}") for number in range(300)])
        await accounts.remove([f"user{number}" for number in range(0, 300, 2)])

asyncio.run(main())
"""


@pytest.fixture
def etc(tmp_path: Path) -> Iterator[Path]:
    with own_etc(tmp_path / "etc"):
        yield tmp_path / "etc"


def test_a_writer_that_is_killed_leaves_whole_files(etc: Path) -> None:
    accounts = Accounts()
    asyncio.run(accounts.prepare())
    before = [set(text_of(name).splitlines()) for name in ("passwd", "shadow")]
    for _ in range(8):
        with subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"begins\n"
            time.sleep(random.uniform(0, 0.15))
            writer.send_signal(signal.SIGKILL)

        for name, lines in zip(("passwd", "shadow"), before, strict=True):
            text = text_of(name)
            assert text.endswith("\n")
            assert lines <= set(text.splitlines())
            assert all(line in lines or line.startswith("user") for line in text.splitlines())
        assert asyncio.run(accounts.put([alice()])) == {}
        found = asyncio.run(accounts.read())
        # No login is there without its hash: else it would be one that nobody has asked for.
        assert all(each.secret.startswith("$y$") for each in found.values())
        asyncio.run(accounts.remove(list(found)))
        # Between the two files it leaves lines of nobody in shadow, which the next login of the name takes over.
        assert set(text_of("passwd").splitlines()) == before[0]


def test_a_line_that_a_kill_left_in_shadow_is_taken_over(etc: Path) -> None:
    accounts = Accounts()
    with (etc / "shadow").open("a") as file:
        file.write("alice:$y$old:1::::::\n")

    asyncio.run(accounts.put([alice()]))

    assert text_of("shadow").count("\nalice:") == 1
    assert asyncio.run(accounts.read())["alice"].secret == alice().secret


def test_it_waits_for_the_lock_of_others(etc: Path) -> None:
    """lckpwdf(3), as passwd, useradd and vipw hold it."""
    accounts = Accounts()
    asyncio.run(accounts.prepare())
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import ctypes, sys; assert ctypes.CDLL(None).lckpwdf() == 0; print(1, flush=True); sys.stdin.read()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdout.readline()
    released: list[float] = []

    def release() -> None:
        released.append(time.monotonic())
        holder.stdin.close()  # type: ignore[union-attr]

    timer = threading.Timer(0.5, release)
    timer.start()

    assert asyncio.run(accounts.put([alice()])) == {}

    assert time.monotonic() > released[0]
    holder.wait()
    holder.stdout.close()
    timer.join()


@pytest.mark.parametrize("line", ["skynetvpn-ssh:x:1234:", "other:x:1900000000:"])
def test_a_group_of_somebody_else_is_named(etc: Path, line: str) -> None:
    with (etc / "group").open("a") as file:
        file.write(f"{line}\n")

    with pytest.raises(DriverError, match=line.partition(":")[0]):
        asyncio.run(Accounts().put([alice()]))


def test_a_file_that_cannot_be_replaced_is_named(etc: Path) -> None:
    accounts = Accounts()
    asyncio.run(accounts.prepare())
    (etc / ".shadow.skynetvpn").symlink_to("/nowhere")
    before = text_of("passwd", "shadow")

    with pytest.raises(DriverError, match=r"\.shadow\.skynetvpn"):
        asyncio.run(accounts.put([alice()]))

    assert text_of("passwd", "shadow") == before


def test_the_last_day_of_a_login_is_set_and_taken_away(etc: Path) -> None:
    accounts = Accounts()
    asyncio.run(accounts.put([msgspec.structs.replace(alice(), not_after=20_000 * 86400 + 5)]))

    assert asyncio.run(accounts.logins())["alice"].last_day == 20_000
    asyncio.run(accounts.put([alice()]))
    assert asyncio.run(accounts.logins())["alice"].last_day is None
