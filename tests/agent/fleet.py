"""Values that the agent's tests are made of: peers, frames, a reconciler on a model host."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from agent.counters import Counters
from agent.host import Host
from agent.intake import Guard
from agent.reconciler import Reconciler
from agent.services import Services
from agent.state import State
from shared.access import Credential
from shared.desired import Interface, Payload, Peer, encode, kind_of
from shared.keys import PrivateKey
from shared.protocol import Delta, Frame, Resource, ResourceName, Snapshot, Welcome
from shared.resource import Protocol
from shared.services import L2tpServer, OpenVpnServer, SshServer
from tests.agent.model_host import ModelFirewall, ModelWireGuard
from tests.agent.model_service import ModelHosts, ModelService

F = TypeVar("F", bound=Frame)

KEY = PrivateKey(bytes(range(32)))
INTERFACE = Interface(name="wg0", listen_port=51820, addresses=("10.66.0.1/16", "fd66::1/64"))
SCOPE = "node:1"


def peer(number: int, **changes: object) -> Peer:
    values: dict[str, object] = {
        "public_key": number.to_bytes(2) + b"\x07" * 30,
        "allowed_ips": (f"10.66.{number // 200 + 1}.{number % 200 + 1}/32",),
    }
    return Peer(**values | changes)  # type: ignore[arg-type]


SSH = SshServer(port=2222, ipv4_pool="10.71.0.0/16")
L2TP = L2tpServer(psk="a shared secret", ipv4_pool="10.72.0.0/16")
OPENVPN = OpenVpnServer(
    port=1194,
    ipv4_pool="10.70.0.0/16",
    ca="-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n",
    tls_crypt="-----BEGIN OpenVPN tls-crypt-v2 server key-----\nx\n-----END OpenVPN tls-crypt-v2 server key-----\n",
)
ALL = tuple(Protocol)


def login(number: int, protocol: Protocol = Protocol.SSH, **changes: object) -> Credential:
    values: dict[str, object] = {"protocol": protocol, "username": f"user{number}", "account": number}
    values["secret"] = f"secret{number}" if protocol == Protocol.L2TP else f"$y$j9T$salt{number}$hash{number}"
    return Credential(**values | changes)  # type: ignore[arg-type]


def resource(payload: Payload) -> Resource:
    return Resource(kind_of(payload), payload.key, encode(payload))


def name(payload: Payload) -> ResourceName:
    return ResourceName(kind_of(payload), payload.key)


def snapshot(payloads: Iterable[Payload], revision: int = 1, **changes: object) -> Snapshot:
    values: dict[str, object] = {"epoch": "e1", "scope": SCOPE, "part": 0, "last": True}
    resources = [resource(payload) for payload in payloads]
    return Snapshot(**values | {"revision": revision, "resources": resources} | changes)  # type: ignore[arg-type]


def delta(
    base: int,
    revision: int,
    upserts: Iterable[Payload] = (),
    removals: Iterable[Payload] = (),
    **changes: object,
) -> Delta:
    values: dict[str, object] = {"epoch": "e1", "scope": SCOPE, "base": base, "revision": revision}
    values["upserts"] = [resource(payload) for payload in upserts]
    values["removals"] = [name(payload) for payload in removals]
    return Delta(**values | changes)  # type: ignore[arg-type]


def welcome(*scopes: str, epoch: str = "e1") -> Welcome:
    return Welcome(version=1, epoch=epoch, node_id="1", scopes=list(scopes) or [SCOPE])


async def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait for a condition that another task makes true; fail when it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.005)


class Node:
    """A reconciler with a real state file and a model host; `frames` are its answers."""

    def __init__(
        self,
        directory: Path,
        wireguard: ModelWireGuard | None = None,
        *,
        hosts: ModelHosts | None = None,
        protocols: tuple[Protocol, ...] = ALL,
        **changes: object,
    ) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        directory.chmod(0o700)
        self.wireguard = wireguard or ModelWireGuard()
        self.firewall = ModelFirewall()
        self.frames: list[Frame] = []
        self.counters = Counters()
        self.state = State(directory)
        self.now = 1_800_000_000.0
        self.hosts = hosts or ModelHosts()
        settings: dict[str, object] = {"guard": Guard(), "recheck_seconds": 3600.0, "clock": lambda: self.now}
        recheck_seconds = float(str(changes.get("recheck_seconds", 3600.0)))
        self.services = Services(protocols, self.hosts.open, recheck_seconds=recheck_seconds)
        self.reconciler = Reconciler(
            state=self.state,
            host=Host(self._open, self.firewall, KEY, KEY.public().raw),
            send=self.frames.append,
            counters=self.counters,
            boot_id="boot",
            services=self.services,
            **settings | changes,  # type: ignore[arg-type]
        )
        self._task: asyncio.Task[None] | None = None

    async def _open(self) -> ModelWireGuard:
        return self.wireguard

    def driver(self, protocol: Protocol = Protocol.SSH) -> ModelService:
        return self.hosts.drivers[protocol]

    def logins(self, protocol: Protocol = Protocol.SSH) -> set[str]:
        """Who could log in on the host."""
        return set(self.hosts.hosts[protocol].logins)

    async def __aenter__(self) -> Node:
        await self.reconciler.start()
        self._task = asyncio.create_task(self.reconciler.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.reconciler.close()

    def _died(self) -> bool:
        """Raise what ended the reconciler, should it have ended."""
        return self._task is not None and self._task.done() and self._task.result() is None

    async def send(self, *frames: Welcome | Delta | Snapshot) -> list[Frame]:
        """Deliver frames, wait until each has been dealt with, and return what was answered."""
        seen = len(self.frames)
        for frame in frames:
            done = self.counters.applies + 1
            await self.reconciler.inbox.put(frame)
            await until(lambda done=done: self.counters.applies >= done or self._died())
        await asyncio.sleep(0)  # answers with no delay are due in the next turn of the loop
        return self.frames[seen:]

    async def ask(self, *frames: Welcome | Delta | Snapshot) -> Frame:
        """Deliver frames and wait for the answer to the last one, which the servers' work may delay."""
        seen = len(self.frames)
        await self.send(*frames)
        await until(lambda: len(self.frames) >= seen + len([f for f in frames if not isinstance(f, Welcome)]))
        return self.frames[-1]

    def present(self) -> set[bytes]:
        return set(self.wireguard.devices["wg0"].peers)

    def last(self, kind: type[F]) -> F:
        return next(frame for frame in reversed(self.frames) if isinstance(frame, kind))
