"""Rows 1 to 5: the WireGuard drivers against wg(8) and pyroute2, on whichever backend this machine has.

python -m bench.wireguard kernel    # inside the virtual machine: prints the results as JSON in one line
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path

from agent.counters import Counters
from agent.drivers.base import WireGuardDriver
from agent.drivers.nftables import Nftables
from agent.drivers.wireguard import Backend, choose
from agent.host import Host
from agent.reconciler import Guard, Reconciler
from agent.state import State
from bench import material
from bench.harness import MARK, Goal, Ratio, Result, absolute, compared, dump_results, interleaved, not_measured
from bench.strace import sets_sent
from shared.desired import Interface, Kind, Peer, encode
from shared.keys import PrivateKey, encode_key
from shared.protocol import Applied, Frame, Resource, Snapshot, Welcome
from tests.support.netns import Namespace, unique

_PORT = 51900
_SCOPE, _EPOCH = "node:bench", "bench"
_PYROUTE2_PEERS = 200


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything; `quick` only shows that it works."""

    peers: int = 5000
    recheck_peers: int = 10_000
    pairs: int = 15


QUICK = Size(peers=500, recheck_peers=1000, pairs=3)


@dataclass(frozen=True, slots=True)
class Bed:
    """One interface that our driver has set up, and the files for wg(8)."""

    driver: WireGuardDriver
    spec: Interface
    key: PrivateKey
    directory: Path
    size: Size

    @property
    def name(self) -> str:
        return self.spec.name

    def file(self, name: str, fleet: list[Peer], *, endpoints: bool = False) -> str:
        path = self.directory / f"{name}.conf"
        return str(material.wg_file(path, self.key, self.spec.listen_port, fleet, endpoints=endpoints))

    async def setconf(self, file: str) -> float:
        return await asyncio.to_thread(material.timed, ["wg", "setconf", self.name, file])

    async def wg(self, *argv: str) -> float:
        return await asyncio.to_thread(material.timed, ["wg", *argv])


async def seconds(work: Awaitable[object]) -> float:
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


async def measure(backend: Backend, size: Size) -> list[Result]:
    key = PrivateKey.generate()
    driver = await choose(backend, known_keys={key.raw: key.public().raw})
    spec = Interface(
        name=unique("wb"), listen_port=_PORT, addresses=("10.66.0.1/16", "fd66:6b79::1/112"), masquerade=False
    )
    with tempfile.TemporaryDirectory(prefix="skynetvpn-bench-") as directory:
        bed = Bed(driver, spec, key, Path(directory), size)
        try:
            await driver.ensure(spec, bed.key)
            results = await apply(bed)
            results += await change(bed)
            results += await stats(bed)
            results += await recheck(bed)
            return results
        finally:
            await driver.remove(spec.name)
            await driver.close()


async def apply(bed: Bed) -> list[Result]:
    """New peers onto an empty interface. It is emptied by REPLACE_PEERS: deleting it in a loop has hung kernels."""
    fleet = material.peers(bed.size.peers)
    empty, full = bed.file("empty", []), bed.file("full", fleet)

    async def ours() -> float:
        await bed.setconf(empty)
        return await seconds(bed.driver.apply_peers(bed.name, fleet))

    async def setconf() -> float:
        await bed.setconf(empty)
        return await bed.setconf(full)

    row = f"apply-{bed.driver.backend}"
    measure = f"apply {len(fleet):,} new peers, {_where(bed)}"
    pairs = await interleaved(ours, setconf, bed.size.pairs)
    results = [compared(row, measure, "s", pairs, against="wg setconf, same file", goal=Goal(at_most=1.0))]
    if bed.driver.backend == "kernel":
        results.append(await _against_pyroute2(bed, row, fleet, empty))
    return results


async def _against_pyroute2(bed: Bed, row: str, fleet: list[Peer], empty: str) -> Result:
    """Per peer: the loop is so slow that a part of the peers must do; that favours it, as all structures are small."""
    from pyroute2 import WireGuard

    few = [
        {
            "public_key": peer.key.encode(),
            "preshared_key": encode_key(peer.preshared_key or bytes(32)).encode(),
            "allowed_ips": list(peer.allowed_ips),
        }
        for peer in fleet[:_PYROUTE2_PEERS]
    ]

    def loop() -> float:
        with WireGuard() as wireguard:
            started = time.perf_counter()
            for peer in few:
                wireguard.set(bed.name, peer=peer)
            return (time.perf_counter() - started) / len(few)

    async def theirs() -> float:
        await bed.setconf(empty)
        return await asyncio.to_thread(loop)

    async def ours() -> float:
        await bed.setconf(empty)
        return await seconds(bed.driver.apply_peers(bed.name, fleet)) / len(fleet)

    pairs = await interleaved(ours, theirs, 3)
    return compared(
        row,
        f"the same, per peer, {_where(bed)}",
        "s",
        pairs,
        against=f"pyroute2 WireGuard.set in a loop, {len(few)} peers",
        kind=Ratio.FASTER,
        goal=Goal(at_least=15),
    )


async def change(bed: Bed) -> list[Result]:
    """One new peer beside all the others."""
    fleet = material.peers(bed.size.peers)
    full = bed.file("full", fleet)
    await bed.setconf(full)
    spare = iter(material.peers(1000, first=len(fleet)))
    await bed.driver.stats(bed.name)  # connections are open in an agent that runs

    async def one_of_ours() -> float:
        peer = next(spare)
        took = await seconds(bed.driver.apply_peers(bed.name, [peer]))
        await bed.driver.remove_peers(bed.name, [peer.public_key])
        return took

    async def wg_set() -> float:
        peer = next(spare)
        argv = material.wg_set(bed.name, peer, bed.directory / "secret")
        took = await asyncio.to_thread(material.timed, argv)
        await bed.driver.remove_peers(bed.name, [peer.public_key])
        return took

    async def wg_syncconf() -> float:
        peer = next(spare)
        more = bed.file("more", [*fleet, peer])
        took = await bed.wg("syncconf", bed.name, more)
        await bed.driver.remove_peers(bed.name, [peer.public_key])
        return took

    row = f"change-{bed.driver.backend}"
    measure = f"one new peer beside {len(fleet):,}, {_where(bed)}"
    against_set = await interleaved(one_of_ours, wg_set, bed.size.pairs)
    against_syncconf = await interleaved(one_of_ours, wg_syncconf, bed.size.pairs)
    return [
        compared(row, measure, "s", against_set, against="wg set", kind=Ratio.FASTER, goal=Goal(at_least=8)),
        compared(
            row,
            measure,
            "s",
            against_syncconf,
            against="wg syncconf of the file",
            kind=Ratio.FASTER,
            goal=Goal(at_least=200),
        ),
    ]


async def stats(bed: Bed) -> list[Result]:
    """The counters of all peers, each with an endpoint, as on a node whose clients have been seen."""
    fleet = material.peers(bed.size.peers)
    await bed.setconf(bed.file("endpoints", fleet, endpoints=True))

    async def ours() -> float:
        started = time.perf_counter()
        found = await bed.driver.stats(bed.name)
        took = time.perf_counter() - started
        if len(found) != len(fleet):
            raise RuntimeError(f"{len(found)} of {len(fleet)} peers were read")
        return took

    async def theirs() -> float:
        return await bed.wg("show", bed.name, "dump")

    pairs = await interleaved(ours, theirs, bed.size.pairs)
    goal = Goal(at_most=0.5 if bed.driver.backend == "kernel" else 1.0)
    measure = f"read the counters of {len(fleet):,} peers, {_where(bed)}"
    return [compared(f"stats-{bed.driver.backend}", measure, "s", pairs, against="wg show dump", goal=goal)]


async def recheck(bed: Bed) -> list[Result]:
    """The periodic re-check where nothing changed: of interface and peers, then with the packet filter as well."""
    row = f"recheck-{bed.driver.backend}"
    measure = f"re-check {bed.size.recheck_peers:,} peers, nothing changed, {_where(bed)}"
    if shutil.which("nft") is None:
        return [not_measured(row, measure, "nft is not installed")]
    fleet = material.peers(bed.size.recheck_peers)
    await bed.setconf(bed.file("empty", []))
    answers: asyncio.Queue[Frame] = asyncio.Queue()
    counters = Counters()
    firewall = Firewall()

    async def opened() -> WireGuardDriver:
        return bed.driver

    reconciler = Reconciler(
        state=State(bed.directory),
        host=Host(opened, firewall, bed.key, bed.key.public().raw),
        send=answers.put_nowait,
        counters=counters,
        boot_id="bench",
        guard=Guard(),
        recheck_seconds=3600,
    )
    await reconciler.start()
    running = asyncio.create_task(reconciler.run())
    try:
        await _synchronise(reconciler, answers, bed.spec, fleet)
        same = bed.file("same", fleet)

        async def ours() -> float:
            return await seconds(reconciler.recheck())

        async def theirs() -> float:
            return await bed.wg("syncconf", bed.name, same)

        firewall.asked = False
        pairs = await interleaved(ours, theirs, bed.size.pairs)
        firewall.asked = True
        whole = await interleaved(ours, theirs, bed.size.pairs)
        sent = await sets_sent(reconciler.recheck)
        control = await sets_sent(lambda: bed.driver.apply_peers(bed.name, fleet[:1]))
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    if counters.drift:
        raise RuntimeError(f"the re-check found {counters.drift} differences where nothing had changed")
    against = "wg syncconf of the file"
    results = [
        compared(row, measure, "s", pairs, against=against, goal=Goal(at_most=0.3)),
        compared(row, f"{measure}, with the packet filter", "s", whole, against=against),
    ]
    counted = "messages that set anything, in one re-check"
    if sent is None:
        return [*results, not_measured(row, counted, "strace is not installed")]
    if control != 1:
        return [*results, not_measured(row, counted, f"strace saw {control} of 1 message that was sent for comparison")]
    return [*results, absolute(row, counted, "", float(sent), goal=Goal(at_most=0))]


class Firewall(Nftables):
    """wg(8) does not look at the packet filter: while it is not `asked`, its last answer stands."""

    asked = True
    _last: str | None = None

    async def observe(self) -> str | None:
        if self.asked:
            self._last = await super().observe()
        return self._last


async def _synchronise(
    reconciler: Reconciler, answers: asyncio.Queue[Frame], spec: Interface, fleet: list[Peer]
) -> None:
    """Bring the node to these peers as the controller would: a snapshot, applied and acknowledged."""
    await reconciler.inbox.put(Welcome(version=1, epoch=_EPOCH, node_id="bench", scopes=[_SCOPE]))
    resources = [Resource(Kind.WIREGUARD_INTERFACE, spec.key, encode(spec))]
    resources += [Resource(Kind.WIREGUARD_PEER, peer.key, encode(peer)) for peer in fleet]
    await reconciler.inbox.put(
        Snapshot(epoch=_EPOCH, scope=_SCOPE, revision=1, part=0, last=True, resources=resources, confirmed=True)
    )
    async with asyncio.timeout(300):
        while not (isinstance(answer := await answers.get(), Applied) and answer.revision == 1):
            pass
    if answer.failures:
        raise RuntimeError(f"{len(answer.failures)} resources failed: {answer.failures[0]}")


def _where(bed: Bed) -> str:
    return "wireguard-go" if bed.driver.backend == "userspace" else f"kernel, {os.cpu_count()} CPU"


def in_namespace(backend: Backend, size: Size) -> list[Result]:
    with Namespace("bench") as namespace:
        return namespace.call(lambda: measure(backend, size))


if __name__ == "__main__":
    chosen = QUICK if "--quick" in sys.argv else Size()
    print(MARK + dump_results(in_namespace(Backend(sys.argv[1]), chosen)))
