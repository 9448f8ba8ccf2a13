"""How moments are written (RFC 3339); pure."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from pydantic import WithJsonSchema

Moment = Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]
"""A moment in a body, as `rfc3339` writes it."""


def rfc3339(moment: datetime, timespec: str = "seconds") -> str:
    return moment.astimezone(UTC).isoformat(timespec=timespec).replace("+00:00", "Z")
