"""How answers look: lines with tabs or named fields for people, JSON for scripts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

import msgspec

_THOUSAND = 1000


def add_output(parser: argparse.ArgumentParser, default: str = argparse.SUPPRESS) -> None:
    """Of a command; the program's has a default, so that what was said before the command's name holds."""
    parser.add_argument(
        "-o", "--output", choices=("text", "json"), default=default, help="json: one JSON value, with exact numbers"
    )
    parser.set_defaults(tells=True)


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def tell(arguments: argparse.Namespace, value: object, text: Callable[[], str]) -> None:
    say(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() if arguments.output == "json" else text())


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A line each, with tabs between the cells."""
    return "\n".join("\t".join(map(str, line)) for line in (header, *rows))


def fields(shown: Mapping[str, object]) -> str:
    return "\n".join(f"{name:12}{text}" for name, text in shown.items())


def moment(when: datetime | None) -> str | None:
    """ISO 8601 in UTC."""
    return f"{when.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}" if when is not None else None


def amount(count: int, unit: str = "B") -> str:
    """In decimal units, as limits are given: 1.5 GB, 20 Mbit/s."""
    value, prefixes = float(count), ["", "k", "M", "G", "T"]
    while value >= _THOUSAND and len(prefixes) > 1:
        value /= _THOUSAND
        prefixes.pop(0)
    return f"{value:.4g} {prefixes[0]}{unit}"
