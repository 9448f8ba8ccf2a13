"""A controller's node port on loopback with real TLS and a real database, and an agent that speaks the real frames."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import msgspec
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from prometheus_client import CollectorRegistry

from controller.channel.endpoint import node_application
from controller.channel.hub import Hub, Intervals
from controller.channel.metrics import ChannelMetrics
from controller.channel.tls import ChannelTls
from controller.fleet import ca
from controller.fleet.directory import Directory
from controller.fleet.identities import Identities
from controller.fleet.metrics import FleetMetrics
from controller.fleet.nodes import NodeSpec
from controller.fleet.progress import Progress
from controller.fleet.protocols import Protocols
from controller.fleet.service import Fleet
from controller.fleet.settings import FleetSettings
from controller.fleet.vpnkeys import load_keys
from controller.store.database import Database
from shared import desired, jointoken
from shared.keys import PrivateKey
from shared.protocol import (
    CHANNEL_PATH,
    CONTROLLER_NAME,
    ENROL_PATH,
    PROTOCOL_VERSION,
    Applied,
    Bye,
    Delta,
    EnrolAnswer,
    EnrolRefusal,
    EnrolRequest,
    Frame,
    FromController,
    Hello,
    Report,
    Resync,
    Snapshot,
    Welcome,
    decode_from_controller,
    encode,
)

T = TypeVar("T", bound=Frame)
DEADLINE = 20.0
_SMALL_BUFFER = 65536  # so that a node that does not read is noticed after little data
QUICK = Intervals(sweep=0.2, check=0.2, flush=0.05, purge=0.2)
NEVER = Intervals(sweep=3600, check=3600, flush=0.05, purge=3600)


async def until(condition: Callable[[], object], deadline: float = DEADLINE) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(deadline):
        while not condition():  # noqa: ASYNC110 - the condition is anybody's
            await asyncio.sleep(0.005)


async def eventually(condition: Callable[[], Awaitable[object]], deadline: float = DEADLINE) -> None:
    """Wait until the condition, which has to ask somebody, holds."""
    async with asyncio.timeout(deadline):
        while not await condition():  # noqa: ASYNC110 - the condition is anybody's
            await asyncio.sleep(0.01)


@dataclass(slots=True)
class NodePort:
    """A whole controller as far as nodes see it."""

    authority: ca.Authority
    settings: FleetSettings
    fleet: Fleet
    identities: Identities
    directory: Directory
    protocols: Protocols
    progress: Progress
    hub: Hub
    tls: ChannelTls
    registry: CollectorRegistry
    port: int
    reports: list[tuple[str, Report]] = field(default_factory=list)

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    async def problem(self, name: str = "node-1") -> str | None:
        return next(node.problem for node in await self.fleet.nodes() if node.name == name)

    async def enrolled(self, name: str = "node-1") -> FakeAgent:
        token = await self.fleet.issue_join_token(NodeSpec(name=name, country="DE", city="Berlin"))
        agent = FakeAgent(self.port, self.authority.bundle)
        await agent.enrol(token)
        return agent


@asynccontextmanager
async def node_port(
    database: Database,
    directory: Path,
    *,
    intervals: Intervals = QUICK,
    port: int = 0,
    enrolments_per_minute: int = 1000,
    **settings: Any,
) -> AsyncIterator[NodePort]:
    authority = ca.load(directory) if (directory / "ca.key").exists() else ca.create(directory)
    registry = CollectorRegistry()
    numbers = FleetMetrics(registry)
    wanted = FleetSettings(
        channel_address="127.0.0.1:8443",
        ipv4_pool=ip_network("10.66.0.0/16"),
        ipv6_pool=ip_network("fd66::/112"),
        **settings,
    )
    identities = Identities(database, authority, wanted, numbers)
    servers = Directory(database, numbers)
    await servers.refresh()
    progress = Progress(database)
    protocols = Protocols(database, wanted, await load_keys(database))
    await protocols.apply_settings()
    reports: list[tuple[str, Report]] = []
    hub = Hub(
        database,
        await database.epoch(),
        identities,
        progress,
        servers,
        protocols,
        lambda node_id, report: reports.append((node_id, report)),
        ChannelMetrics(registry),
        intervals=intervals,
    )
    tls = ChannelTls(authority)
    application = node_application(hub, identities, authority, enrolments_per_minute=enrolments_per_minute)
    runner = web.AppRunner(application, shutdown_timeout=2)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", port))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SMALL_BUFFER)  # accepted sockets inherit it
    await web.SockSite(runner, listener, ssl_context=tls.context).start()
    assert runner.addresses
    fleet = Fleet(database, authority.pin, wanted)
    tasks = [asyncio.create_task(work) for work in (hub.run(), servers.run(), protocols.run(), tls.run())]
    try:
        yield NodePort(
            authority,
            wanted,
            fleet,
            identities,
            servers,
            protocols,
            progress,
            hub,
            tls,
            registry,
            runner.addresses[0][1],
            reports,
        )
    finally:
        await runner.cleanup()
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, asyncio.CancelledError), result


class FakeAgent:
    """Keeps its state in memory and applies everything that it is sent, as an honest agent does."""

    def __init__(self, port: int, authority: bytes) -> None:
        self.port = port
        self.authority = authority
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.wireguard = PrivateKey.generate().public().raw
        self.protocols: list[str] = []
        self.ssh_host_keys: list[str] = []
        self.ledger = ""
        self.certificate = b""
        self.node_id = ""
        self.boot_id = str(uuid.uuid4())
        self.epoch = ""
        self.revisions: dict[str, int] = {}
        self.resources: dict[str, dict[tuple[str, str], desired.Payload]] = {}
        self._sums: dict[str, int] = {}  # of the digests, kept up to date as a real agent does
        self.frames: list[FromController] = []  # everything received in this connection
        self.silent = False  # applies nothing and answers nothing
        self._parts: list[Snapshot] = []
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._session: aiohttp.ClientSession | None = None
        self._reader: asyncio.Task[None] | None = None

    # --- enrolment ---

    def request(self, token: str, *, csr: bytes | None = None) -> EnrolRequest:
        read = jointoken.decode(token)
        return EnrolRequest(
            token_id=read.id,
            secret=read.secret,
            csr=csr if csr is not None else signing_request(self.key),
            agent="0.1.0",
            wireguard_public_key=self.wireguard,
        )

    async def post(self, body: bytes) -> tuple[int, bytes]:
        async with (
            self._client() as session,
            session.post(ENROL_PATH, data=body, ssl=self.context(), server_hostname=CONTROLLER_NAME) as response,
        ):
            return response.status, await response.read()

    async def try_enrol(self, request: EnrolRequest) -> EnrolAnswer | tuple[int, str]:
        status, body = await self.post(msgspec.msgpack.encode(request))
        if status == 200:
            return msgspec.msgpack.decode(body, type=EnrolAnswer)
        return status, msgspec.msgpack.decode(body, type=EnrolRefusal).code

    async def enrol(self, token: str) -> EnrolAnswer:
        answer = await self.try_enrol(self.request(token))
        assert isinstance(answer, EnrolAnswer), answer
        self.certificate, self.node_id = answer.certificate, answer.node_id
        return answer

    # --- the channel ---

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.authority.decode())
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if self.certificate:
            pem = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            descriptor = os.memfd_create("agent")
            os.write(descriptor, pem + self.certificate)
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
            os.close(descriptor)
        return context

    async def open(self, **headers: str) -> aiohttp.ClientWebSocketResponse:
        """Connect without saying anything; raise aiohttp.WSServerHandshakeError when it is refused."""
        await self.close()
        self._session = self._client()
        self.frames, self._parts = [], []
        self._socket = await self._session.ws_connect(
            CHANNEL_PATH, ssl=self.context(), server_hostname=CONTROLLER_NAME, headers=headers, max_msg_size=0
        )
        return self._socket

    async def connect(self) -> None:
        """Connect, say hello and serve in the background; returns with the controller's first frame."""
        await self.open()
        await self.send(self.hello())
        self._reader = asyncio.create_task(self._read())
        await until(lambda: self.frames or self.closed)

    async def join(self) -> None:
        """Connect, and again where the controller wants another session for what this node offers."""
        await self.connect()
        if self.bye is not None and self.bye.retry:
            await self.connect()

    def hello(self) -> Hello:
        return Hello(
            version=PROTOCOL_VERSION,
            agent="0.1.0",
            boot_id=self.boot_id,
            epoch=self.epoch,
            revisions=dict(self.revisions),
            wireguard_public_key=self.wireguard,
            protocols=self.protocols,
            ssh_host_keys=self.ssh_host_keys,
            ledger=self.ledger,
        )

    async def send(self, frame: Frame) -> None:
        assert self._socket is not None
        await self._socket.send_bytes(encode(frame))

    async def send_raw(self, data: bytes) -> None:
        assert self._socket is not None
        await self._socket.send_bytes(data)

    async def receive(self) -> FromController | None:
        """The next frame of a connection that was only opened; None where it has ended."""
        assert self._socket is not None
        message = await self._socket.receive(timeout=DEADLINE)
        return decode_from_controller(message.data) if message.type is aiohttp.WSMsgType.BINARY else None

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
            self._reader = None
        if self._socket is not None:
            await self._socket.close()
        if self._session is not None:
            await self._session.close()
        self._socket = self._session = None

    @property
    def closed(self) -> bool:
        return self._reader is not None and self._reader.done()

    def received(self, kind: type[T]) -> list[T]:
        return [frame for frame in self.frames if isinstance(frame, kind)]

    @property
    def bye(self) -> Bye | None:
        return next(iter(self.received(Bye)), None)

    def digest(self, scope: str) -> bytes:
        return desired.digest_bytes(self._sums.get(scope, 0))

    async def _read(self) -> None:
        assert self._socket is not None
        with contextlib.suppress(ConnectionError):
            async for message in self._socket:
                frame = decode_from_controller(message.data)
                assert frame is not None
                self.frames.append(frame)
                if not self.silent:
                    await self.take(frame)

    async def take(self, frame: FromController) -> None:
        match frame:
            case Welcome():
                if frame.epoch != self.epoch:
                    self.revisions.clear()
                self.epoch = frame.epoch
            case Delta() if frame.base > self.revisions.get(frame.scope, -1):
                await self.send(Resync(scope=frame.scope, reason="the base is not known"))
            case Delta() if frame.revision >= self.revisions[frame.scope]:
                for name in frame.removals:
                    self._set(frame.scope, (name.kind, name.key), None)
                for item in frame.upserts:
                    payload = desired.decode(item.kind, item.key, item.payload)
                    self._set(frame.scope, (item.kind, item.key), payload)
                await self._applied(frame.scope, frame.revision)
            case Snapshot():
                await self._snapshot(frame)
            case _:
                return

    async def _snapshot(self, frame: Snapshot) -> None:
        if frame.part == 0:
            self._parts = []
        self._parts.append(frame)
        if not frame.last:
            return
        assert [part.part for part in self._parts] == list(range(len(self._parts)))
        self.resources[frame.scope] = {
            (item.kind, item.key): desired.decode(item.kind, item.key, item.payload)
            for part in self._parts
            for item in part.resources
        }
        self._sums[frame.scope] = sum(payload.digest() for payload in self.resources[frame.scope].values())
        await self._applied(frame.scope, frame.revision)

    def _set(self, scope: str, name: tuple[str, str], payload: desired.Payload | None) -> None:
        held = self.resources.setdefault(scope, {})
        former = held.pop(name, None)
        if payload is not None:
            held[name] = payload
        self._sums[scope] = (
            self._sums.get(scope, 0)
            + (payload.digest() if payload is not None else 0)
            - (former.digest() if former is not None else 0)
        )

    async def _applied(self, scope: str, revision: int) -> None:
        self.revisions[scope] = revision
        await self.send(Applied(scope=scope, revision=revision, digest=self.digest(scope)))

    def _client(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            f"https://127.0.0.1:{self.port}",
            timeout=aiohttp.ClientTimeout(total=DEADLINE),
            connector=aiohttp.TCPConnector(socket_factory=_small_socket),
        )


def _small_socket(address: Any) -> socket.socket:
    made = socket.socket(address[0], address[1], address[2])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)
    return made


def signing_request(key: Any, name: str = "host", *extensions: x509.ExtensionType) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    algorithm = None if type(key).__name__.startswith("Ed25519") else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(Encoding.PEM)
