"""The store's own tables: what the database is, and how far each topic has come."""

from __future__ import annotations

from sqlalchemy.orm import Mapped, mapped_column

from controller.store.types import Table


class TopicRow(Table):
    """A counter that grows with every change of a topic, so that other processes see that there was one."""

    __tablename__ = "topics"

    name: Mapped[str] = mapped_column(primary_key=True)
    revision: Mapped[int]


class FactRow(Table):
    """Single facts about this database, such as its epoch."""

    __tablename__ = "facts"

    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]
