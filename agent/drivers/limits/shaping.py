"""Speed limits by address as input of `tc -batch` (tc-htb(8), tc-u32(8)); pure.

All tunnels share two ifb devices, one for each direction, so that an account has one class however it is connected. A
device is led through them while an account on it has a limit; packets of nobody's class pass unqueued.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address

UP, DOWN = "skyup", "skydown"  # from clients, to clients
MAX_CLASSES = 0xFFFE
_HOOKS = {UP: "ingress", DOWN: "egress"}
_QUEUE_SECONDS, _PACKET = 0.1, 1400
_MIN_BURST = 16_384  # bytes
_BURST_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    """What one account's traffic is held to."""

    minor: int  # of its class, 1 to MAX_CLASSES
    rates: Mapping[str, int]  # UP and DOWN in bits per second; a direction without a limit is not there
    addresses: tuple[str, ...]


@dataclass(slots=True)
class Places:
    """The filters that exist: in a bucket of the hash table each has a number of its own."""

    taken: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)  # (device, address) -> bucket, number
    free: dict[tuple[str, int, int], list[int]] = field(default_factory=dict)  # numbers that were given back
    next: dict[tuple[str, int, int], int] = field(default_factory=dict)

    def take(self, device: str, address: str) -> tuple[int, int]:
        parsed = ip_address(address)
        bucket = parsed.packed[-1]
        where = (device, parsed.version, bucket)
        if free := self.free.get(where):
            number = free.pop()
        else:
            number = self.next[where] = self.next.get(where, 0) + 1
        self.taken[device, address] = bucket, number
        return bucket, number

    def give_back(self, device: str, address: str) -> tuple[int, int]:
        bucket, number = self.taken.pop((device, address))
        self.free.setdefault((device, ip_address(address).version, bucket), []).append(number)
        return bucket, number


def set_up(device: str) -> list[str]:
    """The queues of one ifb device, without classes, and the hash tables that filters go into."""
    lines = [f"qdisc add dev {device} root handle 1: htb default 0 direct_qlen 1000"]
    for root, (version, offset) in zip(("800", "801"), ((4, 12), (6, 20)), strict=True):
        at = offset + (4 if version == 4 else 16) * (device == DOWN)  # of the last 32 bits of source or destination
        head = f"filter add dev {device} parent 1: protocol {_protocol(version)} prio {version}"
        lines.append(f"{head} handle {version}: u32 divisor 256")
        # Where nothing in the bucket fits, the packet has no class.
        lines.append(f"{head} u32 ht {root}:: match u32 0 0 at 0 hashkey mask 0x000000ff at {at} link {version}:")
    return lines


def lead_through(device: str) -> list[str]:
    """Send both directions of a tunnel's device through the ifb devices."""
    return [
        f"qdisc add dev {device} clsact",
        *(
            f"filter add dev {device} {hook} protocol all prio 1 u32 match u32 0 0 "
            f"action mirred egress redirect dev {through}"
            for through, hook in _HOOKS.items()
        ),
    ]


def release(device: str) -> str:
    return f"qdisc del dev {device} clsact"


def change(before: Mapping[int, Shape], after: Mapping[int, Shape], places: Places) -> list[str]:
    """From one set of shapes (by account) to the other: filters go before their class, and come after it."""
    removals, classes, filters = list[str](), list[str](), list[str]()
    for account, old in before.items():
        new = after.get(account)
        for device in old.rates:
            kept = new.addresses if new is not None and device in new.rates else ()
            removals += [_unfilter(device, address, places) for address in old.addresses if address not in kept]
            if new is None or device not in new.rates:
                removals.append(f"class del dev {device} classid 1:{old.minor:x}")
    for account, new in after.items():
        former = before.get(account)
        for device, rate in new.rates.items():
            there = former is not None and device in former.rates
            if not there:
                classes += _class("add", device, new.minor, rate)
            elif former is not None and former.rates[device] != rate:
                classes += _class("change", device, new.minor, rate)
            known = former.addresses if there and former is not None else ()
            filters += [
                _filter(device, address, new.minor, places) for address in new.addresses if address not in known
            ]
    return removals + classes + filters


def _class(verb: str, device: str, minor: int, rate: int) -> list[str]:
    burst = max(_MIN_BURST, round(rate / 8 * _BURST_SECONDS))
    packets = min(max(round(rate / 8 * _QUEUE_SECONDS / _PACKET), 32), 1000)
    lines = [
        f"class {verb} dev {device} parent 1: classid 1:{minor:x} htb rate {rate}bit ceil {rate}bit "
        f"burst {burst} cburst {burst} quantum 1514"
    ]
    if verb == "add":
        lines.append(f"qdisc add dev {device} parent 1:{minor:x} pfifo limit {packets}")
    return lines


def _filter(device: str, address: str, minor: int, places: Places) -> str:
    parsed = ip_address(address)
    bucket, number = places.take(device, address)
    keyword = "ip" if parsed.version == 4 else "ip6"
    end = "dst" if device == DOWN else "src"
    return (
        f"filter add dev {device} parent 1: protocol {_protocol(parsed.version)} prio {parsed.version} "
        f"handle {parsed.version}:{bucket:x}:{number:x} u32 ht {parsed.version}:{bucket:x}: "
        f"match {keyword} {end} {parsed}/{parsed.max_prefixlen} flowid 1:{minor:x}"
    )


def _unfilter(device: str, address: str, places: Places) -> str:
    version = ip_address(address).version
    bucket, number = places.give_back(device, address)
    return (
        f"filter del dev {device} parent 1: protocol {_protocol(version)} prio {version} "
        f"handle {version}:{bucket:x}:{number:x} u32"
    )


def _protocol(version: int) -> str:
    return "ip" if version == 4 else "ipv6"


def batch(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
