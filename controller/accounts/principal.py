"""Who is asking: what a valid token says about its holder."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class Role(StrEnum):
    USER = "user"
    ADMIN = "admin"


class Plan(StrEnum):
    """In the order of what they include."""

    FREE = "free"
    PRO = "pro"
    ENTERPRISE = "enterprise"

    def includes(self, other: Plan) -> bool:
        order = list(Plan)
        return order.index(self) >= order.index(other)


@dataclass(frozen=True, slots=True)
class Principal:
    user_id: str
    number: int
    username: str
    role: Role
    plan: Plan
    session_id: str
    contract: str
    logged_in_at: datetime
    token_hash: bytes = b""  # SHA-256 of the token that it is
    protocols: tuple[str, ...] | None = None  # that the account may use; None = whatever its servers offer
