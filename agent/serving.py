"""One protocol's server on this host: a task of its own brings it to what is wanted, in its own time.

Nobody waits for it but the acknowledgement of what it has to do: a driver that fails or hangs holds up no other one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import structlog

from agent.drivers.base import DriverError, LiveSession, ServiceDriver, Unsupported
from agent.logins import SERVER_KINDS, Logins, Name
from shared.access import Credential
from shared.desired import Kind
from shared.services import Server

T = TypeVar("T")

_CHUNK = 1000  # logins in one call of the driver: between two calls removals and kicks get their turn
_MOST_SECONDS = 30.0  # between two tries
_LOOK_SECONDS = 1.0  # between two looks at a server that has called
_HUNG_SECONDS = 120.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round of work has changed: `scopes` wait for its end; the counts are drift that was healed."""

    scopes: frozenset[str]
    changed: bool
    missing: int = 0
    unexpected: int = 0
    altered: int = 0


class Serving:
    """`held` is what the host lets in, by user name, each with the scope that asked for it ("" = none does)."""

    def __init__(
        self,
        driver: ServiceDriver,
        *,
        protect: Callable[[], Awaitable[str | None]],
        settled: Callable[[Serving, Outcome], Awaitable[None]],
        recheck_seconds: float,
        served: bool = True,
    ) -> None:
        self.driver, self.protocol, self.served = driver, driver.protocol, served
        self.held: dict[str, tuple[str, Credential]] = {}
        self.prune = False  # until the first sync nothing is removed from the host that nobody has named
        self.fault: str | None = None  # why the server does not run as it should
        self.running: Server | None = None
        self._protect, self._settled, self._recheck_seconds = protect, settled, recheck_seconds
        self._logins = Logins({}, 0)
        self._faults: dict[str, tuple[str, str]] = {}  # user name -> scope, words
        self._sums: dict[str, int] = {}  # scope -> the digests of what the host has of it
        self._known = False  # whether `held` was read from the host
        self._parked = False
        self._dirty: set[str] = set()
        self._whole = True
        self._pending: set[str] = set()  # scopes with work that has not begun
        self._working: set[str] = set()
        self._asked_by = ""  # the scope that named the server last
        self._looked = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        self._wake = asyncio.Event()
        self._turn = asyncio.Lock()  # the driver's calls never overlap

    # --- what is wanted ---

    @property
    def wanted(self) -> Mapping[str, Credential]:
        return self._logins.credentials[self.protocol]

    @property
    def server(self) -> Server | None:
        return self._logins.servers.get(self.protocol)

    def become(self, logins: Logins) -> None:
        """Take over other desired state as a whole; its scopes wait for it."""
        self._logins, self._whole = logins, True
        self._pending.update(logins.scopes_with(self.protocol))
        self._pending.update(scope for scope, _ in self.held.values() if scope)
        self._wake.set()

    def touch(self, usernames: Iterable[str], scopes: Iterable[str] = ()) -> None:
        """These logins, or (with none) the server have changed in the desired state."""
        self._dirty.update(usernames)
        self._pending.update(scopes)
        self._wake.set()

    def look(self) -> None:
        """The driver says that something happened: the server may have died. Many sessions begin at once, too."""
        if self._timer is None:
            wait = self._looked + _LOOK_SECONDS - time.monotonic()
            self._timer = asyncio.get_running_loop().call_later(max(0.0, wait), self._look_now)

    def _look_now(self) -> None:
        self._timer, self._looked = None, time.monotonic()
        self._wake.set()

    # --- what the host has ---

    def busy(self, scope: str) -> bool:
        return scope in self._pending or scope in self._working

    def total(self, scope: str) -> int:
        """The sum of the digests of what the host has of this scope."""
        total = self._sums.get(scope, 0)
        if self.running is not None and self.fault is None and self._logins.owner(self.name) == scope:
            total += self.running.digest()
        return total

    def failures(self, scope: str) -> dict[Name, str]:
        found = {
            (str(Kind.CREDENTIAL), f"{self.protocol}/{username}"): words
            for username, (asked, words) in self._faults.items()
            if asked == scope
        }
        if self.fault is not None and (self._logins.owner(self.name) or self._asked_by) == scope:
            found[self.name] = self.fault
        if not found and self.busy(scope):
            found[self.name] = "the host is still at work on it"
        return found

    def failing(self) -> bool:
        return self.fault is not None or bool(self._faults)

    def impact(self, wanted: Logins) -> tuple[int, int]:
        """How many logins of the host `wanted` would take away, and how many there are."""
        if not self.served:
            return 0, 0
        present = self.held.keys() | self.wanted.keys()
        kept = wanted.credentials[self.protocol]
        return sum(username not in kept for username in present), len(present)

    # --- the driver ---

    async def ask(self, work: Callable[[], Awaitable[T]]) -> T:
        """Have the driver do something when it is free; raise DriverError, whatever else it raises or however it hangs:
        a fault of one protocol ends no other."""
        async with self._turn:
            try:
                async with asyncio.timeout(_HUNG_SECONDS):
                    return await work()
            except DriverError:
                raise
            except TimeoutError as error:
                raise DriverError(f"the {self.protocol} server did not answer within {_HUNG_SECONDS:g} s") from error
            except Exception as error:
                log.exception("driver_broken", protocol=str(self.protocol))
                raise DriverError(f"{type(error).__name__}: {error}") from error

    async def sessions(self) -> list[LiveSession]:
        return await self.ask(self.driver.sessions)

    async def kick(self, session_id: str) -> None:
        await self.ask(lambda: self.driver.kick(session_id))

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self.driver.close()

    # --- the task ---

    async def run(self) -> None:
        retry = 1.0
        while True:
            delay = min(retry, self._recheck_seconds) if self.failing() else self._recheck_seconds
            try:
                async with asyncio.timeout(delay):
                    await self._wake.wait()
            except TimeoutError:
                self._whole = True
            self._wake.clear()
            retried = self._whole and self.failing()
            await self.work()
            retry = min(retry * 2, _MOST_SECONDS) if retried and self.failing() else 1.0

    async def work(self) -> None:
        """One round: bring the host to what is wanted now, and tell what came of it."""
        before = (self.fault, dict(self._faults), dict(self._sums), self.running)
        dirty, self._dirty = self._dirty, set()
        whole, self._whole = self._whole, False
        self._working, self._pending = self._pending, set()
        drift = (0, 0, 0)
        if self.server is None:
            await self._park()
        else:
            drift = await self._serve(self.server, dirty, whole)
        done, self._working = frozenset(self._working - self._pending), set()
        after = (self.fault, self._faults, self._sums, self.running)
        outcome = Outcome(done, before != after, *drift)
        if done or outcome.changed or any(drift):
            await self._settled(self, outcome)

    async def _park(self) -> None:
        """No server is wanted: nobody can log in, and so what is stored of the logins is all that there is to do."""
        if not self._parked and self.prune:
            try:
                await self.ask(self.driver.stop)
            except DriverError as error:
                self._fail(f"it could not be stopped: {error}")
                return
            self._parked = True
        self.running, self._known = None, False
        self._fail(None)
        self._faults.clear()
        for username in list(self.held):
            self._release(username)
        for username, credential in self.wanted.items():
            self._hold(username, credential)

    async def _serve(self, server: Server, dirty: set[str], whole: bool) -> tuple[int, int, int]:
        self._asked_by = self._logins.owner(self.name) or ""
        if self._parked or (self.running is None and not self._known):
            self._parked, whole = False, True
            for username in list(self.held):
                self._release(username)
        another = server != self.running
        whole = whole or (another and self.running is not None)
        drift = await self._read_back() if whole else None
        doubtful = dirty.union(self.held) if whole and self.prune else dirty
        await self._remove([username for username in doubtful if username not in self.wanted])
        able = True
        if whole or not dirty or self.failing() or server != self.running:
            able = await self._ensure(server)
        if whole and (another or drift is None):  # what a server can give decides what its logins have
            found = await self._read_back()
            drift = drift or found
        if able:
            await self._put(self.wanted if whole else dirty)
        else:
            for username in self.wanted if whole else dirty:
                self._blame(username, self.fault or "")
        return drift or (0, 0, 0)

    async def _read_back(self) -> tuple[int, int, int] | None:
        """See what the host really has; return how much somebody else has changed, None where it does not say."""
        try:
            there = await self.ask(self.driver.credentials)
        except DriverError:
            return None  # `ensure` tells in its own words what is wrong with the server
        missing = unexpected = altered = 0
        for username in [name for name in self.held if name not in there]:
            self._release(username)
            missing += 1
        for username, found in there.items():
            _, held = self.held.get(username, ("", None))
            wanted = self.wanted.get(username)
            if held is not None and same(held, found):
                continue
            if wanted is not None and same(wanted, found):
                self._hold(username, wanted)
            else:
                altered += held is not None
                unexpected += held is None and wanted is None
                self._hold(username, found, foreign=True)
        known, self._known = self._known, True
        return (missing, unexpected, altered) if known else (0, 0, 0)

    async def _ensure(self, server: Server) -> bool:
        """Start the server or see that it runs; return whether this host can have one at all."""
        unprotected = await self._protect()
        try:
            await self.ask(lambda: self.driver.ensure(server))
        except DriverError as error:
            self.running = None
            self._fail(str(error) or type(error).__name__)
            return not isinstance(error, Unsupported)
        self.running = server
        self._fail(unprotected)
        return True

    async def _remove(self, usernames: Sequence[str]) -> None:
        if not usernames:
            return
        try:
            failed = await self.ask(lambda: self.driver.remove(usernames))
        except DriverError as error:
            failed = dict.fromkeys(usernames, str(error))
            self._whole = True
        for username in usernames:
            if username in failed:
                self._blame(username, failed[username])
            else:
                self._faults.pop(username, None)
                self._release(username)
        log.info("logins_removed", protocol=str(self.protocol), count=len(usernames), failed=len(failed))

    async def _put(self, usernames: Iterable[str]) -> None:
        due: list[Credential] = []
        for username in list(usernames):
            credential = self.wanted.get(username)
            if credential is None:
                if username not in self.held:
                    self._faults.pop(username, None)
                continue
            scope, held = self.held.get(username, ("", None))
            if held is not None and same(held, credential):
                self._faults.pop(username, None)
                if held is not credential or not scope:
                    self._hold(username, credential)
            else:
                due.append(credential)
        for start in range(0, len(due), _CHUNK):
            if start and self._dirty:  # somebody may have to go: first come first served would let him stay
                self._dirty.update(credential.username for credential in due[start:])
                self._pending |= self._working
                self._wake.set()
                return
            await self._put_chunk(due[start : start + _CHUNK])

    async def _put_chunk(self, credentials: Sequence[Credential]) -> None:
        try:
            refused = await self.ask(lambda: self.driver.put(credentials))
        except DriverError as error:
            refused = {credential.username: str(error) for credential in credentials}
        for credential in credentials:
            username = credential.username
            if username in refused:
                self._blame(username, refused[username])
            else:
                self._faults.pop(username, None)
                self._hold(username, credential)
        log.info("logins_put", protocol=str(self.protocol), count=len(credentials), refused=len(refused))

    # --- the books ---

    @property
    def name(self) -> Name:
        return str(SERVER_KINDS[self.protocol]), str(self.protocol)

    def _fail(self, words: str | None) -> None:
        if words != self.fault:
            if words is None:
                log.info("server_recovered", protocol=str(self.protocol))
            else:
                log.error("server_failed", protocol=str(self.protocol), error=words)
        self.fault = words

    def _blame(self, username: str, words: str) -> None:
        scope = self._logins.owner((str(Kind.CREDENTIAL), f"{self.protocol}/{username}"))
        if scope is None:  # it could not be removed, and nobody asks for it any more
            scope = self.held.get(username, ("", None))[0]
        self._faults[username] = (scope, words)

    def _hold(self, username: str, credential: Credential, *, foreign: bool = False) -> None:
        self._release(username)
        scope = "" if foreign else self._logins.owner((str(Kind.CREDENTIAL), credential.key)) or ""
        self.held[username] = (scope, credential)
        if scope:
            self._sums[scope] = self._sums.get(scope, 0) + credential.digest()

    def _release(self, username: str) -> None:
        scope, credential = self.held.pop(username, ("", None))
        if scope and credential is not None:
            self._sums[scope] -= credential.digest()


def same(one: Credential, other: Credential) -> bool:
    """Whether a host that lets in the one lets in the other; limits and leases are the agent's own."""
    return one is other or (
        one.secret == other.secret
        and one.tunnel == other.tunnel
        and one.fingerprint == other.fingerprint
        and (one.public_keys == other.public_keys or sorted(one.public_keys) == sorted(other.public_keys))
    )
