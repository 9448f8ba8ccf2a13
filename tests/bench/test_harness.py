"""The pure parts of the benchmarks: what a ratio is, when a goal is met, what the table and the trace say."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bench.harness import (
    Goal,
    Ratio,
    absolute,
    compared,
    dump_results,
    interleaved,
    load_results,
    markdown,
    not_measured,
    percentile,
    published,
    save,
    table,
)
from bench.material import peers, wg_file
from bench.strace import count_sets
from shared.keys import PrivateKey


def test_the_ratio_is_the_median_of_the_pairs_ratios_not_the_ratio_of_the_medians() -> None:
    pairs = [(1.0, 1.0), (10.0, 10.0), (3.0, 6.0), (4.0, 8.0), (5.0, 10.0)]
    result = compared("row", "measure", "s", pairs, against="it")
    assert result.ratio == 0.5
    assert (result.ours, result.theirs) == (4.0, 8.0)
    one_was_disturbed = compared("row", "measure", "s", [(1.0, 2.0), (100.0, 2.0), (1.1, 2.0)], against="it")
    assert one_was_disturbed.ratio == 0.55


def test_faster_says_how_many_times_less_time_we_need() -> None:
    result = compared("row", "measure", "s", [(0.5, 5.0)], against="it", kind=Ratio.FASTER, goal=Goal(at_least=10))
    assert result.ratio == 10
    assert result.met


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [
        (Goal(at_most=1.0), 1.0, True),
        (Goal(at_most=1.0), 1.01, False),
        (Goal(at_least=8), 8, True),
        (Goal(at_least=8), 7.9, False),
        (Goal(at_least=0.8, at_most=1.2), 1.3, False),
        (Goal(at_least=0.8, at_most=1.2), 0.7, False),
        (Goal(at_least=0.8, at_most=1.2), 1.0, True),
        (Goal(at_most=0), 0, True),
    ],
)
def test_goals(goal: Goal, value: float, met: bool) -> None:
    assert goal.met(value) is met


def test_without_another_side_the_goal_is_about_the_value_itself() -> None:
    assert absolute("row", "measure", "ms", 19.0, goal=Goal(at_most=20)).met
    assert absolute("row", "measure", "ms", 21.0, goal=Goal(at_most=20)).met is False
    assert absolute("row", "measure", "ms", 21.0).met is None


async def test_sides_alternate_and_the_warm_up_does_not_count() -> None:
    order: list[str] = []

    async def ours() -> float:
        order.append("A")
        return float(len(order))

    async def theirs() -> float:
        order.append("B")
        return -float(len(order))

    pairs = await interleaved(ours, theirs, 4)
    assert "".join(order) == "BA" + "AB" + "BA" + "AB" + "BA"
    assert pairs == [(3, -4), (6, -5), (7, -8), (10, -9)]


@pytest.mark.parametrize(("share", "value"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.001, 1)])
def test_percentile_is_the_nearest_rank(share: float, value: float) -> None:
    assert percentile([float(number) for number in range(100, 0, -1)], share) == value


def test_the_table_says_what_was_missed_and_what_was_not_measured() -> None:
    results = [
        compared("fast", "apply", "s", [(1.0, 2.0)], against="wg", goal=Goal(at_most=1.0)),
        compared("slow", "apply", "s", [(3.0, 2.0)], against="wg", goal=Goal(at_most=1.0)),
        absolute("plain", "memory", "MB", 12_345.0),
        not_measured("none", "push", "wrk is not installed"),
    ]
    head, rule, fast, slow, plain, none = table(results).splitlines()
    assert head.split() == ["row", "measure", "ours", "against", "theirs", "ratio", "goal", "met"]
    assert set(rule) == {"-", " "}
    assert fast.endswith("yes") and "0.5 ×" in fast and "≤ 1 ×" in fast
    assert slow.endswith("NO")
    assert "12,345 MB" in plain and plain.endswith("–")
    assert "not measured:  wrk is not installed" in none and none.endswith("–")


def test_results_survive_the_way_out_of_the_guest() -> None:
    results = [
        compared("row", "measure", "s", [(1.0, 2.0)], against="it", kind=Ratio.FASTER, goal=Goal(at_least=1.5)),
        absolute("row", "count", "", 0.0, goal=Goal(at_most=0)),
        not_measured("row", "measure", "why"),
    ]
    assert load_results(dump_results(results)) == results


def test_the_file_has_every_pair_and_the_machine(tmp_path: Path) -> None:
    results = [compared("row", "measure", "s", [(1.0, 2.0), (1.0, 4.0)], against="it", goal=Goal(at_most=1.0))]
    path = save(results, tmp_path / "results", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), {"cores": 2})
    assert path.name == "2026-01-02T030405.json"
    written = json.loads(path.read_text())
    assert written["machine"] == {"cores": 2}
    assert written["results"][0]["pairs"] == [[1.0, 2.0], [1.0, 4.0]]
    assert written["results"][0]["met"] is True


def test_figures_replace_those_of_the_last_run_and_nothing_else() -> None:
    figures = markdown(
        [compared("fast", "apply", "s", [(1.0, 2.0)], against="wg", goal=Goal(at_most=1.0))],
        {"cpu": "one", "cores": 2},
        datetime(2026, 1, 2, tzinfo=UTC),
    )
    page = "before\n<!-- figures -->\nold\n<!-- end of figures -->\nafter\n"
    written = published(page, figures)
    assert written.startswith("before\n<!-- figures -->\n2026-01-02: cpu one, cores 2.\n")
    assert "| fast | apply | 1 s | wg | 2 s | 0.5 × (ours / theirs) | ≤ 1 × | yes |\n<!-- end" in written
    assert written.endswith("<!-- end of figures -->\nafter\n") and "old" not in written
    assert published(written, figures) == written
    with pytest.raises(ValueError, match="figures"):
        published("a page without marks", figures)


def test_both_sides_get_the_same_peers(tmp_path: Path) -> None:
    fleet = peers(300)
    assert fleet == peers(300)
    assert fleet[10:] == peers(290, first=10)
    assert len({peer.public_key for peer in fleet}) == len({ip for peer in fleet for ip in peer.allowed_ips}) / 2 == 300
    text = wg_file(tmp_path / "wg.conf", PrivateKey.generate(), 51820, fleet).read_text()
    for peer in fleet:
        peer.check()
        assert f"PublicKey = {peer.key}\n" in text
        assert f"AllowedIPs = {', '.join(peer.allowed_ips)}\n" in text
    assert (tmp_path / "wg.conf").stat().st_mode & 0o077 == 0


def test_set_messages_are_counted_in_the_trace_and_nothing_else() -> None:
    assert count_sets('12 sendto(9, "set=1\\npublic_key=00", 19, 0, NULL, 0) = 19\n') == 1
    assert count_sets('12 sendto(9, "get=1\\n\\n", 7, 0, NULL, 0) = 7\n') == 0
    kernel = (
        "12 sendto(7, [{nlmsg_len=36, nlmsg_type=0x1f, nlmsg_flags=NLM_F_REQUEST|NLM_F_ACK, nlmsg_seq=3, nlmsg_pid=0}, "
        '"\\x{command}\\x01\\x00\\x00\\x08\\x00"], 36, 0, NULL, 0) = 36\n'
    )
    assert count_sets(kernel.replace("{command}", "01")) == 1
    assert count_sets(kernel.replace("{command}", "00")) == 0
