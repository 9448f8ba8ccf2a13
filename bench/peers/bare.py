"""Our own bare handler: the controller's server (aiohttp, uvloop, no access log) that answers a constant body.

python -m bench.peers.bare PORT BODY
"""

from __future__ import annotations

import asyncio
import sys

import uvloop
from aiohttp import web


async def serve(port: int, body: bytes) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(body=body, headers={"Content-Type": "application/json"})

    app = web.Application()
    app.router.add_get("/api/servers/{id}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
        loop.run(serve(int(sys.argv[1]), sys.argv[2].encode()))
