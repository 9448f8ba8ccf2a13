"""The endpoints of operators beside the public API: /healthz, /readyz, /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from ipaddress import ip_address, ip_network

import sqlalchemy as sa
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from controller.errors import DomainError
from controller.store.database import Database

Handle = Callable[[web.BaseRequest], Awaitable[web.Response]]
READY_TIMEOUT = 2.0  # seconds that the database may take to answer


def operations_routes(
    database: Database, registry: CollectorRegistry, metrics_from: Sequence[str]
) -> Mapping[str, Handle]:
    """By path. `metrics_from` are the networks that may read the metrics, directly and not through a proxy."""
    networks = [ip_network(text) for text in metrics_from]

    async def healthz(_request: web.BaseRequest) -> web.Response:
        return web.json_response({"status": "ok"})

    async def readyz(_request: web.BaseRequest) -> web.Response:
        try:
            async with asyncio.timeout(READY_TIMEOUT), database.connect() as connection:
                await connection.execute(sa.text("SELECT name FROM facts LIMIT 1"))  # for SELECT 1 SQLite reads no file
        except (DomainError, TimeoutError):
            return web.json_response({"status": "database unavailable"}, status=503)
        return web.json_response({"status": "ready"})

    async def metrics(request: web.BaseRequest) -> web.Response:
        peer = request.transport.get_extra_info("peername") if request.transport else None
        proxied = "X-Forwarded-For" in request.headers or "Forwarded" in request.headers
        if peer is None or proxied or not any(ip_address(peer[0]) in network for network in networks):
            raise web.HTTPNotFound
        body = await asyncio.to_thread(generate_latest, registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    return {"/healthz": healthz, "/readyz": readyz, "/metrics": metrics}
