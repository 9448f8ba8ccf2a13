"""The composition root: the only place that joins the rooms, for the service and for the command line beside it."""

from __future__ import annotations

import asyncio
import signal
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_network

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry, Info

from controller.accounts.passwords import Passwords
from controller.accounts.service import Accounts, hold_account
from controller.channel.endpoint import node_application
from controller.channel.hub import Hub
from controller.channel.metrics import ChannelMetrics
from controller.channel.tls import ChannelTls
from controller.config import Config, read_secrets, split_address
from controller.contracts import skynet
from controller.contracts.kit import HttpSettings, mount
from controller.fleet import ca
from controller.fleet.ca import Authority
from controller.fleet.directory import Directory
from controller.fleet.identities import Identities
from controller.fleet.metrics import FleetMetrics
from controller.fleet.progress import Progress
from controller.fleet.service import Fleet, FleetSettings
from controller.notify import notify, watchdog
from controller.operations import operations_routes
from controller.store.database import Database, open_database
from controller.store.migrate import migrate
from controller.store.watch import Watcher
from controller.tunnels.addresses import Pool
from controller.tunnels.live import LiveStates
from controller.tunnels.metrics import Metrics as TunnelMetrics
from controller.tunnels.service import Tunnels, TunnelSettings
from shared import __version__

SHUTDOWN_TIMEOUT = 5.0  # seconds that open requests have to end
IDLE_TIMEOUT = 75.0  # seconds that a connection may go without a whole request head
_BEAT = 1.0  # seconds between two signs of life of the loop
_PURGE_INTERVAL = 3600.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Services:
    """What needs only the database: enough for the command line."""

    database: Database
    authority: Authority
    fleet_settings: FleetSettings
    fleet: Fleet
    passwords: Passwords


@dataclass(frozen=True, slots=True)
class Controller:
    """Everything that a running controller consists of; `serve` runs it."""

    services: Services
    accounts: Accounts
    directory: Directory
    live: LiveStates
    tunnels: Tunnels
    hub: Hub
    tls: ChannelTls
    api: web.Application
    node_port: web.Application


@asynccontextmanager
async def services(config: Config) -> AsyncIterator[Services]:
    """Open the database at this version's schema, and what works on nothing else."""
    authority = await asyncio.to_thread(ca.load, config.ca_directory)
    pool = _pool(config)
    settings = FleetSettings(
        channel_address=config.dialled_address(),
        ipv4_pool=pool.ipv4,
        ipv6_pool=pool.ipv6,
        wireguard_port=config.tunnel.port,
        mtu=config.tunnel.mtu,
        certificate_lifetime=timedelta(days=config.certificate_days),
    )
    async with AsyncExitStack() as stack:
        database = open_database(config.database_url)
        stack.push_async_callback(database.close)
        await migrate(database)
        passwords = Passwords(config.passwords)
        stack.callback(passwords.close)
        yield Services(database, authority, settings, Fleet(database, authority.pin, settings), passwords)


def accounts_beside(services: Services, config: Config) -> Accounts:
    """The accounts as the command line uses them, beside the controller that runs."""
    return Accounts(services.database, services.passwords, session_life=timedelta(hours=config.login_hours))


async def compose(services: Services, config: Config, registry: CollectorRegistry) -> Controller:
    database = services.database
    fleet_metrics = FleetMetrics(registry)
    directory = Directory(database, fleet_metrics)
    live = LiveStates(database, TunnelMetrics(registry), max_bytes_per_second=config.tunnel.max_bytes_per_second)
    identities = Identities(database, services.authority, services.fleet_settings, fleet_metrics)
    hub = Hub(
        database,
        await database.epoch(),
        identities,
        Progress(database),
        directory,
        live.record,
        ChannelMetrics(registry),
    )
    live.on_stored(hub.acknowledge)
    tunnels = Tunnels(
        database,
        directory,
        await asyncio.to_thread(read_secrets, config.secret_key_file),
        live,
        TunnelSettings(
            pool=_pool(config),
            dns=config.tunnel.dns,
            mtu=config.tunnel.mtu,
            cool_down=timedelta(seconds=config.tunnel.cool_down_seconds),
        ),
        max_connections=config.max_connections,
        hold_account=hold_account,
        wait_applied=hub.wait_applied,
    )
    accounts = Accounts(
        database,
        services.passwords,
        session_life=timedelta(hours=config.login_hours),
        end_services=[tunnels.end_all],
    )
    api = web.Application()
    api.add_routes(operations_routes(database, registry, config.metrics_from))
    mount(api, [skynet.contract(accounts, directory, tunnels)], accounts, _http_settings(config), registry)
    return Controller(
        services,
        accounts,
        directory,
        live,
        tunnels,
        hub,
        ChannelTls(services.authority),
        api,
        node_application(hub, identities, services.authority),
    )


async def serve(config: Config) -> None:
    """Run the controller until SIGTERM or SIGINT."""
    registry = CollectorRegistry()
    Info("skynetvpn_controller", "The running version", registry=registry).info({"version": __version__})
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with services(config) as opened:
        controller = await compose(opened, config, registry)
        await opened.fleet.apply_settings()
        await controller.directory.refresh()
        await controller.live.load()
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(work) for work in _background(controller)]
            async with (
                _listening(controller.node_port, config.node_listen, controller.tls.context),
                _listening(controller.api, config.listen, None),
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
        controller.hub.run(),
        controller.live.run(),
        controller.tunnels.run(),
        controller.tls.run(),
        _purge_sessions(controller.accounts),
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
        await accounts.purge_sessions()
        await asyncio.sleep(_PURGE_INTERVAL)


@asynccontextmanager
async def _listening(application: web.Application, address: str, context: ssl.SSLContext | None) -> AsyncIterator[None]:
    host, port = split_address(address)
    runner = web.AppRunner(
        application,
        access_log=None,
        shutdown_timeout=SHUTDOWN_TIMEOUT,
        keepalive_timeout=IDLE_TIMEOUT,
        auto_decompress=False,  # nobody sends compressed bodies but those who want to fill the memory
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, ssl_context=context).start()
        yield
    finally:
        await runner.cleanup()


def _pool(config: Config) -> Pool:
    return Pool.parse(config.tunnel.ipv4_pool, config.tunnel.ipv6_pool)


def _http_settings(config: Config) -> HttpSettings:
    return HttpSettings(
        hosts=config.contracts.hosts,
        defaults={"/api": config.contracts.default_api, "/api/v1": config.contracts.default_v1},
        rate_limits=config.rate_limits,
        trusted_proxies=tuple(ip_network(text) for text in config.trusted_proxies),
        cors_origins=frozenset(config.contracts.cors_origins),
    )
