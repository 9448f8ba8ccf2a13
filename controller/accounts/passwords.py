"""Password hashes: made and checked in a few threads, and refused when too many wait."""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import bcrypt
from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from controller.accounts.errors import PasswordsBusy
from controller.config import Passwords as Settings
from shared import crypt

RETRY_AFTER = 2  # seconds
_BCRYPT_BYTES = 72  # the rest was never part of the hash

T = TypeVar("T")


class Passwords:
    """Argon2id for new hashes; bcrypt ones of imported accounts are verified, and replaced at their next login."""

    def __init__(self, settings: Settings) -> None:
        self._argon2 = PasswordHasher(settings.time_cost, settings.memory_kib, settings.parallelism)
        self._pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="passwords")
        self._room = settings.workers + settings.queue

    async def hash(self, password: str) -> str:
        return await self._run(lambda: self._argon2.hash(_normal(password)))

    async def verify(self, hashed: str | None, password: str) -> bool:
        """Whether the password fits. None (no such account) costs the same time as a wrong password."""
        return await self._run(lambda: self._verify(hashed, _normal(password)))

    async def crypt(self, password: str, cost: int = 0) -> str:
        """A hash as hosts check it; `cost` and errors as of `shared.crypt.hash_password`."""
        return await self._run(lambda: crypt.hash_password(_normal(password).decode(), cost))

    def outdated(self, hashed: str) -> bool:
        """Whether the hash should be replaced while the password is at hand."""
        return _is_bcrypt(hashed) or self._argon2.check_needs_rehash(hashed)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _verify(self, hashed: str | None, password: bytes) -> bool:
        if hashed is None:
            self._argon2.hash(password)  # as long as to check one
            return False
        if _is_bcrypt(hashed):
            try:
                return b"\0" not in password and bcrypt.checkpw(password[:_BCRYPT_BYTES], hashed.encode())
            except ValueError:  # it only looks like one
                return False
        return self._check(hashed, password)

    def _check(self, hashed: str, password: bytes) -> bool:
        try:
            return self._argon2.verify(hashed, password)
        except (VerificationError, InvalidHashError):
            return False

    async def _run(self, work: Callable[[], T]) -> T:
        if self._room <= 0:
            raise PasswordsBusy(retry_after=RETRY_AFTER)
        self._room -= 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        future.add_done_callback(self._make_room)  # also when the caller has gone: the thread still works
        return await asyncio.shield(future)

    def _make_room(self, _done: object) -> None:
        self._room += 1


def _normal(password: str) -> bytes:
    """One spelling for characters that keyboards compose differently."""
    return unicodedata.normalize("NFC", password).encode()


def _is_bcrypt(hashed: str) -> bool:
    return hashed.startswith(("$2a$", "$2b$", "$2y$"))
