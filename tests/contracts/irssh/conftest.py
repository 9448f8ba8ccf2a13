"""The panel's API beside the other contract, running; an administrator and a user who are logged in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from controller.accounts.principal import Role
from controller.accounts.service import Client
from controller.contracts.kit import Contract
from controller.desired import service as desired
from shared import desired as resources
from shared.desired import Payload
from shared.protocol import Report, SessionStats
from tests.contracts.world import PASSWORD, Api, World, serve


@dataclass
class Panel:
    """What the panel's contract works on, and what comes of it."""

    world: World

    @property
    def contract(self) -> Contract:
        return self.world.irssh

    async def resources(self, scope: str) -> dict[str, Payload]:
        """What the nodes of a scope have to run, by key."""
        async with self.world.database.connect() as connection:
            state = await desired.state(connection, self.world.database.secrets, scope)
        return {item.key: resources.decode(item.kind, item.key, item.payload) for item in state.resources}

    async def session(self, name: str, protocol: str, id: str = "s1", *, since: int = 1_760_000_000) -> None:
        """A node reports a session of the account's own login."""
        user = await self.world.administration.user_by_name(name)
        self.world.reports += 1
        told = SessionStats(id, protocol, user.number, name, "", "[2001:db8::7]:4711", "10.67.0.2", since, 10, 20)
        report = Report(sequence=self.world.reports, boot_id="b", generation="g", sessions=[told])
        self.world.live.record(self.world.nodes["all-1"], report)
        await self.world.live.flush()


@pytest.fixture
async def panel(world: World) -> Panel:
    await world.add_node("all-1", protocols="wireguard openvpn ssh l2tp")
    await world.accounts.create_user("root-a", "root@example.com", PASSWORD, Role.ADMIN)
    return Panel(world)


@pytest.fixture(params=["", "/irssh"], ids=["at /api", "at /irssh/api"])
async def api(request: pytest.FixtureRequest, world: World, panel: Panel) -> AsyncIterator[Api]:
    async with serve(world, world.skynet, panel.contract) as served:
        yield served.at(request.param)


@pytest.fixture
async def admin(world: World, api: Api) -> Api:
    token, _ = await world.accounts.login("root-a", PASSWORD, "irssh", Client())
    return api.holding(token)


@pytest.fixture
async def alice(world: World, api: Api) -> Api:
    token, _ = await world.accounts.login("alice", PASSWORD, "irssh", Client())
    return api.holding(token)
