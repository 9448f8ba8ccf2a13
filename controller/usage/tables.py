"""Sessions, usage by the hour, the limits of accounts, and what nodes were allowed of them."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from controller.store.types import Table


class SessionRow(Table):
    """A session of any protocol. Its counters are cumulative, so that hearing of it twice changes nothing."""

    __tablename__ = "vpn_sessions"
    __table_args__ = (
        sa.Index("ix_vpn_sessions_user", "user_id", "ended_at"),
        sa.Index("ix_vpn_sessions_ended", "ended_at"),
        sa.Index("ix_vpn_sessions_started", "started_at"),
    )

    node_id: Mapped[str] = mapped_column(sa.String(36), primary_key=True)
    id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    user_id: Mapped[str] = mapped_column(sa.ForeignKey("users.id", ondelete="CASCADE"))
    protocol: Mapped[str]
    username: Mapped[str]
    connection_id: Mapped[str | None]
    remote: Mapped[str]
    address: Mapped[str]
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    end_reason: Mapped[str | None]
    rx: Mapped[int]
    tx: Mapped[int]
    exact: Mapped[bool]  # the protocol has sessions; False = inferred from handshakes and traffic


class UsageRow(Table):
    """Bytes of an account by node, protocol and hour."""

    __tablename__ = "usage"
    __table_args__ = (sa.Index("ix_usage_hour", "hour"),)

    user_id: Mapped[str] = mapped_column(sa.ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    node_id: Mapped[str] = mapped_column(sa.String(36), primary_key=True)
    protocol: Mapped[str] = mapped_column(primary_key=True)
    hour: Mapped[datetime] = mapped_column(primary_key=True)
    rx: Mapped[int]
    tx: Mapped[int]


class LimitsRow(Table):
    """What an account may use; an account without a row is not limited. `used_bytes` is of the present period."""

    __tablename__ = "limits"
    __table_args__ = (sa.Index("ix_limits_period", "period_ends_at"), sa.Index("ix_limits_expires", "expires_at"))

    user_id: Mapped[str] = mapped_column(sa.ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    quota_bytes: Mapped[int | None]
    quota_period: Mapped[str]  # Period
    period_ends_at: Mapped[datetime | None]
    used_bytes: Mapped[int]
    expires_at: Mapped[datetime | None]
    max_sessions: Mapped[int | None]
    rate_up: Mapped[int | None]  # bits per second from the client
    rate_down: Mapped[int | None]
    told: Mapped[str]  # spaced: the thresholds that events were emitted for


class LeaseRow(Table):
    """How many bytes of a metered account a node was allowed, and has used, by that node's own count."""

    __tablename__ = "leases"

    node_id: Mapped[str] = mapped_column(sa.String(36), primary_key=True)
    user_id: Mapped[str] = mapped_column(sa.ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    ledger: Mapped[str]
    allowance: Mapped[int]  # that the node is told
    reserved: Mapped[int]  # the most that it may still go by: an allowance that was lowered and not seen yet
    used: Mapped[int]
