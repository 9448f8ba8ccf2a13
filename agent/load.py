"""The load of this host, 0–100: pure rules over /proc text, and a thin reader."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.protocol import Load

PROC = Path("/proc")
_SENT = 8  # columns of proc(5)
_MASK = 7


@dataclass(frozen=True, slots=True)
class Sample:
    """Cumulative values of one moment."""

    at: float  # monotonic seconds
    busy: int  # CPU ticks
    total: int
    traffic: int  # bytes in and out of the tunnel interface
    rx: int = 0  # bytes from and to the network
    tx: int = 0


def parse_cpu(stat: str) -> tuple[int, int]:
    """Busy and total ticks of the line `cpu` (proc(5)); waiting for a disk is not work of the CPU."""
    user, nice, system, idle, iowait, irq, softirq, steal = (int(word) for word in stat.split()[1:9])
    busy = user + nice + system + irq + softirq + steal
    return busy, busy + idle + iowait


def parse_memory(meminfo: str) -> float:
    """The share of memory that cannot be had without swapping."""
    values = {line.split(":")[0]: int(line.split()[1]) for line in meminfo.splitlines() if ":" in line}
    return _percent(values["MemTotal"] - values["MemAvailable"], values["MemTotal"])


def parse_interfaces(net_dev: str) -> dict[str, tuple[int, int]]:
    """Bytes received and sent by each interface (proc(5), net/dev)."""
    found = {}
    for line in net_dev.splitlines():
        name, colon, values = line.partition(":")
        words = values.split()
        if colon and len(words) > _SENT:
            found[name.strip()] = (int(words[0]), int(words[_SENT]))
    return found


def parse_uplinks(routes: str) -> set[str]:
    """The interfaces of the default routes (proc(5), net/route)."""
    lines = (line.split() for line in routes.splitlines()[1:])
    return {words[0] for words in lines if len(words) > _MASK and words[1] == words[_MASK] == "00000000"}


def uplink_traffic(interfaces: Mapping[str, tuple[int, int]], uplinks: Collection[str]) -> tuple[int, int]:
    """Bytes that came in from the network, and that went out; of all interfaces where none leads to the rest of it."""
    chosen = uplinks or interfaces.keys() - {"lo"}
    counters = [interfaces[name] for name in chosen if name in interfaces]
    return sum(rx for rx, _ in counters), sum(tx for _, tx in counters)


def load(
    before: Sample, after: Sample, *, memory: float, capacity_mbit: int, peers: int, max_peers: int, disk: float = 0.0
) -> Load:
    """What the node did between two samples, against what it can do."""
    seconds = max(after.at - before.at, 0.001)
    cpu = _percent(after.busy - before.busy, after.total - before.total)
    bits = max(after.traffic - before.traffic, 0) * 8  # a new interface starts its counters at 0
    bandwidth = _percent(bits / seconds, capacity_mbit * 1_000_000)
    share = _percent(peers, max_peers)
    return Load(
        total=max(cpu, memory, bandwidth, share),
        cpu=cpu,
        memory=memory,
        bandwidth=bandwidth,
        peers=share,
        disk=disk,
        rx_rate=round(max(after.rx - before.rx, 0) / seconds),
        tx_rate=round(max(after.tx - before.tx, 0) / seconds),
    )


class LoadReader:
    def __init__(self, *, capacity_mbit: int, max_peers: int, directory: Path = Path("/"), proc: Path = PROC) -> None:
        self._capacity_mbit = capacity_mbit
        self._max_peers = max_peers
        self._directory, self._proc = directory, proc
        self._last: tuple[str, Sample] | None = None

    def read(self, interface: str, peers: int) -> Load | None:
        """The load since the call before; None the first time, and where /proc does not answer."""
        try:
            busy, total = parse_cpu((self._proc / "stat").read_text())
            memory = parse_memory((self._proc / "meminfo").read_text())
            interfaces = parse_interfaces((self._proc / "net/dev").read_text())
            uplinks = parse_uplinks((self._proc / "net/route").read_text())
            disk = used_disk(self._directory)
        except (OSError, ValueError, KeyError):
            return None
        traffic = sum(interfaces.get(interface, (0, 0)))
        last, sample = (
            self._last,
            Sample(time.monotonic(), busy, total, traffic, *uplink_traffic(interfaces, uplinks)),
        )
        self._last = (interface, sample)
        if last is None or last[0] != interface:
            return None
        return load(
            last[1],
            sample,
            memory=memory,
            capacity_mbit=self._capacity_mbit,
            peers=peers,
            max_peers=self._max_peers,
            disk=disk,
        )


def used_disk(directory: Path) -> float:
    """The share of the file system's blocks that only root may still write to, or nobody (statvfs(3))."""
    system = os.statvfs(directory)
    return _percent(system.f_blocks - system.f_bavail, system.f_blocks)


def _percent(part: float, whole: float) -> float:
    return round(min(max(100 * part / whole, 0.0), 100.0), 1) if whole > 0 else 0.0
