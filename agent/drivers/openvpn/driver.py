"""OpenVPN as the agent has it: a process for each transport, kept as the controller wants it, and who is in."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import structlog

from agent import files
from agent.drivers.base import Admit, DriverError, LiveSession, Notify
from agent.drivers.openvpn import config, devices, process
from agent.drivers.openvpn.config import TRANSPORTS, Settings, UnsafeSettings
from agent.drivers.openvpn.keys import Keys
from agent.drivers.openvpn.logins import Logins
from agent.drivers.openvpn.management import Management
from agent.drivers.openvpn.process import Detached, Launcher
from agent.drivers.openvpn.server import Server
from agent.errors import AgentError
from shared.access import Credential
from shared.resource import Protocol
from shared.services import OpenVpnServer
from shared.services import Server as Spec

log = structlog.get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_HOLD_OFF = 300.0  # seconds between two tries that would end a working server
_IPV6 = Path("/proc/net/if_inet6")


class OpenVpn:
    """The ServiceDriver, and the certificate that its servers need.

    In `directory`: `server.<hash>.pem` (key and certificate), and for each process `<transport>.<hash>.conf`. The hash
    is that of the settings, so that the name of a process's socket tells what it runs with. The launcher starts them.
    """

    protocol: Final = Protocol.OPENVPN

    def __init__(
        self,
        directory: Path,
        *,
        boot_id: str,
        admit: Admit,
        notify: Notify,
        launcher: Launcher | None = None,
        dco: bool = False,
    ) -> None:
        self._directory = directory.absolute()
        self._boot_id = boot_id
        self._notify = notify
        self._launcher = launcher or Detached(self._directory)
        self._dual_stack = _IPV6.exists()
        self._dco = dco
        self._logins = Logins(admit)
        self._keys = Keys(self._directory)
        self._servers: dict[str, Server] | None = None  # None until those that run have been adopted
        self._ca: str | None = None
        self._ended: list[LiveSession] = []
        self._refused: dict[str, tuple[Settings, float, str]] = {}

    async def ensure(self, spec: Spec) -> None:
        if not isinstance(spec, OpenVpnServer):
            raise DriverError("these are not the settings of an OpenVPN server")
        servers = await self._running()
        self._ca = spec.ca
        certificate = await asyncio.to_thread(self._keys.current, spec.ca)
        if certificate is None:
            raise DriverError("the server waits for its certificate from the controller")
        await self._sweep()
        problems = []
        for transport in TRANSPORTS:
            try:
                if transport in spec.transports:
                    await self._settle(self._wanted(spec, transport, certificate.name))
                elif transport in servers:
                    await self._take_down(transport)
            except (DriverError, UnsafeSettings) as error:
                problems.append((transport, error))
        await self._tidy(certificate.name)
        if problems:
            raise _joined(problems, len(spec.transports))

    async def stop(self) -> None:
        servers = await self._running()
        for transport in list(servers):
            await self._take_down(transport)
        await self._sweep()
        await self._tidy(None)

    async def credentials(self) -> Mapping[str, Credential]:
        """OpenVPN holds none, it asks here for each client. But whom an agent before this one let in is in: a session
        without a login shows as one that fits nobody, so that it is put again or taken away."""
        inside = {username for server in (await self._running()).values() for username in server.usernames}
        found = {name: Credential(protocol=self.protocol, username=name, account=0) for name in inside}
        return {**found, **self._logins.credentials}

    async def put(self, credentials: Sequence[Credential]) -> dict[str, str]:
        self._logins.put(credentials)
        return {}

    async def remove(self, usernames: Sequence[str]) -> dict[str, str]:
        self._logins.remove(usernames)
        for server in await self._attached():
            await server.disconnect(server.clients(usernames=usernames), "the login was taken away")
        return {}

    async def sessions(self) -> list[LiveSession]:
        live: list[LiveSession] = []
        for server in await self._attached():
            try:
                live += await server.sessions()
            except DriverError:
                if server.alive:
                    raise
                # It has just died: `ensure` tells why.
        ended = {session.id: session for session in self._ended}
        self._ended.clear()
        return [*(session for session in live if session.id not in ended), *ended.values()]

    async def kick(self, session_id: str) -> None:
        for server in await self._attached():
            await server.disconnect(server.clients(session=session_id), "ended by an administrator")

    async def close(self) -> None:
        for server in (self._servers or {}).values():
            await server.close()
        self._servers = None

    async def certificate_request(self) -> bytes | None:
        """A PEM signing request where the servers need a certificate, or a new one."""
        return await _on_disk(self._keys.request, self._ca)

    async def install_certificate(self, certificate: bytes, ca: bytes) -> None:
        """Take what the controller has signed. The next `ensure` uses it, but ends no sessions for it alone."""
        await _on_disk(self._keys.install, certificate, ca)

    def _wanted(self, spec: OpenVpnServer, transport: str, certificate: str) -> Settings:
        return config.settings(spec, transport, certificate, dual_stack=self._dual_stack, dco=self._dco)

    async def _sweep(self) -> None:
        servers = (await self._running()).values()
        await devices.remove_others({server.settings.device for server in servers if server.alive})

    async def _settle(self, wanted: Settings) -> None:
        """Make the transport's process run with these settings."""
        servers = await self._running()
        server = servers.get(wanted.transport)
        if server is not None and not server.alive:
            await servers.pop(wanted.transport).close()
            server = None
        if server is not None:
            await self._attach(server)
        if server is not None and (server.settings == wanted or not await self._must_change(server, wanted)):
            return
        await self._replace(server, wanted)

    async def _must_change(self, server: Server, wanted: Settings) -> bool:
        """A new certificate alone is no reason to end sessions, until the old one comes to its end."""
        if server.settings.with_certificate(wanted.certificate) != wanted or not server.usernames:
            return True
        validity = await asyncio.to_thread(self._keys.validity, server.settings.certificate)
        if validity is None:
            return True
        return time.time() > validity.not_after - (validity.not_after - validity.not_before) / 8

    async def _replace(self, old: Server | None, wanted: Settings) -> None:
        """Start the new process, then end the old one; the other way round where both want the same port."""
        servers = await self._running()
        transport = wanted.transport
        same_port = old is not None and old.settings.port == wanted.port
        if same_port:
            self._check_not_refused(wanted)
        new = await self._start(wanted)  # OpenVPN has read the file, and found no fault in it
        try:
            if old is not None and same_port:
                await self._take_down(transport)
            await new.go()
            if old is not None and not same_port:
                await self._take_down(transport)
        except BaseException as error:
            await self._discard(new)
            if old is not None and transport not in servers and isinstance(error, DriverError):
                self._refused[transport] = (wanted, time.monotonic() + _HOLD_OFF, str(error))
                await self._restore(old.settings)
            raise
        servers[transport] = new
        log.info("openvpn.serves", transport=transport, port=wanted.port, offloaded=new.offloaded)

    def _check_not_refused(self, wanted: Settings) -> None:
        settings, until, words = self._refused.get(wanted.transport, (None, 0.0, ""))
        if settings == wanted and time.monotonic() < until:
            raise DriverError(words)

    async def _restore(self, settings: Settings) -> None:
        servers = await self._running()
        server = await self._start(settings)
        try:
            await server.go()
        except BaseException:
            await self._discard(server)
            raise
        servers[settings.transport] = server
        log.warning("openvpn.old_settings_back", transport=settings.transport)

    async def _start(self, settings: Settings) -> Server:
        """Start a process that holds still, and attach to it."""
        text = config.render(settings)
        if config.parse(text) != settings:
            raise UnsafeSettings("the file would not say what it should")
        name = f"{settings.transport}.{config.token(text)}"
        await _on_disk(self._write, name, text)
        management = await self._launcher.start(name)
        running = self._launcher.find(management.pid, name)
        if running is None:
            await management.close()
            raise DriverError(f"another program answers at {self._launcher.socket_path(name)}")
        return self._server(name, settings, management, running)

    async def _running(self) -> dict[str, Server]:
        """The servers by transport; the first time, those that an agent before this one has left running."""
        if self._servers is None:
            if not isinstance(self._launcher, Detached):
                await Detached(self._directory).clear_all()
            servers: dict[str, Server] = {}
            async with contextlib.AsyncExitStack() as given_up:
                found = []
                for path in self._directory.glob("*.conf"):
                    if (server := await self._found(path)) is not None:
                        found.append(server)
                        given_up.push_async_callback(server.close)
                for server in sorted(found, key=lambda each: each.process.started):
                    other = servers.get(server.settings.transport)
                    servers[server.settings.transport] = server
                    if other is not None:  # the agent was killed while it put one in the other's place
                        await self._end(other)
                given_up.pop_all()
            self._servers = servers
        return self._servers

    async def _found(self, path: Path) -> Server | None:
        management = await Management.connect(self._launcher.socket_path(path.stem))
        if management is None:
            return None
        try:
            settings = config.parse((await asyncio.to_thread(files.read_private, path)).decode())
        except (AgentError, ValueError):
            settings = None
        running = self._launcher.find(management.pid, path.stem)
        if settings is None or running is None:
            await management.close()
            return None
        server = self._server(path.stem, settings, management, running)
        try:
            if await server.adopt():
                log.info("openvpn.adopted", transport=settings.transport, pid=running.pid, offloaded=server.offloaded)
                return server
        except DriverError as error:
            log.warning("openvpn.not_adopted", transport=settings.transport, error=str(error))
        await self._discard(server)
        return None

    def _server(self, name: str, settings: Settings, management: Management, running: process.Process) -> Server:
        return Server(
            running,
            settings,
            name,
            management,
            launcher=self._launcher,
            boot_id=self._boot_id,
            logins=self._logins,
            ended=self._ended.append,
            notify=self._notify,
        )

    async def _attached(self) -> list[Server]:
        """The servers that run, each with a connection: without one nobody can be sent away."""
        servers = [server for server in (await self._running()).values() if server.alive]
        for server in servers:
            await self._attach(server)
        return servers

    async def _attach(self, server: Server) -> None:
        if server.attached:
            return
        management = await Management.connect(self._launcher.socket_path(server.name))
        if management is None:
            raise DriverError("openvpn does not answer at its management socket")
        await server.attach(management)

    async def _take_down(self, transport: str) -> None:
        """End first, forget then: a process that does not end still has its clients."""
        servers = await self._running()
        await self._end(servers[transport])
        del servers[transport]

    async def _end(self, server: Server) -> None:
        with contextlib.suppress(DriverError):  # a launcher may need it, and one that does not ends it all the same
            await self._attach(server)
        await server.end()
        await server.close()
        log.info("openvpn.ended", transport=server.settings.transport, port=server.settings.port)

    async def _discard(self, server: Server) -> None:
        with contextlib.suppress(DriverError):
            await server.end()
        await server.close()

    def _write(self, name: str, text: str) -> None:
        files.make_private_directory(self._directory)
        files.write_private(self._directory / f"{name}.conf", text.encode())

    async def _tidy(self, certificate: str | None) -> None:
        """Take away what no process uses; without a certificate to keep, the keys as well."""
        servers = (self._servers or {}).values()
        names = {server.name for server in servers}
        for path in [path for path in self._directory.glob("*.conf") if path.stem not in names]:
            try:
                await process.clear(self._launcher, path.stem)
                path.unlink(missing_ok=True)
            except DriverError as error:  # by its file the next agent finds it
                log.warning("openvpn.not_ended", name=path.stem, error=str(error))
        if certificate is None:
            await asyncio.to_thread(self._keys.remove)
        else:
            used = [certificate, *(server.settings.certificate for server in servers)]
            await asyncio.to_thread(self._keys.forget, used)


async def _on_disk(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    try:
        return await asyncio.to_thread(function, *arguments, **options)
    except AgentError as error:
        raise DriverError(str(error)) from error


def _joined(problems: Sequence[tuple[str, Exception]], transports: int) -> DriverError:
    """One error of them all; what is wrong with the host and not with a transport is said once."""
    words = {str(error) for _, error in problems}
    if len(words) == 1 and len(problems) == transports:
        kind = type(problems[0][1])
        return (kind if issubclass(kind, DriverError) else DriverError)(words.pop())
    return DriverError("; ".join(f"{transport}: {error}" for transport, error in problems))
