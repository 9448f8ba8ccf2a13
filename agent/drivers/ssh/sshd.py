"""The process of our sshd: its files, its start, its change of settings, its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from agent.drivers import commands
from agent.drivers.base import DriverError, Unsupported
from agent.drivers.ssh import config, processes
from agent.errors import AgentError
from agent.files import make_private_directory, write_private
from shared.services import SshServer

PROGRAM = "/usr/sbin/sshd"
_KEYS: Mapping[str, Callable[[], Ed25519PrivateKey | ec.EllipticCurvePrivateKey]] = {
    "ssh_host_ed25519_key": Ed25519PrivateKey.generate,
    "ssh_host_ecdsa_key": lambda: ec.generate_private_key(ec.SECP256R1()),
}
_PRIVILEGE_SEPARATION = Path("/run/sshd")  # Debian's sshd needs it; the admin's service makes it, and removes it
_PATIENCE = 10.0  # seconds until a started sshd listens, or one that was told to end is gone
_MAX_LOG_BYTES = 1 << 20
_FATAL = ("Cannot bind any address", "fatal:")


class Sshd:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.config = directory / "sshd_config"
        self._running = directory / "sshd_config.running"  # what the sshd that runs has read
        self._pid_file = directory / "sshd.pid"
        self.log = directory / "sshd.log"
        self.listener: int | None = None

    async def host_keys(self) -> list[str]:
        return await asyncio.to_thread(self._host_keys)

    async def ensure(self, spec: SshServer, *, group: str, key_directory: Path) -> None:
        """Start sshd, adopt the one that runs, or have it take over other settings."""
        if await asyncio.to_thread(shutil.which, PROGRAM) is None:
            raise Unsupported(f"{PROGRAM} (Debian package openssh-server) is not installed on this host")
        await self.host_keys()
        wanted = config.render(
            spec,
            group=group,
            host_keys=[self._directory / name for name in _KEYS],
            key_directory=key_directory,
            pid_file=self._pid_file,
        )
        await asyncio.to_thread(_make_privilege_separation)
        await self._find()
        if self.listener is None or await asyncio.to_thread(_text, self._running) != wanted:
            await self._run(wanted, spec.port)
        await asyncio.to_thread(self._log_size)

    async def end(self) -> None:
        """End it, and take its files away but the host keys; its sessions live on."""
        await self._find()
        if self.listener is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.listener, signal.SIGTERM)
            deadline = time.monotonic() + _PATIENCE
            while await asyncio.to_thread(processes.is_listener, self.listener, self.config):
                if time.monotonic() > deadline:
                    raise DriverError(f"sshd (process {self.listener}) does not end")
                await asyncio.sleep(0.01)
            self.listener = None
        for path in (self.config, self._running, self._pid_file, self.log):
            await asyncio.to_thread(path.unlink, missing_ok=True)

    async def _find(self) -> None:
        if self.listener is None or not await asyncio.to_thread(processes.is_listener, self.listener, self.config):
            self.listener = await asyncio.to_thread(processes.find_listener, self.config)

    async def _run(self, wanted: str, port: int) -> None:
        """Have an sshd run with this configuration; where it cannot, the one that ran before runs on."""
        await self._check(wanted)
        before = await asyncio.to_thread(_text, self._running)
        # An agent that was killed while it changed the settings has left the new ones in the file, and none as read.
        ours = (before + await asyncio.to_thread(_text, self.config)).split("\n")
        if self.listener is None or f"Port {port}" not in ours:
            await asyncio.to_thread(_check_port, port)
        try:
            await self._load(wanted)
        except DriverError:
            if before and before != wanted:
                with contextlib.suppress(DriverError):  # the first error is the one to tell
                    await self._load(before)
            raise

    async def _check(self, wanted: str) -> None:
        candidate = self.config.with_suffix(".new")
        await asyncio.to_thread(_write, candidate, wanted)
        try:
            await commands.run([PROGRAM, "-t", "-f", str(candidate)])
        finally:
            candidate.unlink(missing_ok=True)

    async def _load(self, text: str) -> None:
        """Start sshd, or let the one that runs read its file again: its process and sessions stay the same."""
        await asyncio.to_thread(_write, self.config, text)
        await asyncio.to_thread(self._running.unlink, missing_ok=True)
        await asyncio.to_thread(self._pid_file.unlink, missing_ok=True)
        written = await asyncio.to_thread(self._log_size)
        if self.listener is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.listener, signal.SIGHUP)
        else:
            await commands.run([PROGRAM, "-f", str(self.config), "-E", str(self.log)])
        try:
            self.listener = await self._listening(written)
        except DriverError:
            self.listener = await asyncio.to_thread(processes.find_listener, self.config)
            raise
        await asyncio.to_thread(_write, self._running, text)

    async def _listening(self, written: int) -> int:
        """Wait until sshd has opened its port, which is when it writes its number; raise with what it says."""
        deadline = time.monotonic() + _PATIENCE
        while not (pid := await asyncio.to_thread(_text, self._pid_file)).endswith("\n"):
            words = await asyncio.to_thread(self._log_since, written)
            if any(sign in words for sign in _FATAL) or time.monotonic() > deadline:
                raise DriverError(f"sshd does not start: {words or 'it says nothing'}")
            await asyncio.sleep(0.01)
        return int(pid)

    def _host_keys(self) -> list[str]:
        try:
            make_private_directory(self._directory)
            found = []
            for name, generate in _KEYS.items():
                path = self._directory / name
                if not path.exists():
                    key = generate().private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
                    write_private(path, key)
                public = load_ssh_private_key(path.read_bytes(), None).public_key()
                found.append(public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())
            return found
        except (AgentError, OSError, ValueError) as error:
            raise DriverError(f"host keys of sshd: {error}") from error

    def _log_size(self) -> int:
        """Where the log ends; one that has grown large is emptied."""
        with contextlib.suppress(FileNotFoundError):
            size = self.log.stat().st_size
            if size <= _MAX_LOG_BYTES:
                return size
            os.truncate(self.log, 0)
        return 0

    def _log_since(self, offset: int) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self.log.read_bytes()[offset:].decode(errors="replace").replace("\r\n", "; ").strip("; ")
        return ""


def _check_port(port: int) -> None:
    """Ask the kernel before anything is changed; sshd would go on with one IP version if it has only that."""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):  # noqa: S104
        try:
            with socket.socket(family, socket.SOCK_STREAM) as opened:
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                opened.bind((address, port))
                opened.listen(1)
        except OSError as error:
            if error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                continue  # this host has no such addresses
            raise DriverError(f"sshd cannot have TCP port {port} of this host: {error.strerror}") from error


def _make_privilege_separation() -> None:
    try:
        _PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)
    except OSError as error:
        raise DriverError(f"{_PRIVILEGE_SEPARATION}, which sshd needs: {error.strerror}") from error


def _write(path: Path, text: str) -> None:
    try:
        write_private(path, text.encode())
    except AgentError as error:
        raise DriverError(str(error)) from error


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise DriverError(f"{path}: {error.strerror}") from error
