"""What options take, and what is said of a value that they do not; pure."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime

from controller.usage.periods import Period
from shared.resource import Protocol

_WEEK = 7 * 24 * 60  # minutes


def protocols(text: str) -> list[Protocol]:
    try:
        return [Protocol(name) for name in text.split(",") if name]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; use any of {','.join(Protocol)}, with commas") from error


def yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no")
    return text == "yes"


def token_minutes(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= _WEEK):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {_WEEK}, which is a week")
    return int(text)


def period(text: str) -> Period:
    try:
        return Period(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(Period)}") from error


def number_or_none(text: str) -> int | None:
    try:
        return None if text == "none" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number, such as 5000000000, nor none") from error


def moment_or_none(text: str) -> datetime | None:
    """RFC 3339; a day alone begins at midnight UTC."""
    if text == "none":
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        allowed = "neither a day, such as 2027-01-31, nor a time, such as 2027-01-31T12:00:00Z, nor none"
        raise argparse.ArgumentTypeError(f"{text!r} is {allowed}") from error
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
