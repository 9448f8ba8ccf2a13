"""How results look: aligned columns for people, JSON for scripts; pure but for `Progress`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TextIO

import msgspec


def clean(text: str) -> str:
    """Without control characters: what a server calls itself must not drive the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(header), *([clean(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def fields(pairs: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name.ljust(width)}  {clean(value)}" for name, value in pairs)


def json_text(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def size(count: int) -> str:
    """Bytes in binary units, as `wg show` writes them."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def moment(seconds: int) -> str | None:
    """ISO 8601 in UTC, as the controller writes it; None for 0."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}" if seconds else None


def age(timestamp: str | None, now: datetime) -> str:
    """How long ago an RFC 3339 time was, in its largest unit; "never" for none."""
    if not timestamp:
        return "never"
    try:
        then = datetime.fromisoformat(timestamp)
    except ValueError:
        return timestamp
    seconds = max(0, int((now - (then if then.tzinfo else then.replace(tzinfo=UTC))).total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"


class Progress:
    """One line on stderr that is written over on a terminal; elsewhere a line for each new text."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._last = ""

    def show(self, text: str) -> None:
        if text == self._last:
            return
        self._last = text
        if self._terminal:
            self._stream.write(f"\r\x1b[K{clean(text)}")
        else:
            self._stream.write(f"{clean(text)}\n")
        self._stream.flush()

    def done(self) -> None:
        if self._terminal and self._last:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
        self._last = ""
