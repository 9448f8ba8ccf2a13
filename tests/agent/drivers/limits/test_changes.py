"""The texts for nft and tc, followed step by step by a model of what the kernel would have."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from agent.drivers.base import Allowed
from agent.drivers.limits import shaping, table
from agent.drivers.limits.shaping import DOWN, UP, Places, Shape

ADDRESSES = [f"10.66.{third}.{last}" for third in range(3) for last in (7, 8)] + ["fd66::7", "fd66::1:7"]


@st.composite
def accounts(draw: st.DrawFn) -> list[Allowed]:
    """An address and a user belong to one account."""
    owners = draw(st.lists(st.integers(1, 4), min_size=len(ADDRESSES), max_size=len(ADDRESSES)))
    made = []
    for account in range(1, 5):
        if draw(st.booleans()):
            made.append(
                Allowed(
                    account,
                    addresses=tuple(a for a, owner in zip(ADDRESSES, owners, strict=True) if owner == account),
                    uids=tuple(200_000 + account * 10 + n for n in range(draw(st.integers(0, 2)))),
                    rate_up=draw(st.sampled_from([0, 8_000, 10**9])),
                    rate_down=draw(st.sampled_from([0, 8_000, 10**9])),
                    remaining=draw(st.sampled_from([None, 0, 5_000_000])),
                    grant=draw(st.integers(0, 2)),
                )
            )
    return made


class Table:
    """What nft would have after each line; a line that nft would refuse fails."""

    def __init__(self) -> None:
        self.objects: dict[str, str] = {}
        self.elements: dict[tuple[str, str], str] = {}

    def run(self, text: str) -> None:
        for line in text.splitlines():
            if found := re.fullmatch(r"delete element inet skynetvpn_limits (\w+) { (\S+) }", line):
                del self.elements[found[1], found[2]]
            elif found := re.fullmatch(r"add element inet skynetvpn_limits (\w+) { (\S+) : (\S+) }", line):
                assert (found[1], found[2]) not in self.elements
                kind = "limit" if found[1].startswith("speed") else "quota"
                assert found[1] == "mark_of" or f"{kind} {found[3].strip(chr(34))}" in self.objects
                self.elements[found[1], found[2]] = found[3]
            elif found := re.fullmatch(r"delete (quota|limit) inet skynetvpn_limits (\w+)", line):
                assert f'"{found[2]}"' not in self.elements.values(), "it is in use"
                del self.objects[f"{found[1]} {found[2]}"]
            else:
                found = re.fullmatch(r"add (quota|limit) inet skynetvpn_limits (\w+) { (.+) }", line)
                assert found is not None, line
                assert f"{found[1]} {found[2]}" not in self.objects
                self.objects[f"{found[1]} {found[2]}"] = found[3]


@given(st.lists(accounts(), min_size=1, max_size=4))
def test_every_change_of_the_table_can_be_done_and_ends_where_it_should(steps: list[list[Allowed]]) -> None:
    kernel, before = Table(), table.Content()
    for step in steps:
        after = table.content(step)
        kept = before.objects.keys() & after.objects.keys()
        quotas = {name: kernel.objects[name] for name in kept if name.startswith("quota")}
        kernel.run(table.change(before, after))
        assert kernel.elements == after.elements
        assert kernel.objects.keys() == after.objects.keys()
        assert {name: kernel.objects[name] for name in quotas} == quotas  # a quota that stays keeps its count
        limits = {name: text for name, text in after.objects.items() if name.startswith("limit")}
        assert {name: kernel.objects[name] for name in limits} == limits
        before = after


class Queues:
    """The classes and filters of the ifb devices after each line of tc."""

    def __init__(self) -> None:
        self.classes: dict[tuple[str, str], str] = {}
        self.filters: dict[tuple[str, str], tuple[str, str, str]] = {}

    def run(self, lines: list[str]) -> None:
        for line in lines:
            words = line.split()
            device = words[words.index("dev") + 1]
            if words[0] == "class":
                key = (device, words[words.index("classid") + 1])
                assert (words[1] == "add") == (key not in self.classes)
                if words[1] == "del":
                    assert key[1] not in {flow for (on, _), (_, _, flow) in self.filters.items() if on == device}
                    del self.classes[key]
                else:
                    self.classes[key] = words[words.index("rate") + 1]
            elif words[0] == "filter":
                place = (device, words[words.index("handle") + 1])
                if words[1] == "del":
                    del self.filters[place]
                else:
                    assert place not in self.filters
                    assert place[1].startswith(words[words.index("ht") + 1])
                    flow = words[words.index("flowid") + 1]
                    assert (device, flow) in self.classes
                    end = words.index("dst" if device == DOWN else "src")
                    self.filters[place] = (words[end - 1], words[end + 1], flow)


@given(st.lists(accounts(), min_size=1, max_size=4))
def test_every_change_of_the_queues_can_be_done_and_ends_where_it_should(steps: list[list[Allowed]]) -> None:
    kernel, places, before = Queues(), Places(), dict[int, Shape]()
    for step in steps:
        after = {
            each.account: Shape(
                each.account,
                {device: rate for device, rate in ((UP, each.rate_up), (DOWN, each.rate_down)) if rate},
                each.addresses,
            )
            for each in step
            if each.addresses
        }
        kernel.run(shaping.change(before, after, places))
        assert kernel.classes == {
            (device, f"1:{shape.minor:x}"): f"{rate}bit"
            for shape in after.values()
            for device, rate in shape.rates.items()
        }
        assert sorted((device, *found) for (device, _), found in kernel.filters.items()) == sorted(
            (
                device,
                "ip6" if ":" in address else "ip",
                f"{address}/{128 if ':' in address else 32}",
                f"1:{shape.minor:x}",
            )
            for shape in after.values()
            for device in shape.rates
            for address in shape.addresses
        )
        before = after
