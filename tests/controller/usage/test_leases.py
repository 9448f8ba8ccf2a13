"""However nodes, reports and clients are interleaved: all together pass at most the quota and one slice."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from controller.usage import leases
from controller.usage.leases import Held

MIB = 2**20


@pytest.mark.parametrize(
    ("quota", "expected"),
    [(1, 1), (9, 1), (10 * MIB, MIB), (1000 * MIB, 100 * MIB), (10**13, leases.MOST), (2**63 - 1, leases.MOST)],
)
def test_a_slice_is_a_tenth_and_never_too_much(quota: int, expected: int) -> None:
    assert leases.slice_bytes(quota) == expected


@given(st.integers(1, 2**63 - 1), st.integers(0, 2**63 - 1), st.integers(0, 500), st.integers(1, 2**40))
def test_the_openings_of_all_nodes_are_one_slice_at_most(quota: int, used: int, nodes: int, most: int) -> None:
    opening = leases.opening(quota, used, nodes, most)
    assert 0 <= opening * max(nodes, 1) <= min(leases.slice_bytes(quota, most), max(quota - used, 0))


def test_a_node_that_has_used_half_gets_a_full_slice_again() -> None:
    quota = 1000 * MIB
    held = {"a": Held(100 * MIB, 40 * MIB, 100 * MIB)}
    assert leases.renewed(quota, 40 * MIB, held, "a") == 100 * MIB
    held = {"a": Held(100 * MIB, 60 * MIB, 100 * MIB)}
    assert leases.renewed(quota, 60 * MIB, held, "a") == 160 * MIB


def test_near_the_end_the_rest_is_shared_and_used_up() -> None:
    quota = 100 * MIB
    used, held = 95 * MIB, {"a": Held(95 * MIB, 95 * MIB, 95 * MIB), "b": Held(0, 0, 0)}
    first = leases.renewed(quota, used, held, "a")
    assert first == 95 * MIB + 5 * MIB // 2
    while used < quota:
        allowance = leases.renewed(quota, used, {"a": Held(used, used, used)}, "a")
        assert used < allowance <= quota
        used = allowance


@dataclass
class Node:
    """By its own word; `told` and `opening` are what it goes by."""

    told: int | None = None
    opening: int = 0
    used: int = 0
    row: Held | None = None

    @property
    def limit(self) -> int:
        return self.opening if self.told is None else self.told


class Leases(RuleBasedStateMachine):
    """The controller's steps as it takes them: a report and its answer, a lease taken back and confirmed."""

    @initialize(quota=st.integers(1, 10**9), count=st.integers(1, 6), most=st.integers(1, 10**8))
    def begin(self, quota: int, count: int, most: int) -> None:
        self.quota, self.most, self.known = quota, most, 0
        opening = leases.opening(quota, 0, count, most)
        self.nodes = {f"n{number}": Node(opening=opening) for number in range(count)}

    @property
    def held(self) -> dict[str, Held]:
        return {name: node.row for name, node in self.nodes.items() if node.row is not None}

    def pick(self, index: int) -> tuple[str, Node]:
        return list(self.nodes.items())[index % len(self.nodes)]

    @rule(index=st.integers(0, 5), share=st.floats(0, 1))
    def clients_use(self, index: int, share: float) -> None:
        _, node = self.pick(index)
        node.used += round(max(node.limit - node.used, 0) * share)

    @rule(index=st.integers(0, 5))
    def report(self, index: int) -> None:
        name, node = self.pick(index)
        before = node.row or Held(0, 0, 0)
        self.known += node.used - before.used
        node.row = Held(before.allowance, node.used, before.reserved)
        if self.known < self.quota:
            self.allow(name, leases.renewed(self.quota, self.known, self.held, name, self.most))

    def allow(self, name: str, allowance: int) -> None:
        row = self.nodes[name].row
        assert row is not None
        self.nodes[name].row = Held(allowance, row.used, max(row.reserved, allowance))

    @rule(index=st.integers(0, 5))
    def node_hears(self, index: int) -> None:
        _, node = self.pick(index)
        if node.row is not None:
            node.told = node.row.allowance

    @rule(index=st.integers(0, 5))
    def take_back(self, index: int) -> None:
        name, node = self.pick(index)
        if node.row is not None:
            self.allow(name, leases.idle(self.quota, self.known, node.row, len(self.nodes), self.most))

    @rule(index=st.integers(0, 5))
    def confirm(self, index: int) -> None:
        """The node goes by it, and has reported since."""
        _, node = self.pick(index)
        if node.row is not None:
            self.node_hears(index)
            self.report(index)
            row = node.row
            if row.allowance <= (node.told or 0):
                node.row = Held(row.allowance, row.used, row.allowance)

    @rule(index=st.integers(0, 5))
    def help(self, index: int) -> None:
        name, node = self.pick(index)
        if node.row is not None and node.row.left == 0 and self.known < self.quota:
            self.allow(name, leases.helped(self.quota, self.known, self.held, name, len(self.nodes), self.most))

    @invariant()
    def no_more_than_the_quota_and_one_slice(self) -> None:
        if hasattr(self, "nodes"):
            allowed = sum(max(node.limit, node.used) for node in self.nodes.values())
            assert allowed <= self.quota + leases.slice_bytes(self.quota, self.most)
            assert sum(row.outstanding for row in self.held.values()) <= max(self.quota - self.known, 0)


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


@given(
    quota=st.integers(1, 10**9),
    used=st.integers(0, 10**9),
    rows=st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), max_size=6),
    most=st.integers(1, 10**8),
)
def test_a_new_quota_is_shared_within_its_bounds(quota: int, used: int, rows: list[tuple[int, int]], most: int) -> None:
    held = {f"n{number}": Held(allowance, used_, allowance) for number, (allowance, used_) in enumerate(rows)}
    allowances = leases.shared(quota, used, held, len(held), most)
    assert allowances.keys() == held.keys()
    left = sum(allowances[name] - lease.used for name, lease in held.items())
    assert left <= max(quota - used, 0)
    assert all(0 <= allowances[name] - lease.used <= leases.slice_bytes(quota, most) for name, lease in held.items())
