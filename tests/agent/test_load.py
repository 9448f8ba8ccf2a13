from __future__ import annotations

from pathlib import Path

from agent.load import (
    LoadReader,
    Sample,
    load,
    parse_cpu,
    parse_interfaces,
    parse_memory,
    parse_uplinks,
    uplink_traffic,
    used_disk,
)

STAT = "cpu  100 20 30 800 40 5 5 0 0 0\ncpu0 1 2 3 4 5 6 7 8 0 0\nintr 12\n"
MEMINFO = "MemTotal:        1000 kB\nMemFree:          100 kB\nMemAvailable:     250 kB\nHugePages_Total: 0\n"
NET_DEV = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier
    lo: 111 1 0 0 0 0 0 0 222 1 0 0 0 0 0 0
   wg0:1000 9 0 0 0 0 0 0 500 9 0 0 0 0 0 0
"""
ROUTES = """Iface	Destination	Gateway 	Flags	RefCnt	Use	Metric	Mask		MTU	Window	IRTT
eth0	00000000	0100000A	0003	0	0	0	00000000	0	0	0
wg0	0000420A	00000000	0001	0	0	0	0000FFFF	0	0	0
"""


def test_time_that_waits_for_a_disk_is_idle() -> None:
    assert parse_cpu(STAT) == (160, 1000)


def test_memory_counts_what_cannot_be_had() -> None:
    assert parse_memory(MEMINFO) == 75.0


def test_traffic_is_told_by_interface() -> None:
    assert parse_interfaces(NET_DEV) == {"lo": (111, 222), "wg0": (1000, 500)}


def test_network_is_where_the_default_route_leads() -> None:
    interfaces = {"lo": (9, 9), "eth0": (10, 20), "wg0": (1, 2)}
    assert parse_uplinks(ROUTES) == {"eth0"}
    assert uplink_traffic(interfaces, {"eth0"}) == (10, 20)
    assert uplink_traffic(interfaces, set()) == (11, 22)


def test_rates_are_bytes_per_second_and_never_negative() -> None:
    value = load(
        Sample(0, 0, 0, 0, 100, 900), Sample(2, 0, 0, 0, 300, 0), memory=0, capacity_mbit=1, peers=0, max_peers=1
    )
    assert (value.rx_rate, value.tx_rate) == (100, 0)


def test_disk_is_the_share_that_cannot_be_written_any_more(tmp_path: Path) -> None:
    assert 0 <= used_disk(tmp_path) <= 100


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
    (tmp_path / "net/route").write_text(ROUTES)
    reader = LoadReader(capacity_mbit=1000, max_peers=100, directory=tmp_path, proc=tmp_path)
    assert reader.read("wg0", 10) is None
    (tmp_path / "stat").write_text(STAT.replace("cpu  100", "cpu  200").replace(" 800 ", " 900 "))
    value = reader.read("wg0", 10)
    assert value is not None
    assert (value.cpu, value.memory, value.peers) == (50.0, 75.0, 10.0)
    (tmp_path / "stat").write_text("")
    assert reader.read("wg0", 10) is None
