"""Cumulative counters become sums that nothing distorts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from controller.tunnels.counters import MAX_COUNT, Counters, count, plausible

counts = st.integers(0, MAX_COUNT)
NEW = Counters(None, 0, 0, 0, 0)


@given(counts, counts)
def test_the_same_counters_again_add_nothing(rx: int, tx: int) -> None:
    once = count(NEW, "g1", rx, tx)
    assert count(once, "g1", rx, tx) == once


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000), st.booleans())))
def test_the_sum_is_the_traffic_whatever_is_made_anew(steps: list[tuple[int, int, bool]]) -> None:
    counters, rx, tx, generation = NEW, 0, 0, 0
    for more_rx, more_tx, anew in steps:
        if anew:
            generation, rx, tx = generation + 1, 0, 0
        rx, tx = rx + more_rx, tx + more_tx
        counters = count(counters, str(generation), rx, tx)
    assert (counters.rx, counters.tx) == (sum(step[0] for step in steps), sum(step[1] for step in steps))


def test_a_peer_made_anew_on_the_same_interface_counts_from_zero() -> None:
    before = count(NEW, "g1", 1000, 500)
    assert count(before, "g1", 10, 600) == Counters("g1", 10, 600, 1010, 1100)


@given(counts, counts, counts, counts)
def test_a_sum_never_falls_and_never_leaves_its_column(rx: int, tx: int, next_rx: int, next_tx: int) -> None:
    before = count(Counters("g0", 0, 0, rx, tx), "g1", rx, tx)
    after = count(before, "g1", next_rx, next_tx)
    assert before.rx <= after.rx <= MAX_COUNT
    assert before.tx <= after.tx <= MAX_COUNT


def test_what_no_link_can_carry_is_not_plausible() -> None:
    assert plausible(NEW, count(NEW, "g1", 10_000, 0), 0.0, 1000)
    assert not plausible(NEW, count(NEW, "g1", 10_001, 0), 0.0, 1000)
    assert not plausible(NEW, count(NEW, "g1", 0, 10_001), -50.0, 1000)
    assert plausible(NEW, count(NEW, "g1", 0, 10_001), 1.0, 1000)


def test_the_next_connection_of_a_peer_starts_at_its_counters() -> None:
    before = count(NEW, "g1", 1000, 500)
    assert count(before.baseline(), "g1", 1010, 500) == Counters("g1", 1010, 500, 10, 0)
