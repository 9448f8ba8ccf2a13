"""The API, running, and people who are logged in."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from controller.accounts.service import Client
from controller.store.database import Database
from tests.contracts.world import PASSWORD, Api, World, build_world, serve


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with build_world(database) as built:
        yield built


@pytest.fixture(params=["", "/skynet"], ids=["at /api", "at /skynet/api"])
async def api(request: pytest.FixtureRequest, world: World) -> AsyncIterator[Api]:
    async with serve(world, world.skynet, world.irssh) as served:
        yield served.at(request.param)


@pytest.fixture
async def alice(world: World, api: Api) -> Api:
    token, _ = await world.accounts.login("alice", PASSWORD, "skynet", Client())
    return api.holding(token)


@pytest.fixture
async def bob(world: World, api: Api) -> Api:
    token, _ = await world.accounts.login("bob", PASSWORD, "skynet", Client())
    return api.holding(token)
