from __future__ import annotations

from pathlib import Path

import pytest

from agent.load import LoadReader, Sample, load, parse_cpu, parse_memory, parse_traffic

STAT = "cpu  100 20 30 800 40 5 5 0 0 0\ncpu0 1 2 3 4 5 6 7 8 0 0\nintr 12\n"
MEMINFO = "MemTotal:        1000 kB\nMemFree:          100 kB\nMemAvailable:     250 kB\nHugePages_Total: 0\n"
NET_DEV = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier
    lo: 111 1 0 0 0 0 0 0 222 1 0 0 0 0 0 0
   wg0:1000 9 0 0 0 0 0 0 500 9 0 0 0 0 0 0
"""


def test_time_that_waits_for_a_disk_is_idle() -> None:
    assert parse_cpu(STAT) == (160, 1000)


def test_memory_counts_what_cannot_be_had() -> None:
    assert parse_memory(MEMINFO) == 75.0


@pytest.mark.parametrize(("interface", "total"), [("wg0", 1500), ("lo", 333), ("wg1", 0), ("wg", 0)])
def test_traffic_is_that_of_the_one_interface(interface: str, total: int) -> None:
    assert parse_traffic(NET_DEV, interface) == total


def test_total_is_the_largest_and_nothing_leaves_0_to_100() -> None:
    before, after = Sample(0, 0, 0, 0), Sample(1, 30, 100, 125_000_000)
    value = load(before, after, memory=40, capacity_mbit=1000, peers=5, max_peers=1000)
    assert (value.cpu, value.memory, value.bandwidth, value.peers, value.total) == (30, 40, 100, 0.5, 100)
    assert load(before, after, memory=40, capacity_mbit=1, peers=5000, max_peers=1000).total == 100


def test_new_interface_is_no_negative_bandwidth() -> None:
    value = load(Sample(0, 0, 0, 900), Sample(1, 0, 1, 0), memory=0, capacity_mbit=1, peers=0, max_peers=1)
    assert value.bandwidth == 0


def test_reader_needs_two_readings_and_survives_a_proc_that_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "stat").write_text(STAT)
    (tmp_path / "meminfo").write_text(MEMINFO)
    (tmp_path / "net/dev").write_text(NET_DEV)
    reader = LoadReader(capacity_mbit=1000, max_peers=100, proc=tmp_path)
    assert reader.read("wg0", 10) is None
    (tmp_path / "stat").write_text(STAT.replace("cpu  100", "cpu  200").replace(" 800 ", " 900 "))
    value = reader.read("wg0", 10)
    assert value is not None
    assert (value.cpu, value.memory, value.peers) == (50.0, 75.0, 10.0)
    (tmp_path / "stat").write_text("")
    assert reader.read("wg0", 10) is None
