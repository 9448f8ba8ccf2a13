"""How moments are written and read (RFC 3339); pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated

from pydantic import AwareDatetime, BeforeValidator, Field, WithJsonSchema

Moment = Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]
"""A moment in a body, as `rfc3339` writes it."""


def _dated(value: object) -> object:
    """A number would be taken for seconds, or, where it is large, for milliseconds since 1970."""
    if not isinstance(value, str) or not re.match(r"[0-9]{4}-", value):
        raise ValueError("expected a time like 2030-01-31T12:00:00Z")
    return value


GivenMoment = Annotated[AwareDatetime, Field(strict=False), BeforeValidator(_dated)]
"""A moment that a client gives, with its offset from UTC."""


def rfc3339(moment: datetime, timespec: str = "seconds") -> str:
    return moment.astimezone(UTC).isoformat(timespec=timespec).replace("+00:00", "Z")
