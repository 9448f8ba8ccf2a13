"""The composition root of the service: the rooms and the web, joined and run."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_network
from typing import Any

import structlog
from aiohttp import web
from aiohttp.http import HttpProcessingError
from aiohttp.log import server_logger
from prometheus_client import CollectorRegistry, Info, disable_created_metrics

from controller.access.logins import Logins
from controller.accounts.service import Accounts, hold_account
from controller.channel.endpoint import node_application
from controller.channel.hub import Hub
from controller.channel.metrics import ChannelMetrics
from controller.channel.tls import ChannelTls
from controller.config import Config, split_address
from controller.contracts import irssh, skynet
from controller.contracts.kit import AccessLog, Api, HttpSettings
from controller.errors import Unusable
from controller.events.service import Events
from controller.fleet.directory import Directory
from controller.fleet.identities import Identities
from controller.fleet.metrics import FleetMetrics
from controller.fleet.progress import Progress
from controller.fleet.protocols import Protocols
from controller.notify import notify, watchdog
from controller.operations import operations_routes
from controller.services import Services, open_services, pool_of
from controller.store.database import StoreUnavailable
from controller.store.watch import Watcher
from controller.tunnels.ending import end_by_ids
from controller.tunnels.live import LiveStates
from controller.tunnels.metrics import Metrics as TunnelMetrics
from controller.tunnels.service import Tunnels, TunnelSettings
from controller.usage.enforcement import Enforcement, Kept
from controller.usage.granting import Granting
from controller.usage.sessions import Sessions
from shared import __version__
from shared.services import most_tunnels

SHUTDOWN_TIMEOUT = 5.0  # seconds that open requests have to end
IDLE_TIMEOUT = 75.0  # seconds that a connection may go without a whole request head
_BEAT = 1.0  # seconds between two signs of life of the loop
_PURGE_INTERVAL = 3600.0

log = structlog.get_logger()


class CannotListen(Unusable):
    """An address of the settings cannot be had; the text says which and why."""


@dataclass(frozen=True, slots=True)
class Controller:
    """Everything that a running controller consists of; `serve` runs it."""

    services: Services
    directory: Directory
    protocols: Protocols
    live: LiveStates
    sessions: Sessions
    enforcement: Enforcement
    granting: Granting
    tunnels: Tunnels
    hub: Hub
    tls: ChannelTls
    api: Api
    node_port: web.Application


async def compose(services: Services, config: Config, registry: CollectorRegistry) -> Controller:
    database = services.database
    fleet_metrics = FleetMetrics(registry)
    directory = Directory(database, fleet_metrics)
    protocols = Protocols(database, services.fleet_settings, services.keys)
    live = LiveStates(
        database,
        TunnelMetrics(registry, directory.name),
        max_bytes_per_second=config.tunnel.max_bytes_per_second,
    )
    identities = Identities(database, services.authority, services.fleet_settings, fleet_metrics)
    hub = Hub(
        database,
        await database.epoch(),
        identities,
        Progress(database),
        directory,
        protocols,
        live.record,
        ChannelMetrics(registry),
    )
    live.on_stored(hub.acknowledge)
    sessions = Sessions(database, live.book, end_by_ids)
    granting = Granting(database, hub.wait_applied, live.wait_reported)
    kept = Kept(
        sessions=timedelta(days=config.retention.sessions_days),
        usage=timedelta(days=config.retention.usage_days),
        events=timedelta(days=config.retention.events_days),
    )
    enforcement = Enforcement(database, live.book, sessions, Events(database), services.refresh, kept=kept)
    for follower in (sessions.on_written, enforcement.on_written, granting.on_written):
        live.on_written(follower)
    tunnels = Tunnels(
        database,
        directory,
        live,
        Logins(services.passwords, services.keys),
        TunnelSettings(
            pool=pool_of(config),
            dns=config.tunnel.dns,
            cool_down=timedelta(seconds=config.tunnel.cool_down_seconds),
            kept=kept.sessions,
            ssh_tunnels=most_tunnels(config.protocols.ssh.ipv4_pool),
        ),
        max_connections=config.max_connections,
        hold_account=hold_account,
        server_of=protocols.server_of,
        mtu_of=protocols.mtu_of,
        wait_applied=hub.wait_applied,
    )
    api = Api(
        [
            skynet.contract(services.accounts, directory, tunnels),
            irssh.contract(services.accounts, services.members, protocols, sessions, directory),
        ],
        services.accounts,
        _http_settings(config),
        registry,
        AccessLog(sys.stderr.buffer, enabled=log.is_enabled_for(logging.INFO)),
        operations_routes(database, registry, config.metrics_from),
    )
    return Controller(
        services,
        directory,
        protocols,
        live,
        sessions,
        enforcement,
        granting,
        tunnels,
        hub,
        ChannelTls(services.authority),
        api,
        node_application(hub, identities, services.authority),
    )


async def serve(config: Config) -> None:
    """Run the controller until SIGTERM or SIGINT."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, of no use here
    registry = CollectorRegistry()
    Info("skynetvpn_controller", "The running version", registry=registry).info({"version": __version__})
    server_logger.addFilter(_is_ours)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with open_services(config) as opened:
        nodes, clients = _bind(config.node_listen), _bind(config.listen)
        controller = await compose(opened, config, registry)
        await controller.protocols.apply_settings()
        await controller.directory.refresh()
        await controller.live.load()
        await controller.sessions.load()
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(work) for work in _background(controller)]
            async with (
                _listening(controller.node_port, nodes, controller.tls.context),
                _listening(controller.api, clients, None),
            ):
                log.info("controller.ready", api=config.listen, nodes=config.node_listen, version=__version__)
                notify("READY=1")
                await stop.wait()
                notify("STOPPING=1")
                log.info("controller.stopping")
            for task in running:
                task.cancel()


def _background(controller: Controller) -> list[asyncio._CoroutineLike[None]]:
    database = controller.services.database
    heart = _Heart()
    return [
        Watcher(database).run(),
        controller.directory.run(),
        controller.protocols.run(),
        controller.hub.run(),
        controller.live.run(),
        controller.enforcement.run(),
        controller.granting.run(),
        controller.tunnels.run(),
        controller.tls.run(),
        _purge_sessions(controller.services.accounts),
        heart.run(),
        watchdog(heart.beats),
    ]


class _Heart:
    """Whether the event loop still turns in time; a blocked one must not feed the watchdog."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def beats(self) -> bool:
        return time.monotonic() - self._last < 5 * _BEAT

    async def run(self) -> None:
        while True:
            self._last = time.monotonic()
            await asyncio.sleep(_BEAT)


async def _purge_sessions(accounts: Accounts) -> None:
    while True:
        try:
            await accounts.purge_sessions()
        except StoreUnavailable:
            log.warning("accounts.purge_failed")
        await asyncio.sleep(_PURGE_INTERVAL)


def _bind(address: str) -> socket.socket:
    """Take the port before anything is started; raise CannotListen."""
    host, port = split_address(address)
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise CannotListen(f"cannot listen on {address}: {reason}; change it in the settings") from error


@asynccontextmanager
async def _listening(
    served: web.Application | Api, bound: socket.socket, context: ssl.SSLContext | None
) -> AsyncIterator[None]:
    options: dict[str, Any] = {
        "access_log": None,
        "keepalive_timeout": IDLE_TIMEOUT,
        "auto_decompress": False,  # nobody sends compressed bodies but those who want to fill the memory
    }
    runner: web.AppRunner | web.ServerRunner
    if isinstance(served, Api):
        runner = web.ServerRunner(served.listener(**options), shutdown_timeout=SHUTDOWN_TIMEOUT)
    else:
        runner = web.AppRunner(served, shutdown_timeout=SHUTDOWN_TIMEOUT, **options)
    await runner.setup()
    try:
        await web.SockSite(runner, bound, ssl_context=context).start()
        yield
    finally:
        await runner.cleanup()


def _is_ours(record: logging.LogRecord) -> bool:
    """Not what is no HTTP: it is answered with 400, and a stranger must not fill the log with tracebacks."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | web.RequestPayloadError)


def _http_settings(config: Config) -> HttpSettings:
    return HttpSettings(
        hosts=config.contracts.hosts,
        defaults={"/api": config.contracts.default_api, "/api/v1": config.contracts.default_v1},
        rate_limits=config.rate_limits,
        trusted_proxies=tuple(ip_network(text) for text in config.trusted_proxies),
        cors_origins=frozenset(config.contracts.cors_origins),
    )
