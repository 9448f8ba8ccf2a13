"""One account by all four protocols at once: a real controller, a real agent, and each protocol's own client.

A second is SLOWDOWN seconds in the virtual machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.fleet.fourways import PROTOCOLS, PROXY, FourWays, four_ways
from tests.support.l2tp import SLOWDOWN, require_l2tp

pytestmark = [pytest.mark.kernel, pytest.mark.netns]

PACKETS, SIZE = 20, 1000
ICMP = 28  # bytes of the headers of a ping
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def ways() -> Iterator[FourWays]:
    require_l2tp()
    with four_ways() as ways:
        yield ways


def test_one_account_by_all_four_protocols_at_once(ways: FourWays) -> None:
    ssh = ways.ssh()
    tunnels = {"wireguard": ways.wireguard(), "openvpn": ways.openvpn(), "l2tp": ways.l2tp()}
    for interface in tunnels.values():
        ways.fleet.wait(lambda name=interface: ways.reaches(name), f"{interface} does not reach the internet")
    ways.fleet.wait(lambda: ways.on() == [*PROTOCOLS], "the panel does not list four sessions")

    before = ways.bytes()
    for interface in tunnels.values():
        ways.ping(interface, PACKETS, SIZE)
    assert ways.download(MEGABYTE, PROXY) == MEGABYTE
    truly = dict.fromkeys(tunnels, (PACKETS * (SIZE + ICMP),) * 2) | {"ssh": (0, MEGABYTE)}

    def moved() -> dict[str, tuple[int, int]]:
        now = ways.bytes()
        return {name: (now[name][0] - before[name][0], now[name][1] - before[name][1]) for name in now}

    def counted() -> bool:
        shown = moved()
        return all(shown[name][0] >= rx and shown[name][1] >= tx for name, (rx, tx) in truly.items())

    ways.fleet.wait(counted, "the bytes are not reported")
    shown = moved()
    for name, pair in truly.items():
        for true, told in zip(pair, shown[name], strict=True):
            assert told < 1.06 * true + 5_000, (name, shown)  # each protocol has its own headers and signs of life

    with ExitStack() as stack:
        streams = {name: stack.enter_context(ways.pinging(interface)) for name, interface in tunnels.items()}
        assert ways.kick() == len(PROTOCOLS)
        kicked = time.time()  # the call itself takes about as long in an emulated processor
        ways.fleet.wait(lambda: ssh.poll() is not None, "SSH's client is still in")
        took = {"ssh": time.time() - kicked}
        ways.fleet.wait(lambda: ways.on() == [], "a kicked session is still listed")
        time.sleep(1 * SLOWDOWN)  # so long somebody who is not out would go on
        took |= {name: max(pings.answers()) - kicked for name, pings in streams.items()}
    print(f"seconds after the kick: {took}")
    assert max(took.values()) < 1 * SLOWDOWN, took


def test_a_quota_of_ten_megabytes_lets_at_most_one_slice_more_pass(ways: FourWays) -> None:
    before = ways.used()
    ways.admin("PUT", f"/users/{ways.account}", {"quota_bytes": before + 10 * MEGABYTE})
    slice_bytes = (before + 10 * MEGABYTE) // 10
    ways.fleet.wait(ways.ended, "a client of before is still there")
    interface, passed = ways.l2tp(), 0
    ways.fleet.wait(lambda: ways.on() == ["l2tp"], "L2TP's session is not listed")
    deadline = time.monotonic() + 60 * SLOWDOWN
    while ways.on():
        assert time.monotonic() < deadline, f"{passed} bytes passed, and it is still on\n{ways.fleet.logs()}"
        passed += ways.download(30 * MEGABYTE, ("--interface", interface))
    print(f"{passed} bytes passed of {10 * MEGABYTE}, {ways.used() - before} counted")
    assert 8 * MEGABYTE < passed < 10 * MEGABYTE + slice_bytes
    assert ways.used() <= before + 10 * MEGABYTE + slice_bytes
