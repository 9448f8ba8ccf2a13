"""A log on a disk that is full for a while."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from shared.logstream import LogStream

ROOT = Path(__file__).parents[2]


class Disk(io.RawIOBase):
    """With room for so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.data = b""

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        taken = bytes(memoryview(data)[: self.room])  # type: ignore[arg-type]
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.data += taken
        self.room -= len(taken)
        return len(taken)


def test_the_lost_lines_are_counted_when_there_is_room_again() -> None:
    disk = Disk(room=6)
    buffer = io.BufferedWriter(disk)
    log = LogStream(buffer)
    log.write("one\n")
    log.write(b"two\n")
    log.write(b"three\nfour\n")
    disk.room = 1000
    log.write(b"five\n")
    log.write(b"six\n")
    one, torn, lost, five, six = disk.data.splitlines()
    assert (one, torn, five, six) == (b"one", b"tw", b"five", b"six")
    told = json.loads(lost)
    assert (told["event"], told["lines"]) == ("log.lost", 3)


def test_a_closed_stream_is_no_error() -> None:
    stream = io.BytesIO()
    log = LogStream(stream)
    stream.close()
    log.write(b"one\n")
    log.flush()


@pytest.mark.parametrize("side", ["agent", "controller"])
def test_both_sides_log_to_a_full_disk_and_go_on(side: str) -> None:
    program = f"from {side} import log; import structlog, logging; log.configure('info'); "
    program += "structlog.get_logger().info('one'); logging.getLogger('x').error('two'); print('alive')"
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=full, timeout=60
        )
    assert (done.returncode, done.stdout) == (0, b"alive\n")


@pytest.mark.parametrize("side", ["agent", "controller"])
def test_libraries_and_both_sides_log_json_lines(side: str) -> None:
    program = f"from {side} import log; import structlog, logging; log.configure('info'); "
    program += "structlog.get_logger().info('one', a=1); logging.getLogger('lib').warning('two %s', 'words')\n"
    program += "try: 1 / 0\nexcept ZeroDivisionError: logging.getLogger('lib').exception('three')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60, check=True)
    one, two, three = map(json.loads, done.stderr.splitlines())
    assert (one["event"], one["level"], one["a"]) == ("one", "info", 1)
    assert (two["event"], two["level"], two["logger"]) == ("two words", "warning", "lib")
    assert three["level"] == "error" and "ZeroDivisionError" in three["exception"]
