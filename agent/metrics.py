"""The endpoint for Prometheus and for health checks, written line by line: ten thousand peers must not cost memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from aiohttp import web

from agent.counters import Counters
from agent.errors import AgentError
from shared.desired import Peer
from shared.keys import encode_key
from shared.protocol import PeerStats

_FLUSH_LINES = 500
_PEER_SERIES = (
    ("wireguard_sent_bytes_total", "counter", "Bytes sent to the peer", "tx"),
    ("wireguard_received_bytes_total", "counter", "Bytes received from the peer", "rx"),
    ("wireguard_latest_handshake_seconds", "gauge", "Unix time of the last handshake", "handshake"),
)

_SERVICE_BYTES = (
    ("received", "Bytes received from clients since the agent started"),
    ("sent", "Bytes sent to clients since the agent started"),
)


def render_agent(counters: Counters, now: float) -> Iterator[str]:
    yield from _series("connected", "gauge", "Whether the link to the controller is up", int(counters.connected))
    yield from _header("skynetvpn_agent_applied_revision", "gauge", "Revision of the scope that the host has")
    for scope, revision in counters.applied_revision.items():
        yield f'skynetvpn_agent_applied_revision{{scope="{_escape(scope)}"}} {revision}\n'
    yield from _header("skynetvpn_agent_apply_seconds", "summary", "Time from a frame to its answer")
    yield f"skynetvpn_agent_apply_seconds_sum {counters.apply_seconds:.6f}\n"
    yield f"skynetvpn_agent_apply_seconds_count {counters.applies}\n"
    yield from _series("drift_total", "counter", "Differences found on the host and healed", counters.drift)
    yield from _series("failures", "gauge", "Resources that the host does not have now", counters.failures)
    yield from _series("refused_snapshots_total", "counter", "Snapshots not applied", counters.refused_snapshots)
    yield from _series("store_errors_total", "counter", "Changes that the disk did not take", counters.store_errors)
    yield from _series("peers", "gauge", "Peers on the host", counters.peers)
    yield from _series("sessions", "gauge", "Peers that are connected now", counters.sessions)
    yield from _series("load", "gauge", "Load, 0 to 100", counters.load)
    expiry = counters.certificate_not_after - int(now)
    yield from _series("certificate_expiry_seconds", "gauge", "Time until the node's certificate ends", expiry)
    if counters.server_certificate_not_after:
        expiry = counters.server_certificate_not_after - int(now)
        text = "Time until the certificate of the OpenVPN server ends"
        yield from _series("server_certificate_expiry_seconds", "gauge", text, expiry)
    yield from _render_services(counters)


def _render_services(counters: Counters) -> Iterator[str]:
    if not counters.server_up:
        return
    yield from _header("skynetvpn_agent_server_up", "gauge", "Whether the protocol's server runs as it should")
    for protocol, up in sorted(counters.server_up.items()):
        yield f'skynetvpn_agent_server_up{{protocol="{protocol}"}} {int(up)}\n'
    yield from _header("skynetvpn_agent_service_sessions", "gauge", "Sessions that live now")
    for protocol in sorted(counters.server_up):
        live = counters.service_sessions.get(protocol, 0)
        yield f'skynetvpn_agent_service_sessions{{protocol="{protocol}"}} {live}\n'
    for number, (name, text) in enumerate(_SERVICE_BYTES):
        yield from _header(f"skynetvpn_agent_service_{name}_bytes_total", "counter", text)
        for protocol in sorted(counters.server_up):
            value = counters.service_bytes.get(protocol, (0, 0))[number]
            yield f'skynetvpn_agent_service_{name}_bytes_total{{protocol="{protocol}"}} {value}\n'


def render_peers(interface: str, stats: Mapping[bytes, PeerStats], peers: Mapping[bytes, Peer]) -> Iterator[str]:
    for name, kind, text, field in _PEER_SERIES:
        yield from _header(name, kind, text)
        for key, peer in list(stats.items()):
            allowed = ",".join(peers[key].allowed_ips) if key in peers else ""
            labels = f'interface="{interface}",public_key="{encode_key(key)}",allowed_ips="{allowed}"'
            yield f"{name}{{{labels}}} {getattr(peer, field)}\n"


class MetricsServer:
    def __init__(self, host: str, port: int, lines: Callable[[], Iterator[str]], healthy: Callable[[], bool]) -> None:
        self._host, self._port = host, port
        self._lines, self._healthy = lines, healthy
        self._runner: web.AppRunner | None = None

    async def start(self) -> int:
        """Listen, and return the port; raise AgentError where somebody else has it."""
        app = web.Application()
        app.add_routes([web.get("/metrics", self._metrics), web.get("/healthz", self._health)])
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            await self.close()
            raise AgentError(f"metrics: {self._host}:{self._port}: {error.strerror}") from error
        port: int = self._runner.addresses[0][1]
        return port

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
        await response.prepare(request)
        part: list[str] = []
        for line in self._lines():
            part.append(line)
            if len(part) == _FLUSH_LINES:
                await response.write("".join(part).encode())
                part.clear()
        await response.write("".join(part).encode())
        await response.write_eof()
        return response

    async def _health(self, _request: web.Request) -> web.Response:
        if self._healthy():
            return web.Response(text="ok\n")
        return web.Response(status=503, text="a step on the host hangs\n")


def all_lines(
    counters: Counters,
    interface: Callable[[], str | None],
    stats: Callable[[], Mapping[bytes, PeerStats]],
    peers: Callable[[], Mapping[bytes, Peer]],
) -> Callable[[], Iterator[str]]:
    def lines() -> Iterator[str]:
        yield from render_agent(counters, time.time())
        name = interface()
        if name is not None:
            yield from render_peers(name, stats(), peers())

    return lines


def _series(name: str, kind: str, text: str, value: float) -> Iterator[str]:
    full = f"skynetvpn_agent_{name}"
    yield from _header(full, kind, text)
    yield f"{full} {value}\n"


def _header(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
