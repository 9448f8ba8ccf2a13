"""What the client keeps between two commands: the login session, WireGuard keys and the tunnels it brought up."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Self, TypeVar

import msgspec

from agent import files
from agent.client.errors import Failure, NotLoggedIn
from shared.keys import InvalidKey, PrivateKey

_PROGRAM = "skynetvpn"
_POLL_SECONDS = 0.1

T = TypeVar("T")


class Session(msgspec.Struct, frozen=True):
    url: str
    username: str
    token: str
    expires_at: str
    ca: str | None = None

    def __repr__(self) -> str:
        return f"Session(url={self.url!r}, username={self.username!r})"


class LocalTunnel(msgspec.Struct, frozen=True):
    """A tunnel of this machine, written down before it exists so that nothing is left without an owner."""

    connection_id: str
    server_id: str
    server: str
    interface: str  # or, of SSH, where its SOCKS proxy listens
    backend: str  # as asked for at first, then the one that was taken
    key_file: str  # of the WireGuard key, or the program's secret configuration
    addresses: tuple[str, ...] = ()
    endpoint: str = ""
    netns: str | None = None
    resolver: str | None = None  # how names were set: the way back at disconnect
    protocol: str = "wireguard"

    @property
    def is_proxy(self) -> bool:
        return ":" in self.interface


class Profile:
    """Two private directories: what a person would move to a new machine, and the state of this one."""

    def __init__(self, config: Path, state: Path) -> None:
        self.config = config
        self.state = state

    @classmethod
    def of_user(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """The directories of the XDG Base Directory Specification."""
        home = Path(environ.get("HOME") or Path.home())
        config = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
        state = Path(environ.get("XDG_STATE_HOME") or home / ".local" / "state")
        return cls(config / _PROGRAM, state / _PROGRAM)

    def session(self) -> Session | None:
        path = self.config / "session.json"
        return _read(path, Session) if path.exists() else None

    def require_session(self) -> Session:
        session = self.session()
        if session is None or not session.token:
            raise NotLoggedIn("not logged in: run skynetvpn login")
        return session

    def save_session(self, session: Session) -> None:
        _write(self.config / "session.json", session)

    def forget_session(self) -> None:
        """Forget the token, keep where it was: the next login goes to the same controller."""
        session = self.session()
        if session is not None:
            self.save_session(msgspec.structs.replace(session, token="", expires_at=""))

    def key_file(self, server_id: str) -> Path:
        return self.config / "keys" / f"{_file_name(server_id)}.key"

    def program_file(self, connection_id: str) -> Path:
        """Where the secrets for the program of one connection go; its other files have longer names."""
        return self.state / "programs" / _file_name(connection_id)

    def tunnels(self) -> list[LocalTunnel]:
        directory = self.state / "tunnels"
        return [_read(path, LocalTunnel) for path in sorted(directory.glob("*.json"))]

    def save_tunnel(self, tunnel: LocalTunnel) -> None:
        _write(self._tunnel_path(tunnel.connection_id), tunnel)

    @contextlib.asynccontextmanager
    async def alone(self, waiting: Callable[[], None]) -> AsyncIterator[None]:
        """One process at a time brings a tunnel up: another one would take its name, or clear it away as a leftover.

        `waiting` is called while another process has the turn, which ends with that process at the latest.
        """
        directory = self.state / "tunnels"
        files.make_private_directory(directory)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            while not _locked(descriptor):
                waiting()
                await asyncio.sleep(_POLL_SECONDS)
            yield
        finally:
            os.close(descriptor)

    def forget_tunnel(self, connection_id: str) -> None:
        self._tunnel_path(connection_id).unlink(missing_ok=True)

    def _tunnel_path(self, connection_id: str) -> Path:
        return self.state / "tunnels" / f"{_file_name(connection_id)}.json"


def load_or_make_key(path: Path) -> PrivateKey:
    """Read a WireGuard private key (base64, as wg genkey writes it), or make one there."""
    if not path.exists():
        key = PrivateKey.generate()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.write_private(path, f"{key.reveal()}\n".encode())
        return key
    try:
        return PrivateKey.parse(files.read_private(path).decode("ascii").strip())
    except (InvalidKey, UnicodeDecodeError) as error:
        raise Failure(f"{path} holds no WireGuard private key: move it away and a new one is made") from error


def _file_name(id: str) -> str:
    """An id of the server as a file name; it is the controller's text, so it must not lead elsewhere."""
    if not id or not all(letter.isalnum() or letter in "-_" for letter in id):
        raise Failure(f"the controller sent the id {id!r}, which is none")
    return id


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(path: Path, type_: type[T]) -> T:
    try:
        return msgspec.json.decode(files.read_private(path), type=type_)
    except msgspec.MsgspecError as error:
        raise Failure(f"{path} is damaged ({error}): delete it") from error


def _write(path: Path, value: msgspec.Struct) -> None:
    files.make_private_directory(path.parent)
    files.write_private(path, msgspec.json.encode(value))
