"""Interleaved pairs, medians of their ratios, goals, the table and the JSON file; pure but for `save` and `machine`."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

MARK = "bench-results: "  # before the results that another process prints
_BEGIN, _END = "<!-- figures -->", "<!-- end of figures -->"

Side = Callable[[], Awaitable[float]]  # one run of one side: what it took, or achieved


class Ratio(StrEnum):
    """How the two sides of a pair become one number."""

    TIMES_OURS = "ours / theirs"  # a time or a size: smaller is better; a rate: larger is better
    FASTER = "theirs / ours"  # how many times less time we need


@dataclass(frozen=True, slots=True)
class Goal:
    at_most: float | None = None
    at_least: float | None = None

    def met(self, value: float) -> bool:
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)

    def text(self, unit: str) -> str:
        bounds = [f"≥ {self.at_least:g}"] if self.at_least is not None else []
        bounds += [f"≤ {self.at_most:g}"] if self.at_most is not None else []
        return f"{' and '.join(bounds)} {unit}"


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table. Without `against` the goal is about `ours` itself, else about the ratio."""

    row: str
    measure: str
    unit: str
    ours: float | None = None
    against: str = ""
    theirs: float | None = None
    ratio: float | None = None
    kind: Ratio = Ratio.TIMES_OURS
    goal: Goal | None = None
    note: str = ""
    pairs: list[tuple[float, float]] = field(default_factory=list)
    missing: str = ""  # why it was not measured

    @property
    def met(self) -> bool | None:
        value = self.ratio if self.against else self.ours
        return None if self.goal is None or value is None else self.goal.met(value)


def compared(
    row: str,
    measure: str,
    unit: str,
    pairs: Sequence[tuple[float, float]],
    *,
    against: str,
    goal: Goal | None = None,
    kind: Ratio = Ratio.TIMES_OURS,
    note: str = "",
) -> Result:
    """The median of the pairs' ratios: what slows the machine for a while slows both sides of a pair."""
    ratios = [ours / theirs if kind is Ratio.TIMES_OURS else theirs / ours for ours, theirs in pairs]
    return Result(
        row=row,
        measure=measure,
        unit=unit,
        ours=statistics.median(ours for ours, _ in pairs),
        against=against,
        theirs=statistics.median(theirs for _, theirs in pairs),
        ratio=statistics.median(ratios),
        kind=kind,
        goal=goal,
        note=note,
        pairs=[(ours, theirs) for ours, theirs in pairs],
    )


def absolute(row: str, measure: str, unit: str, value: float, *, goal: Goal | None = None, note: str = "") -> Result:
    return Result(row=row, measure=measure, unit=unit, ours=value, goal=goal, note=note)


def not_measured(row: str, measure: str, why: str) -> Result:
    return Result(row=row, measure=measure, unit="", missing=why)


async def interleaved(ours: Side, theirs: Side, pairs: int, *, warm_up: int = 1) -> list[tuple[float, float]]:
    """Run A B, B A, A B, …: neither side always has the other's leftovers (caches, garbage) before it."""
    found: list[tuple[float, float]] = []
    for number in range(-warm_up, pairs):
        if number % 2:
            second = await theirs()
            first = await ours()
        else:
            first = await ours()
            second = await theirs()
        if number >= 0:
            found.append((first, second))
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them does not pass (nearest rank)."""
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * share // 1))
    return ordered[int(rank) - 1]


def table(results: Sequence[Result]) -> str:
    head = ("row", "measure", "ours", "against", "theirs", "ratio", "goal", "met")
    lines = [head, *map(_cells, results)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def _cells(result: Result) -> tuple[str, ...]:
    if result.missing:
        return (result.row, result.measure, "not measured:", result.missing, "", "", "", "–")
    ratio = "" if result.ratio is None else f"{_number(result.ratio)} × ({result.kind})"
    goal = "" if result.goal is None else result.goal.text("×" if result.against else result.unit)
    met = {True: "yes", False: "NO", None: "–"}[result.met]
    return (
        result.row,
        result.measure,
        _quantity(result.ours, result.unit),
        result.against,
        _quantity(result.theirs, result.unit),
        ratio,
        goal,
        met,
    )


def _quantity(value: float | None, unit: str) -> str:
    return "" if value is None else f"{_number(value)} {unit}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def save(results: Sequence[Result], directory: Path, moment: datetime, described: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{moment:%Y-%m-%dT%H%M%S}.json"
    rows = [asdict(result) | {"met": result.met} for result in results]
    path.write_text(json.dumps({"at": moment.isoformat(), "machine": described, "results": rows}, indent=1) + "\n")
    return path


def markdown(results: Sequence[Result], described: dict[str, Any], moment: datetime) -> str:
    """The figures as a Markdown table, under the machine that they are from."""
    head = ("row", "measure", "ours", "against", "theirs", "ratio", "goal", "met")
    lines = [head, tuple("---" for _ in head), *map(_cells, results)]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    machine_text = ", ".join(f"{key} {value}" for key, value in described.items())
    return f"{moment:%Y-%m-%d}: {machine_text}.\n\n{rows}\n"


def published(page: str, figures: str) -> str:
    """The page with these figures between its marks."""
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"the page has no {_BEGIN} … {_END}")
    return f"{before}{begin}\n{figures}{end}{after}"


def load_results(text: str) -> list[Result]:
    """Results that another process printed as JSON (the guest), behind MARK."""
    return [
        Result(
            **{
                **row,
                "goal": Goal(**row["goal"]) if row["goal"] else None,
                "kind": Ratio(row["kind"]),
                "pairs": [(ours, theirs) for ours, theirs in row["pairs"]],
            }
        )
        for row in json.loads(text)
    ]


def dump_results(results: Sequence[Result]) -> str:
    return json.dumps([asdict(result) for result in results])
