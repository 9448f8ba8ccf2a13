"""The nftables table of byte allowances, and of the speed of logins that have no address of their own (SSH); pure.

A quota object counts both directions of all addresses and users of an account, and drops what is beyond it: exact,
however seldom the agent looks. What a user's processes receive is known by the mark of the connection that they opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address

from agent.drivers.base import Allowed

TABLE = "inet skynetvpn_limits"
# A packet that would go beyond is dropped whole, and the host joins segments to packets of up to so many bytes: without
# it an account would be left with a rest that nothing fits into, and never be seen to have used up its allowance.
_CUSHION = 65_536
_MIN_BURST = 15_000  # bytes; less would cut single segments of a big-packet host
_BURST_SECONDS = 0.2
_KEYS = {
    "addresses4": "ipv4_addr : quota",
    "addresses6": "ipv6_addr : quota",
    "users": "uid : quota",
    "marks": "mark : quota",
    "mark_of": "uid : mark",
    "speed_up": "uid : limit",
    "speed_down": "mark : limit",
}


@dataclass(frozen=True, slots=True)
class Content:
    objects: Mapping[str, str] = field(default_factory=dict)  # `quota NAME` or `limit NAME` -> definition
    elements: Mapping[tuple[str, str], str] = field(default_factory=dict)  # (map, key) -> value


def content(accounts: Iterable[Allowed]) -> Content:
    objects: dict[str, str] = {}
    elements: dict[tuple[str, str], str] = {}
    for each in accounts:
        if each.remaining is not None:
            name = f"a{each.account}_{each.grant}"
            objects[f"quota {name}"] = f"over {each.remaining + _CUSHION if each.remaining else 1} bytes"
            for address in each.addresses:
                elements[f"addresses{ip_address(address).version}", address] = f'"{name}"'
            for uid in each.uids:
                elements["users", str(uid)] = elements["marks", str(uid)] = f'"{name}"'
        if each.uids and (each.remaining is not None or each.rate_down):
            elements |= {("mark_of", str(uid)): str(uid) for uid in each.uids}
        for direction, rate in (("up", each.rate_up), ("down", each.rate_down)):
            if rate and each.uids:
                name = f"{direction}{each.account}"
                objects[f"limit {name}"] = _limit(rate)
                elements |= {(f"speed_{direction}", str(uid)): f'"{name}"' for uid in each.uids}
    return Content(objects, elements)


def create() -> str:
    """The empty table, in place of whatever was there."""
    maps = "".join(f"\tmap {name} {{ type {types}; }}\n" for name, types in _KEYS.items())
    chains = (
        _chain(
            "forward",
            *(f"quota name {key} map @addresses4 drop" for key in ("ip saddr", "ip daddr")),
            *(f"quota name {key} map @addresses6 drop" for key in ("ip6 saddr", "ip6 daddr")),
        )
        + _chain(
            "output",
            "ct mark set meta skuid map @mark_of",
            "quota name meta skuid map @users drop",
            "limit name meta skuid map @speed_up drop",
        )
        + _chain("input", "quota name ct mark map @marks drop", "limit name ct mark map @speed_down drop")
    )
    return f"table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n{maps}{chains}}}\n"


def remove() -> str:
    return f"table {TABLE}\ndelete table {TABLE}\n"


def change(before: Content, after: Content) -> str:
    """One transaction from one content to the other. An object that stays keeps what it has counted: a quota is
    changed by taking another name (its grant), and a speed in the same way as long as nothing else is there."""
    lines = []
    gone = {key: value for key, value in before.elements.items() if after.elements.get(key) != value}
    redefined = {name for name, text in before.objects.items() if name in after.objects and after.objects[name] != text}
    speeds = {name for name in redefined if name.startswith("limit ")}
    gone |= {key: value for key, value in before.elements.items() if f"limit {value[1:-1]}" in speeds}
    lines += [f"delete element {TABLE} {map_} {{ {key} }}" for map_, key in gone]
    dropped = [name for name in before.objects if name not in after.objects or name in speeds]
    lines += [f"delete {_placed(name)}" for name in dropped]
    lines += [
        f"add {_placed(name)} {{ {text} }}"
        for name, text in after.objects.items()
        if name not in before.objects or name in speeds
    ]
    lines += [
        f"add element {TABLE} {map_} {{ {key} : {value} }}"
        for (map_, key), value in after.elements.items()
        if (map_, key) in gone or before.elements.get((map_, key)) != value
    ]
    return "".join(f"{line}\n" for line in lines)


def _placed(name: str) -> str:
    kind, _, bare = name.partition(" ")
    return f"{kind} {TABLE} {bare}"


def _limit(rate: int) -> str:
    """A speed in bits per second as a policer: TCP finds it by itself."""
    per_second = max(rate // 8, 1)
    return f"rate over {per_second} bytes/second burst {max(_MIN_BURST, round(per_second * _BURST_SECONDS))} bytes"


def _chain(hook: str, *rules: str) -> str:
    lines = "".join(f"\t\t{rule}\n" for rule in rules)
    return f"\tchain {hook} {{\n\t\ttype filter hook {hook} priority filter - 5; policy accept;\n{lines}\t}}\n"
