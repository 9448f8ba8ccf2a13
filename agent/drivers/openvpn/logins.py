"""Who may in: credentials by user name, and the decision on one client; no socket, no file."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import time
from collections.abc import Mapping, Sequence

from agent.drivers.base import Admit
from shared.access import Credential
from shared.crypt import verify_password

WRONG = "wrong user name, password or certificate"
EXPIRED = "this login has expired"
BUSY = "the server is busy: try again"
_HASHING = 2  # at a time: a check takes tens of milliseconds of a core, and a stranger can ask for one
_WAITING = 200
_FIRST_PUT = 10.0  # seconds; OpenVPN itself waits for a minute

Variables = Mapping[str, str]


class Logins:
    """`put` and `remove` take effect at once, also for a check that is under way."""

    def __init__(self, admit: Admit) -> None:
        self._admit = admit
        self._credentials: dict[str, Credential] = {}
        self._filled = asyncio.Event()
        self._hashing = asyncio.Semaphore(_HASHING)
        self._waiting = 0
        # A client that comes back, or renews its keys, must not cost a hash each time. In memory, and keyed by a
        # secret of this process: it tells nothing to somebody who reads a core file of another.
        self._key = os.urandom(32)
        self._verified: dict[str, bytes] = {}

    @property
    def credentials(self) -> Mapping[str, Credential]:
        return self._credentials

    def put(self, credentials: Sequence[Credential]) -> None:
        for credential in credentials:
            self._credentials[credential.username] = credential
        self._filled.set()

    def remove(self, usernames: Sequence[str]) -> None:
        for username in usernames:
            self._credentials.pop(username, None)
            self._verified.pop(username, None)
        self._filled.set()

    def decide(self, username: str, variables: Variables, *, again: bool) -> str | None:
        """The reason for refusing a client, "" for letting it in; None where only `examine` can tell.

        `again`: it is in already, and renews its keys; it needs no admission then.
        """
        credential = self._credentials.get(username)
        if credential is None:
            return WRONG if self._filled.is_set() else None
        if not _certificate_fits(credential, variables):
            return WRONG
        if credential.secret:
            password = variables.get("password", "")
            if not password or variables.get("username") != username:
                return WRONG
            if not self._remembered(credential, password):
                return None
        return self._admitted(credential, again=again)

    async def examine(self, username: str, variables: Variables, *, again: bool) -> str:
        """As `decide`, with all the time that it takes."""
        if username not in self._credentials and not await self._is_filled():
            return BUSY
        decided = self.decide(username, variables, again=again)
        if decided is not None:
            return decided
        credential = self._credentials[username]
        password = variables["password"]
        if self._waiting >= _WAITING:
            return BUSY
        if not await self._verify(password, credential.secret):
            return WRONG
        if self._credentials.get(username) != credential:
            return WRONG  # taken away or changed meanwhile
        self._verified[username] = self._proof(credential, password)
        return self._admitted(credential, again=again)

    def _admitted(self, credential: Credential, *, again: bool) -> str:
        if credential.not_after is not None and time.time() >= credential.not_after:
            return EXPIRED
        return "" if again else self._admit(credential.username) or ""

    async def _is_filled(self) -> bool:
        """An agent that has just started has its credentials in a moment: refusing makes clients give up."""
        try:
            async with asyncio.timeout(_FIRST_PUT):
                await self._filled.wait()
        except TimeoutError:
            return False
        return True

    async def _verify(self, password: str, hashed: str) -> bool:
        self._waiting += 1
        try:
            async with self._hashing:
                return await asyncio.to_thread(verify_password, password, hashed)
        finally:
            self._waiting -= 1

    def _remembered(self, credential: Credential, password: str) -> bool:
        known = self._verified.get(credential.username)
        return known is not None and hmac.compare_digest(known, self._proof(credential, password))

    def _proof(self, credential: Credential, password: str) -> bytes:
        text = f"{credential.secret}\0{password}".encode("utf-8", "surrogateescape")
        return hmac.digest(self._key, text, hashlib.sha256)


def _certificate_fits(credential: Credential, variables: Variables) -> bool:
    """By the certificate that OpenVPN has verified in this handshake, and by nothing that the client says of itself.

    The digest alone would not do: OpenVPN leaves it in place when the next handshake shows no certificate, but then
    there is no common name.
    """
    if not credential.fingerprint:
        return True
    shown = variables.get("tls_digest_sha256_0", "").replace(":", "").lower()
    return variables.get("common_name") == credential.username and hmac.compare_digest(
        shown.encode("utf-8", "replace"), credential.fingerprint.hex().encode()
    )
