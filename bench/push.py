"""Row 6: from the commit of a POST until the node's acknowledgement, against a raw TCP echo of the same bytes.

The controller times each push itself (skynetvpn_push_seconds: commit → applied on the host → acknowledged); its sum
is read before and after each POST, so that every push is known by itself. Node, link and moment are the echo's too.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
from typing import Any

from bench import material
from bench.harness import Goal, Result, absolute, compared, percentile
from bench.peers.echo import Caller
from bench.stack import CONTROLLER, Stack
from shared.desired import Kind, encode
from shared.keys import encode_key
from shared.protocol import Applied, Delta, Resource
from shared.protocol import encode as encode_frame
from tests.support.netns import Namespace

ROW = "push"
_PORT = 9000
_WARM_UP = 10
_CROWD = 10_000


def measure(*, quick: bool) -> list[Result]:
    pushes, crowd = (20, 1000) if quick else (300, _CROWD)
    few, echoes = _measured(0, pushes)
    many, _ = _measured(crowd, pushes)
    measure = "push, POST's commit → applied → acknowledged"
    ratio = statistics.median(many) / statistics.median(few)
    return [
        compared(
            ROW,
            f"{measure}, p50",
            "ms",
            list(zip(few, echoes, strict=True)),
            against="raw TCP echo of the same bytes",
            goal=Goal(at_most=6),
        ),
        absolute(ROW, f"{measure}, p99", "ms", percentile(few, 0.99), goal=Goal(at_most=20)),
        absolute(ROW, f"{measure}, p99, {crowd:,} peers", "ms", percentile(many, 0.99), goal=Goal(at_most=20)),
        Result(
            row=ROW,
            measure=f"{measure}, p50, {crowd:,} peers",
            unit="ms",
            ours=statistics.median(many),
            against="the same with no other peer",
            theirs=statistics.median(few),
            ratio=ratio,
            goal=Goal(at_least=0.8, at_most=1.2),
        ),
    ]


def _measured(crowd: int, pushes: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each push and of the echo beside it."""
    with Stack(peers=crowd) as stack:
        found = stack.controller.namespace.call(lambda: _pairs(stack, pushes))
    return [push for push, _ in found], [echo for _, echo in found]


async def _pairs(stack: Stack, pushes: int) -> list[tuple[float, float]]:
    request, answer = _frames()
    caller = Caller(len(answer))
    server = await asyncio.get_running_loop().create_server(lambda: caller, CONTROLLER, _PORT)
    echo = _start_echo(stack.node.namespace, len(request), len(answer))
    found: list[tuple[float, float]] = []
    try:
        async with asyncio.timeout(30):
            await caller.connected.wait()
        for number, peer in enumerate(material.peers(pushes + _WARM_UP, first=50_000)):
            pair = await _push(stack, peer.public_key), await _echo(caller, request)
            if number >= _WARM_UP:
                found.append(pair)
    finally:
        caller.close()
        server.close()
        stack.node.namespace.end(echo)
    return found


async def _push(stack: Stack, public_key: bytes) -> float:
    before = await asyncio.to_thread(_pushes, stack)
    connection_id = await asyncio.to_thread(stack.connect, encode_key(public_key))
    after = await _counted(stack, before[0] + 1)
    await asyncio.to_thread(stack.disconnect, connection_id)
    await _counted(stack, after[0] + 1)
    return (after[1] - before[1]) * 1000


async def _counted(stack: Stack, count: float) -> tuple[float, float]:
    """The pushes once there are so many; more would mean that somebody else's are among them."""
    async with asyncio.timeout(10):
        while (found := await asyncio.to_thread(_pushes, stack))[0] < count:  # noqa: ASYNC110  it tells nobody
            await asyncio.sleep(0.001)
    if found[0] > count:
        raise RuntimeError(f"{found[0] - count + 1:g} pushes came of one request")
    return found


def _pushes(stack: Stack) -> tuple[float, float]:
    """How many, and their seconds in all."""
    metrics = stack.metrics()
    return metrics["skynetvpn_push_seconds_count"], metrics["skynetvpn_push_seconds_sum"]


async def _echo(caller: Caller, request: bytes) -> float:
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with asyncio.timeout(10):
        await caller.call(request)
    return (loop.time() - started) * 1000


def _frames() -> tuple[bytes, bytes]:
    """What one new peer costs on the wire, without WebSocket and TLS."""
    (peer,) = material.peers(1)
    scope = "node:0197a0b0-0000-7000-8000-000000000000"
    resource = Resource(Kind.WIREGUARD_PEER, peer.key, encode(peer))
    delta = Delta(epoch="0" * 32, scope=scope, base=1000, revision=1001, upserts=[resource])
    return encode_frame(delta), encode_frame(Applied(scope=scope, revision=1001, digest=bytes(16)))


def _start_echo(node: Namespace, request_bytes: int, answer_bytes: int) -> subprocess.Popen[Any]:
    sizes = (str(request_bytes), str(answer_bytes))
    return node.popen(sys.executable, "-m", "bench.peers.echo", CONTROLLER, str(_PORT), *sizes)
