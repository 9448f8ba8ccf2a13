"""Two controllers on one database open connections at the same moment."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from controller.accounts.principal import Plan
from controller.desired import service as desired
from controller.store.database import open_database
from controller.tunnels import errors
from controller.tunnels.addresses import Pool


@pytest.fixture
def engine() -> str:
    return "postgresql"


async def test_no_address_is_given_twice_and_every_revision_once(world: Any, database_url: str) -> None:
    principal = replace(world.alice, plan=Plan.ENTERPRISE)
    other = open_database(database_url, world.database.secrets)
    sides = [world.tunnels(), replace(world, database=other).tunnels()]
    made = await asyncio.gather(
        *(sides[number % 2].create(principal, "skynet", world.nodes[0], "wireguard") for number in range(40))
    )
    assert len({address for connection in made for address in connection.addresses}) == 80
    assert len(await world.peers()) == 40
    await asyncio.gather(*(sides[number % 2].terminate(principal, one.id) for number, one in enumerate(made)))
    assert await world.peers() == {}
    async with other.connect() as connection:
        scope = desired.node_scope(world.nodes[0])
        assert await desired.revisions(connection, [scope]) == {scope: 80}
    await other.close()


async def test_the_last_address_goes_to_one_of_two(world: Any, database_url: str) -> None:
    other = open_database(database_url, world.database.secrets)
    pool = Pool.parse("10.66.0.0/28", "fd66::/124")
    principal = replace(world.alice, plan=Plan.ENTERPRISE)
    sides = [side.tunnels(pool=pool) for side in (world, replace(world, database=other))]
    outcomes = await asyncio.gather(
        *(sides[number % 2].create(principal, "skynet", world.nodes[0], "wireguard") for number in range(20)),
        return_exceptions=True,
    )
    assert {type(outcome) for outcome in outcomes if isinstance(outcome, Exception)} == {errors.AddressesExhausted}
    assert sum(not isinstance(outcome, Exception) for outcome in outcomes) == pool.capacity
    await other.close()
