"""Whatever happens to an account, in whatever order: the nodes have exactly what it may use."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from controller.access.service import Access
from controller.access.tables import CredentialRow
from controller.accounts.tables import UserRow
from controller.desired.tables import ScopeRow
from controller.errors import DomainError
from controller.store.types import now
from controller.tunnels.peers import Peers
from controller.tunnels.tables import ConnectionRow
from controller.usage.tables import LimitsRow
from shared import desired as resources
from shared.access import Credential
from shared.desired import Payload
from shared.keys import encode_key
from shared.resource import Protocol
from tests.controller.tunnels.conftest import SETTINGS

STEPS = 40
LOGINS = [Protocol.OPENVPN, Protocol.SSH, Protocol.L2TP]


class Chance:
    """Does something to alice's account."""

    def __init__(self, world: Any, seed: int) -> None:
        self.world, self.random = world, random.Random(seed)
        self.access = Access(world.passwords, Peers(SETTINGS.pool).refresh)
        self.user_id = world.alice.user_id
        self.password = 0

    async def step(self) -> str:
        does = self.random.choice([*[self.connect] * 4, self.end, self.grant, self.limit, self.activate])
        try:
            await does()
        except DomainError as error:
            return f"{does.__name__}: {error}"
        return does.__name__

    async def connect(self) -> None:
        node = self.random.choice([0, 1, -1, -1, -1])
        await self.world.tunnels().create(
            self.world.alice, "skynet", self.world.nodes[node], self.random.choice(list(Protocol))
        )

    async def end(self) -> None:
        live = await self.world.tunnels().list_live(self.world.alice)
        if live:
            await self.world.tunnels().terminate(self.world.alice, self.random.choice(live).id)

    async def grant(self) -> None:
        self.password += 1
        wanted = self.random.sample(list(Protocol), self.random.randint(0, 4))
        secrets = await self.access.prepare(f"the password {self.password}") if self.random.random() < 0.7 else None
        async with self.world.database.transaction() as tx:
            chosen = sa.update(UserRow).where(UserRow.id == self.user_id)
            await tx.session.execute(chosen.values(protocols=self.random.choice([" ".join(wanted), None])))
            await self.access.grant(tx, self.user_id, wanted, secrets)

    async def limit(self) -> None:
        ends = self.random.choice([None, now() + timedelta(hours=1), now() - timedelta(hours=1)])
        values = {
            "quota_bytes": self.random.choice([None, 1000]),
            "used_bytes": self.random.choice([0, 900, 999, 1000]),
        }
        async with self.world.database.transaction() as tx:
            await tx.session.execute(sa.delete(LimitsRow))
            tx.session.add(LimitsRow(user_id=self.user_id, quota_period="none", told="", expires_at=ends, **values))
            await tx.session.flush()
            await self.access.refresh(tx, self.user_id)

    async def activate(self) -> None:
        async with self.world.database.transaction() as tx:
            chosen = sa.update(UserRow).where(UserRow.id == self.user_id)
            await tx.session.execute(chosen.values(active=self.random.random() < 0.8))
            await self.access.refresh(tx, self.user_id)


async def entitled(world: Any) -> set[tuple[str, str]]:
    """What the nodes should have, by the account's rows alone: (scope, name)."""
    async with world.database.read() as session:
        user = await session.scalar(sa.select(UserRow).where(UserRow.id == world.alice.user_id))
        limits = await session.get(LimitsRow, user.id)
        expired = limits is not None and limits.expires_at is not None and limits.expires_at <= now()
        used_up = limits is not None and limits.quota_bytes is not None and limits.used_bytes >= limits.quota_bytes
        if not user.active or expired or used_up:
            return set()
        found = set()
        for row in await session.scalars(sa.select(CredentialRow)):
            scope = f"node:{row.node_id}" if row.node_id is not None else f"protocol:{row.protocol}"
            found.add((scope, row.protocol, row.username))
        live = sa.select(ConnectionRow).where(ConnectionRow.ended_at.is_(None), ConnectionRow.protocol == "wireguard")
        for row in await session.scalars(live):
            found.add((f"node:{row.node_id}", "wireguard", encode_key(row.public_key)))
    return {(scope, name) for scope, protocol, name in found if user.protocols is None or protocol in user.protocols}


def named(scope: str, payload: Payload) -> tuple[str, str]:
    return scope, payload.username if isinstance(payload, Credential) else payload.key


@pytest.mark.parametrize("seed", range(4))
async def test_the_nodes_have_exactly_what_the_account_may_use(world: Any, seed: int) -> None:
    chance, history = Chance(world, seed), []
    scopes = [f"node:{node}" for node in world.nodes] + [f"protocol:{protocol}" for protocol in LOGINS]
    most = 0
    for _ in range(STEPS):
        history.append(await chance.step())
        wanted = {scope: await world.wanted_of(scope) for scope in scopes}
        had = {named(scope, payload) for scope, payloads in wanted.items() for payload in payloads}
        assert had == await entitled(world), history
        async with world.database.read() as session:
            for row in await session.scalars(sa.select(ScopeRow)):
                assert row.digest == resources.digest(wanted[row.scope]), history
            orphans = sa.select(CredentialRow.id).join(ConnectionRow).where(ConnectionRow.ended_at.is_not(None))
            assert (await session.scalars(orphans)).all() == []
        most = max(most, len(had))
    assert most > 2, "hardly anything happened"
