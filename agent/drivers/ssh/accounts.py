"""The tunnel logins as system accounts: /etc/passwd, /etc/shadow and the key files.

Both files are written here, not by useradd(8): a change of any size is one exchange of each file, and the cost of a
thousand logins is that of one. What useradd does for safety is done here: lckpwdf(3)'s lock, which all of its family
takes, keeps other writers out; each file is written beside the old one, synced, and renamed over it with the old one's
owner and mode; a crash leaves each file whole. The new text is read again before it replaces anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from agent.drivers import commands
from agent.drivers.base import DriverError
from agent.drivers.ssh.config import parse_keys, render_keys
from agent.drivers.ssh.passwd import GID, GROUP, UIDS, Login, parse, passwd_line, replace, shadow_line
from agent.drivers.ssh.passwd import Accounts as Known
from shared.access import Credential
from shared.resource import InvalidResource, Protocol

_ETC = Path("/etc")
_PATIENCE = 15.0  # seconds, as lckpwdf(3) waits
_DAY = 86400
# sshd reads a key file with the rights of its user: it must be able to get there, and public keys are no secret.
_OPEN_DIRECTORY, _OPEN_FILE = 0o755, 0o644

T = TypeVar("T")


class Accounts:
    key_directory = _ETC / "skynetvpn-ssh" / "keys"

    async def prepare(self) -> None:
        """Make the group and the directory of keys; raise DriverError where the group is somebody else's."""
        if await asyncio.to_thread(_translated, self._prepared):
            return
        await commands.run(["groupadd", "--gid", str(GID), GROUP])

    async def read(self) -> dict[str, Credential]:
        return await asyncio.to_thread(_translated, self._read)

    async def logins(self) -> Mapping[str, Login]:
        return await asyncio.to_thread(_translated, lambda: self._known().ours)

    async def put(self, credentials: Sequence[Credential]) -> dict[str, str]:
        """Add or change; return why some were not. Raises DriverError where none could be."""
        await self.prepare()
        return await asyncio.to_thread(_translated, lambda: self._put(credentials))

    async def remove(self, names: Sequence[str]) -> dict[str, Login]:
        """Delete those that are ours; return what they were."""
        return await asyncio.to_thread(_translated, lambda: self._remove(names))

    async def remove_all(self) -> None:
        """Delete all of ours, the group, and the directory of keys."""
        await self.remove(list(await self.logins()))
        await asyncio.to_thread(shutil.rmtree, self.key_directory.parent, ignore_errors=True)
        if await asyncio.to_thread(_translated, self._has_group):
            await commands.run(["groupdel", GROUP])

    # --- in a thread ---

    def _prepared(self) -> bool:
        self.key_directory.mkdir(mode=_OPEN_DIRECTORY, parents=True, exist_ok=True)
        for directory in (self.key_directory.parent, self.key_directory):
            directory.chmod(_OPEN_DIRECTORY)
        return self._has_group()

    def _has_group(self) -> bool:
        for line in (_ETC / "group").read_text(errors="surrogateescape").split("\n"):
            name, _, rest = line.partition(":")
            gid = rest.split(":")[1] if ":" in rest else ""
            if name == GROUP and gid != str(GID):
                raise DriverError(f"group {GROUP} of this host has the number {gid}, not {GID}: rename or remove it")
            if name != GROUP and gid == str(GID):
                raise DriverError(f"group number {GID} is {name} on this host: give that group another number")
            if name == GROUP:
                return True
        return False

    def _known(self) -> Known:
        return parse(self._text("passwd"), self._text("shadow"))

    def _read(self) -> dict[str, Credential]:
        keys = self._keys()
        return {
            name: Credential(
                protocol=Protocol.SSH,
                username=name,
                account=0,
                secret=login.secret,
                public_keys=keys.get(name, ()),
                tunnel=login.tunnel,
            )
            for name, login in self._known().ours.items()
        }

    def _keys(self) -> dict[str, tuple[str, ...]]:
        if not self.key_directory.is_dir():
            return {}
        with os.scandir(self.key_directory) as entries:
            return {
                entry.name: parse_keys(Path(entry.path).read_text(errors="replace"))
                for entry in entries
                if not entry.name.startswith(".")
            }

    def _put(self, credentials: Sequence[Credential]) -> dict[str, str]:
        with self._locked():
            known = self._known()
            wanted: dict[str, Credential] = {}
            refused: dict[str, str] = {}
            for credential in credentials:
                try:
                    credential.check()
                except InvalidResource as error:
                    refused[credential.username] = str(error)
                    continue
                if credential.username in known.foreign:
                    refused[credential.username] = (
                        f"{credential.username} is an account of this host that is not SkynetVPN's: use another name"
                    )
                else:
                    wanted[credential.username] = credential
            taken = set(known.uids)
            logins = {name: _login(each, known.ours.get(name), taken) for name, each in wanted.items()}
            for name, credential in wanted.items():
                self._write_keys(name, credential.public_keys)
            changed = {name: login for name, login in logins.items() if known.ours.get(name) != login}
            # An account is in passwd when it has its hash already.
            self._exchange("shadow", {name: shadow_line(login) for name, login in changed.items()})
            self._exchange("passwd", {name: passwd_line(login) for name, login in changed.items()})
            written = self._known().ours
            if any(written.get(name) != login for name, login in logins.items()):
                raise DriverError(f"{_ETC}/passwd and shadow do not say what was written there")
        return refused

    def _remove(self, names: Sequence[str]) -> dict[str, Login]:
        with self._locked():
            ours = self._known().ours
            gone = {name: ours[name] for name in names if name in ours}
            self._exchange("passwd", dict.fromkeys(gone, None))
            self._exchange("shadow", dict.fromkeys(gone, None))
            for name in gone:
                (self.key_directory / name).unlink(missing_ok=True)
        return gone

    def _write_keys(self, name: str, keys: Sequence[str]) -> None:
        """Not synced: after a crash of the host a file that is not whole is found by reading back, and written anew."""
        path = self.key_directory / name
        if not keys:
            path.unlink(missing_ok=True)
            return
        text = render_keys(keys)
        with contextlib.suppress(FileNotFoundError):
            if path.read_text(errors="replace") == text:
                return
        temporary = path.with_name(f".{name}")
        temporary.write_text(text)
        temporary.chmod(_OPEN_FILE)
        temporary.replace(path)

    def _text(self, name: str) -> str:
        return (_ETC / name).read_bytes().decode(errors="surrogateescape")

    def _exchange(self, name: str, lines: Mapping[str, str | None]) -> None:
        """Change lines of passwd or shadow; the caller holds the lock."""
        old = self._text(name)
        new = replace(old, lines)
        if not lines or new == old:
            return
        path = _ETC / name
        before = path.stat()
        temporary = _ETC / f".{name}.skynetvpn"  # one name: what a crash leaves is overwritten by the next
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
            os.fchown(file.fileno(), before.st_uid, before.st_gid)
            os.fchmod(file.fileno(), before.st_mode & 0o7777)
            file.write(new.encode(errors="surrogateescape"))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """lckpwdf(3), which glibc gives to one thread of a process only."""
        with os.fdopen(os.open(_ETC / ".pwd.lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb") as file:
            deadline = time.monotonic() + _PATIENCE
            while True:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except (BlockingIOError, PermissionError) as error:
                    if time.monotonic() > deadline:
                        raise DriverError(f"another program holds the lock of {_ETC}/passwd") from error
                    time.sleep(0.02)
            yield


def _login(credential: Credential, before: Login | None, taken: set[int]) -> Login:
    last_day = None if credential.not_after is None else max(0, credential.not_after // _DAY)
    uid, changed = (before.uid, before.changed) if before is not None else (_free_uid(taken), 0)
    if before is None or before.secret != credential.secret or not changed:
        changed = _today()
    return Login(credential.username, uid, credential.secret, changed, last_day, credential.tunnel)


def _free_uid(taken: set[int]) -> int:
    """Any free one: the next free one could be that of a login that has just gone, whose traffic is still counted."""
    while True:
        uid = UIDS[secrets.randbelow(len(UIDS))]
        if uid not in taken:
            taken.add(uid)
            return uid


def _today() -> int:
    return int(time.time() // _DAY)


def _translated(function: Callable[[], T]) -> T:
    try:
        return function()
    except OSError as error:
        raise DriverError(f"{error.filename or 'system accounts'}: {error.strerror}") from error
