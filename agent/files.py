"""Private files: 0600 in a 0700 directory, written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from agent.errors import AgentError


def make_private_directory(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if exposed(path):
        raise AgentError(f"{path} can be read by others: run chmod 700 {path}")


def exposed(path: Path) -> bool:
    """Whether anybody but the owner may do anything with it."""
    return bool(stat.S_IMODE(path.stat().st_mode) & 0o077)


def read_private(path: Path) -> bytes:
    """Read a secret; raise AgentError where it is missing, or where others could have read it."""
    try:
        if exposed(path):
            raise AgentError(f"{path} can be read by others: run chmod 600 {path}, and consider its secret known")
        return path.read_bytes()
    except OSError as error:
        raise AgentError(f"{path}: {error.strerror}") from error


def write_private(path: Path, data: bytes) -> None:
    """Replace the file in one step, so that a crash leaves the old content or the new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise AgentError(f"{path}: {error.strerror}") from error


def sync_directory(path: Path) -> None:
    sync(path, os.O_DIRECTORY)


def sync(path: Path, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the state directory; one process at a time writes there and on the host."""
    with (directory / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AgentError(
                f"{directory} is in use by a running agent: stop it first (its tunnels stay up meanwhile)"
            ) from error
        yield
