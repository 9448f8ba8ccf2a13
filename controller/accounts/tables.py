"""Accounts and their login sessions."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from controller.store.types import Table


class UserRow(Table):
    """An account. `number` is the integer id for contracts that document one; `*_key` is the case-folded form."""

    __tablename__ = "users"

    number: Mapped[int] = mapped_column(
        sa.BigInteger().with_variant(sa.Integer, "sqlite"),  # there only an INTEGER counts by itself
        primary_key=True,
        autoincrement=True,
    )
    id: Mapped[str] = mapped_column(sa.String(36), unique=True)
    username: Mapped[str]
    username_key: Mapped[str] = mapped_column(unique=True)
    email: Mapped[str]
    email_key: Mapped[str] = mapped_column(unique=True)
    email_verified: Mapped[bool]
    password_hash: Mapped[str]
    role: Mapped[str]  # Role
    plan: Mapped[str]  # Plan
    active: Mapped[bool]
    protocols: Mapped[str | None]  # spaced, that it may use; None = whatever its servers offer
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class LoginSessionRow(Table):
    """A login. Only the SHA-256 of its token is kept; ending the session deletes the row."""

    __tablename__ = "login_sessions"

    id: Mapped[str] = mapped_column(sa.String(36), primary_key=True)
    user_id: Mapped[str] = mapped_column(sa.ForeignKey("users.id", ondelete="CASCADE"), index=True)
    contract: Mapped[str]  # the contract whose login issued the token
    token_hash: Mapped[bytes] = mapped_column(unique=True)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime] = mapped_column(index=True)
    ip_address: Mapped[str]
    user_agent: Mapped[str]
