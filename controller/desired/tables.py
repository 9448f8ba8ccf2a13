"""What each scope must run, one row per resource, and each scope's revision and digest."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from controller.store.types import Table


class ScopeRow(Table):
    """`revision` counts the scope's changes. Tombstones up to `floor` are gone: an older base needs a snapshot."""

    __tablename__ = "scopes"

    scope: Mapped[str] = mapped_column(primary_key=True)
    revision: Mapped[int]
    floor: Mapped[int]
    digest: Mapped[bytes]  # of all resources that are not deleted


class DesiredRow(Table):
    """A resource, or (deleted) its tombstone, at the revision that changed it last."""

    __tablename__ = "desired"
    __table_args__ = (sa.Index("ix_desired_revision", "scope", "revision"),)

    scope: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    revision: Mapped[int]
    payload: Mapped[bytes]
    deleted: Mapped[bool] = mapped_column(default=False)
