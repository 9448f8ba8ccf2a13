"""The outbox: what was emitted, in order, written in the transaction that it tells of."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from controller.store.types import Table


class EventRow(Table):
    __tablename__ = "events"

    id: Mapped[str] = mapped_column(sa.String(36), primary_key=True)  # UUIDv7: in the order of time
    at: Mapped[datetime]
    kind: Mapped[str]
    user_id: Mapped[str | None] = mapped_column(sa.ForeignKey("users.id", ondelete="CASCADE"), index=True)
    data: Mapped[str] = mapped_column(sa.Text)  # JSON
