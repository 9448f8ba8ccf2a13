from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import pytest

from shared.settings import SettingsError, check, load


class Level(StrEnum):
    LOW = "low"
    HIGH = "high"


def even(value: int) -> int:
    if value % 2:
        raise ValueError("expected an even number")
    return value


@dataclass(frozen=True)
class Inner:
    size: int = field(default=2, metadata=check(even))
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    url: str
    level: Level = Level.LOW
    place: Path | None = None
    ratio: float = 0.5
    on: bool = False
    inner: Inner = Inner()
    each: dict[str, Inner] = field(default_factory=dict)


def read(mapping: object, **environ: str) -> Outer:
    return load(Outer, mapping, environ=environ, prefix="APP", source="app.yaml")  # type: ignore[arg-type]


def test_a_file_is_read_into_types() -> None:
    outer = read(
        {
            "url": "x",
            "level": "high",
            "place": "/srv",
            "ratio": 1,
            "on": True,
            "inner": {"size": 4, "names": ["a"]},
            "each": {"one": {"size": 6}},
        }
    )
    assert outer == Outer("x", Level.HIGH, Path("/srv"), 1.0, True, Inner(4, ("a",)), {"one": Inner(6)})


def test_the_environment_overrides_the_file() -> None:
    outer = read({"url": "x"}, APP_URL="y", APP_ON="true", APP_INNER__SIZE="8", APP_INNER__NAMES="a, b", APP_RATIO="2")
    assert outer == Outer("y", on=True, ratio=2.0, inner=Inner(8, ("a", "b")))


def test_every_problem_is_told_at_once_with_its_place() -> None:
    with pytest.raises(SettingsError) as refused:
        read(
            {"level": "middle", "ratio": "fast", "inner": {"size": 3, "sise": 4}, "colour": 1, "each": {"a": {"x": 1}}},
            APP_ON="yes",
        )
    problems = "\n".join(refused.value.problems)
    for expected in (
        "url: missing",
        "level: expected one of low, high",
        "ratio: expected a number",
        "inner.size: expected an even number",
        "inner.sise: unknown setting",
        "colour: unknown setting",
        "each: x: unknown setting",
        "on (from APP_ON): expected true or false",
    ):
        assert expected in problems
    assert str(refused.value).startswith("app.yaml: ")


@pytest.mark.parametrize("mapping", [None, [], "text", 7])
def test_a_file_that_is_no_mapping_is_told(mapping: object) -> None:
    with pytest.raises(SettingsError, match="expected keys and values"):
        read(mapping)


@pytest.mark.parametrize("value", [True, "1", None, [1]])
def test_types_are_not_guessed(value: object) -> None:
    with pytest.raises(SettingsError):
        read({"url": "x", "inner": {"size": value}})


def test_null_is_for_optional_settings_only() -> None:
    assert read({"url": "x", "place": None}).place is None
    with pytest.raises(SettingsError):
        read({"url": None})
