"""Connections, the addresses that they hold, and how far each node's reports are counted."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from controller.store.types import Table


class ConnectionRow(Table):
    """One connection of an account to a node. `ended_at` is set once and for ever."""

    __tablename__ = "connections"
    __table_args__ = (
        # One live connection per key and node: two of them would steal each other's addresses.
        sa.Index(
            "uq_connections_live_key",
            "node_id",
            "public_key",
            unique=True,
            sqlite_where=sa.text("ended_at IS NULL"),
            postgresql_where=sa.text("ended_at IS NULL"),
        ),
        sa.Index("ix_connections_key", "node_id", "public_key", "created_at"),
        sa.Index("ix_connections_user_live", "user_id", "ended_at"),
        sa.Index("ix_connections_ended", "ended_at"),
    )

    id: Mapped[str] = mapped_column(sa.String(36), primary_key=True)
    user_id: Mapped[str] = mapped_column(sa.ForeignKey("users.id", ondelete="CASCADE"))
    node_id: Mapped[str] = mapped_column(sa.ForeignKey("nodes.id"))
    contract: Mapped[str]
    protocol: Mapped[str]
    device_id: Mapped[str | None]
    created_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    end_reason: Mapped[str | None]
    public_key: Mapped[bytes]  # of other protocols than WireGuard: the SHA-256 of the credential's name
    sealed_private_key: Mapped[bytes | None]  # encrypted; None = the client made the key; forgotten at the end
    sealed_preshared_key: Mapped[bytes | None]
    generation: Mapped[str | None]  # of the node's interface, for the counters below
    last_rx: Mapped[int]  # counters as last reported in that generation
    last_tx: Mapped[int]
    last_handshake: Mapped[int]  # Unix seconds as last reported; 0 = never
    rx: Mapped[int]  # bytes in all
    tx: Mapped[int]
    handshake_at: Mapped[datetime | None]  # of this connection, not of an earlier one with the same key


class AllocationRow(Table):
    """An address pair in use, or (connection_id NULL) cooling down since `released_at`.

    `slot` counts from the pool's first client address; the IPv4 and the IPv6 address both follow from it.
    """

    __tablename__ = "allocations"
    __table_args__ = (sa.Index("ix_allocations_released", "node_id", "released_at"),)

    node_id: Mapped[str] = mapped_column(sa.ForeignKey("nodes.id"), primary_key=True)
    slot: Mapped[int] = mapped_column(primary_key=True)
    connection_id: Mapped[str | None] = mapped_column(sa.ForeignKey("connections.id"), unique=True)
    released_at: Mapped[datetime | None]


class ReportMarkRow(Table):
    """The newest report of a node that is counted, committed together with the counts: a replay changes nothing."""

    __tablename__ = "report_marks"

    # No foreign key: a node may be deleted while its last report is on the way.
    node_id: Mapped[str] = mapped_column(sa.String(36), primary_key=True)
    boot_id: Mapped[str]
    sequence: Mapped[int]
    former_boot_ids: Mapped[str] = mapped_column(sa.Text)  # spaced, the newest last
