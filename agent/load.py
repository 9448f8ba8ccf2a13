"""The load of this host, 0–100: pure rules over /proc text, and a thin reader."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from shared.protocol import Load

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Sample:
    """Cumulative values of one moment."""

    at: float  # monotonic seconds
    busy: int  # CPU ticks
    total: int
    traffic: int  # bytes in and out of the tunnel interface


def parse_cpu(stat: str) -> tuple[int, int]:
    """Busy and total ticks of the line `cpu` (proc(5)); waiting for a disk is not work of the CPU."""
    user, nice, system, idle, iowait, irq, softirq, steal = (int(word) for word in stat.split()[1:9])
    busy = user + nice + system + irq + softirq + steal
    return busy, busy + idle + iowait


def parse_memory(meminfo: str) -> float:
    """The share of memory that cannot be had without swapping."""
    values = {line.split(":")[0]: int(line.split()[1]) for line in meminfo.splitlines() if ":" in line}
    return _percent(values["MemTotal"] - values["MemAvailable"], values["MemTotal"])


def parse_traffic(net_dev: str, interface: str) -> int:
    """Bytes received and sent by the interface (proc(5), net/dev); 0 where it is not there."""
    for line in net_dev.splitlines():
        name, colon, values = line.partition(":")
        if colon and name.strip() == interface:
            words = values.split()
            return int(words[0]) + int(words[8])
    return 0


def load(before: Sample, after: Sample, *, memory: float, capacity_mbit: int, peers: int, max_peers: int) -> Load:
    """What the node did between two samples, against what it can do."""
    seconds = max(after.at - before.at, 0.001)
    cpu = _percent(after.busy - before.busy, after.total - before.total)
    bits = max(after.traffic - before.traffic, 0) * 8  # a new interface starts its counters at 0
    bandwidth = _percent(bits / seconds, capacity_mbit * 1_000_000)
    share = _percent(peers, max_peers)
    return Load(total=max(cpu, memory, bandwidth, share), cpu=cpu, memory=memory, bandwidth=bandwidth, peers=share)


class LoadReader:
    def __init__(self, *, capacity_mbit: int, max_peers: int, proc: Path = PROC) -> None:
        self._capacity_mbit = capacity_mbit
        self._max_peers = max_peers
        self._proc = proc
        self._last: tuple[str, Sample] | None = None

    def read(self, interface: str, peers: int) -> Load | None:
        """The load since the call before; None the first time, and where /proc does not answer."""
        try:
            busy, total = parse_cpu((self._proc / "stat").read_text())
            memory = parse_memory((self._proc / "meminfo").read_text())
            traffic = parse_traffic((self._proc / "net/dev").read_text(), interface)
        except (OSError, ValueError, KeyError):
            return None
        last, sample = self._last, Sample(time.monotonic(), busy, total, traffic)
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
        )


def _percent(part: float, whole: float) -> float:
    return round(min(max(100 * part / whole, 0.0), 100.0), 1) if whole > 0 else 0.0
