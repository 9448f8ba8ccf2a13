"""The servers of all protocols but WireGuard: each has a task of its own; here they are made and asked as one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence

import structlog

from agent.config import Config
from agent.drivers.base import (
    Admit,
    DriverError,
    LimitsDriver,
    LiveSession,
    Notify,
    ServiceDriver,
    Tunnels,
    Unsupported,
)
from agent.leftover import LeftOver
from agent.logins import SERVER_KINDS, Logins, Name
from agent.serving import Outcome, Serving
from shared.access import Credential
from shared.desired import Kind
from shared.resource import Protocol
from shared.services import TUN_PREFIX, L2tpServer, OpenVpnServer, Server, SshServer

_MOST_SECONDS = 30.0  # between two tries to stop a server

OpenDriver = Callable[[Protocol, Admit, Notify], ServiceDriver]

log = structlog.get_logger()


def open_driver(config: Config, boot_id: str) -> OpenDriver:
    """Make drivers of this host, loading only the code of the protocols that are asked for."""

    def opened(protocol: Protocol, admit: Admit, notify: Notify) -> ServiceDriver:
        place = config.directory / protocol
        match protocol:
            case Protocol.OPENVPN:
                from agent.drivers.openvpn import OpenVpn, Units

                units = Units(place, config.openvpn_units) if config.openvpn_units is not None else None
                return OpenVpn(
                    place, boot_id=boot_id, admit=admit, notify=notify, launcher=units, dco=config.openvpn_dco
                )
            case Protocol.SSH:
                from agent.drivers.ssh import Ssh

                return Ssh(place, boot_id=boot_id, admit=admit, notify=notify)
            case Protocol.L2TP:
                from agent.drivers.l2tp import L2tp

                return L2tp(place, boot_id=boot_id, admit=admit, notify=notify)
            case Protocol.WIREGUARD:
                raise ValueError("WireGuard has a driver of another kind")

    return opened


def open_limits() -> LimitsDriver:
    from agent.drivers.limits import KernelLimits

    return KernelLimits()


class Unserved:
    """Stands for a protocol that this host does not serve, or cannot: it runs nothing and touches nothing."""

    def __init__(self, protocol: Protocol, words: str | None = None) -> None:
        self._protocol = protocol
        self._words = words or f"this host does not serve {protocol}: add it to `protocols` in agent.yaml"

    @property
    def protocol(self) -> Protocol:
        return self._protocol

    async def ensure(self, spec: Server) -> None:
        raise Unsupported(self._words)

    async def stop(self) -> None:
        return None

    async def credentials(self) -> Mapping[str, Credential]:
        return {}

    async def put(self, credentials: Sequence[Credential]) -> dict[str, str]:
        return {credential.username: self._words for credential in credentials}

    async def remove(self, usernames: Sequence[str]) -> dict[str, str]:
        return {}

    async def sessions(self) -> list[LiveSession]:
        return []

    async def kick(self, session_id: str) -> None:
        return None

    async def close(self) -> None:
        return None


class Services:
    """`admit` and `noticed` are set by the keeper of sessions, `settled` and `protect` by the reconciler."""

    def __init__(
        self,
        protocols: Collection[Protocol],
        open_driver: OpenDriver | None = None,
        *,
        left_over: LeftOver | None = None,
        recheck_seconds: float = 30,
    ) -> None:
        self.protocols = tuple(protocols)
        self._open_driver = open_driver
        self._left_over = left_over
        self.host_keys: list[str] = []
        self.admit: Callable[[Protocol, str], str | None] = lambda _protocol, _username: None
        self.noticed: Callable[[], None] = lambda: None
        self.settled: Callable[[Serving, Outcome], Awaitable[None]] = _nobody_waits
        self.protect: Callable[[], Awaitable[str | None]] = _unprotected
        self._logins = Logins({}, 0)
        self._recheck_seconds = recheck_seconds
        self._serving = {
            protocol: self._made(self._opened(protocol) if protocol in protocols else Unserved(protocol))
            for protocol in SERVER_KINDS
        }

    def __iter__(self) -> Iterator[Serving]:
        """Those that this host serves."""
        return (serving for serving in self._serving.values() if serving.served)

    def of(self, protocol: Protocol) -> Serving:
        return self._serving[protocol]

    # --- what is wanted ---

    def become(self, logins: Logins, *, prune: bool) -> None:
        self._logins = logins
        for serving in self._serving.values():
            serving.prune = prune
            serving.become(logins)
        self.noticed()

    def touch(self, names: Iterable[Name], scope: str = "") -> None:
        """Something changed under these names: only the servers that it is about have work."""
        waiting = {scope} if scope else set()
        touched: dict[Protocol, set[str]] = {}
        for kind, key in names:
            if kind == Kind.CREDENTIAL:
                protocol, _, username = key.partition("/")
            elif kind in SERVER_KINDS.values():
                protocol, username = kind.removesuffix(".server"), ""
            else:
                continue
            if protocol in self._serving:
                touched.setdefault(Protocol(protocol), set()).update({username} if username else ())
        for known, usernames in touched.items():
            self._serving[known].touch(usernames, waiting)

    def tunnels(self) -> tuple[Tunnels, ...]:
        """The clients' networks of the servers that are wanted and that this host serves."""
        servers = [self._logins.servers.get(serving.protocol) for serving in self]
        return tuple(tunnels for server in servers if server is not None and (tunnels := tunnels_of(server)))

    # --- what the host has ---

    def busy(self, scope: str) -> bool:
        return any(serving.busy(scope) for serving in self._serving.values())

    def total(self, scope: str) -> int:
        return sum(serving.total(scope) for serving in self._serving.values())

    def failures(self, scope: str) -> dict[Name, str]:
        found: dict[Name, str] = {}
        for serving in self._serving.values():
            if serving.failing() or serving.busy(scope):
                found |= serving.failures(scope)
        return found

    def impact(self, wanted: Logins) -> tuple[int, int]:
        """How many logins of the host `wanted` would take away, and how many there are."""
        impacts = [serving.impact(wanted) for serving in self._serving.values()]
        return sum(removes for removes, _ in impacts), sum(present for _, present in impacts)

    # --- the tasks ---

    async def prepare(self) -> None:
        """Learn what the controller has to be told before the first server is wanted."""
        for serving in self:
            host_keys = getattr(serving.driver, "host_keys", None)
            if host_keys is not None:
                try:
                    self.host_keys = await serving.ask(host_keys)
                except DriverError as error:
                    log.error("host_keys_unavailable", protocol=str(serving.protocol), error=str(error))

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            if self._left_over is not None:
                for protocol in self._left_over.protocols:
                    tasks.create_task(self._stop(self._left_over, protocol))
            for serving in self._serving.values():
                tasks.create_task(serving.run())

    async def close(self) -> None:
        for serving in self._serving.values():
            with contextlib.suppress(DriverError):
                await serving.close()

    async def _stop(self, left_over: LeftOver, protocol: Protocol) -> None:
        """Until it has worked: nobody watches over what an earlier agent left running."""
        serving, words, pause = self._made(self._opened(protocol)), "", 1.0
        try:
            while True:
                try:
                    await serving.ask(serving.driver.stop)
                    await asyncio.to_thread(left_over.stopped, protocol)
                    log.info("server_given_up", protocol=str(protocol))
                    return
                except (DriverError, OSError) as error:
                    if str(error) != words:
                        words = str(error)
                        log.error("server_not_stopped", protocol=str(protocol), error=words)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _MOST_SECONDS)
        finally:
            with contextlib.suppress(DriverError):
                await serving.close()

    def _made(self, driver: ServiceDriver) -> Serving:
        return Serving(
            driver,
            protect=self._protected,
            settled=self._round_ended,
            recheck_seconds=self._recheck_seconds,
            served=driver.protocol in self.protocols,
        )

    def _opened(self, protocol: Protocol) -> ServiceDriver:
        if self._open_driver is None:
            return Unserved(protocol)
        try:
            return self._open_driver(
                protocol, lambda username: self.admit(protocol, username), lambda: self._noticed(protocol)
            )
        except Exception as error:  # a library that is missing, or a bug: the other protocols need none of it
            log.exception("driver_broken", protocol=str(protocol))
            return Unserved(protocol, f"{protocol} cannot be served: {type(error).__name__}: {error}")

    async def _protected(self) -> str | None:
        return await self.protect()

    async def _round_ended(self, serving: Serving, outcome: Outcome) -> None:
        await self.settled(serving, outcome)

    def _noticed(self, protocol: Protocol) -> None:
        self._serving[protocol].look()
        self.noticed()


def tunnels_of(server: Server) -> Tunnels | None:
    """The network of the server's clients, for the packet filter; None where its traffic is the host's own."""
    match server:
        case OpenVpnServer():
            networks = (server.ipv4_pool, *([server.ipv6_pool] if server.ipv6_pool else []))
            return Tunnels(Protocol.OPENVPN, networks, server.masquerade, server.isolate)
        case L2tpServer():
            return Tunnels(Protocol.L2TP, (server.ipv4_pool,), server.masquerade, server.isolate)
        case SshServer():
            return Tunnels(Protocol.SSH, (server.ipv4_pool,), devices=TUN_PREFIX) if server.tun else None


async def _nobody_waits(_serving: Serving, _outcome: Outcome) -> None:
    return None


async def _unprotected() -> str | None:
    return None
