"""Credentials of OpenVPN, SSH and L2TP."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from controller.store.types import Table


class CredentialRow(Table):
    """A login of one protocol: the account's own on every node that offers it, or one connection's on one node."""

    __tablename__ = "credentials"
    __table_args__ = (
        sa.UniqueConstraint("protocol", "username", name="uq_credentials_username"),
        sa.Index("ix_credentials_tunnel", "tunnel", unique=True),
    )

    id: Mapped[str] = mapped_column(sa.String(36), primary_key=True)
    user_id: Mapped[str] = mapped_column(sa.ForeignKey("users.id", ondelete="CASCADE"), index=True)
    protocol: Mapped[str]
    username: Mapped[str]
    connection_id: Mapped[str | None] = mapped_column(sa.ForeignKey("connections.id"), unique=True)
    node_id: Mapped[str | None] = mapped_column(sa.ForeignKey("nodes.id"))  # of the connection; None = every node
    sealed_secret: Mapped[bytes]  # as the nodes get it
    public_keys: Mapped[str] = mapped_column(sa.Text)  # lines
    fingerprint: Mapped[bytes]
    certificate: Mapped[bytes | None]  # PEM, of an OpenVPN client
    tunnel: Mapped[int | None]  # of SSH: the number of its tun device; None until a node is told of it
    sealed_password: Mapped[bytes | None]  # that the controller made for a connection, for its client config
    sealed_private_key: Mapped[bytes | None]  # PEM, likewise
    sealed_tls_crypt: Mapped[bytes | None]  # PEM, likewise: the tls-crypt-v2 key of an OpenVPN client
    created_at: Mapped[datetime]
