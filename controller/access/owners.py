"""Whose a login is that a node speaks of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from controller.access.tables import CredentialRow
from controller.store.bulk import batched


class Owner(NamedTuple):
    user_id: str
    node_id: str | None  # where it is good; None = everywhere


async def owners(connection: AsyncConnection, logins: Collection[tuple[str, str]]) -> dict[tuple[str, str], Owner]:
    """By protocol and user name; those that are not there (any more) are missing."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    for protocol, username in sorted(logins):
        names[protocol].append(username)
    found: dict[tuple[str, str], Owner] = {}
    for protocol, usernames in names.items():
        for chunk in batched(usernames):
            rows = await connection.execute(
                sa.select(CredentialRow.username, CredentialRow.user_id, CredentialRow.node_id).where(
                    CredentialRow.protocol == protocol, CredentialRow.username.in_(chunk)
                )
            )
            found |= {(protocol, row.username): Owner(row.user_id, row.node_id) for row in rows}
    return found
