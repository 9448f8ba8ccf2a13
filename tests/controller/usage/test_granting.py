"""Nodes are given what they need of a quota, keep what they may still be using, and give back what they do not use."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa

from controller.fleet.tables import NodeRow
from controller.usage.granting import Granting
from controller.usage.tables import LeaseRow
from shared.access import Lease
from tests.controller.usage.conftest import NODES

QUOTA = 10_000_000
SLICE = QUOTA // 10
IDLE = 600.0


class Nodes:
    """What the controller waits for; a test lets it come."""

    def __init__(self) -> None:
        self.now = 0.0
        self.seen = asyncio.Event()
        self.asked = asyncio.Event()

    async def wait_applied(self, node_id: str, scope: str, revision: int, timeout: float) -> bool:
        self.asked.set()
        await self.seen.wait()
        return True

    async def wait_reported(self, node_id: str, timeout: float) -> bool:
        return True


@pytest.fixture
def nodes() -> Nodes:
    return Nodes()


@pytest.fixture
async def granting(world: Any, nodes: Nodes) -> Granting:
    granting = Granting(
        world.database, nodes.wait_applied, nodes.wait_reported, idle_seconds=IDLE, clock=lambda: nodes.now
    )
    world.live.on_written(granting.on_written)
    await world.change("alice", quota_bytes=QUOTA)
    return granting


async def use(world: Any, granting: Granting, count: int, node: int = 0) -> None:
    """So many bytes in all, by the node's count."""
    await world.store(world.stats(f"s{node}", rx=count), node=node, used={1: count})
    await granting.renew()


async def rows(world: Any) -> dict[str, tuple[int, int, int]]:
    async with world.database.connect() as connection:
        found = await connection.execute(
            sa.select(LeaseRow.node_id, LeaseRow.allowance, LeaseRow.reserved, LeaseRow.used)
        )
        return {row[0]: (row[1], row[2], row[3]) for row in found}


async def test_the_first_use_on_a_node_brings_a_lease(world: Any, granting: Granting) -> None:
    await use(world, granting, 1000)
    assert await world.lease(1) == Lease(account=1, allowance=1000 + SLICE, ledger="ledger of node-1")
    assert await world.lease(1, node=1) is None


async def test_a_lease_is_renewed_when_half_of_it_is_used(world: Any, granting: Granting) -> None:
    await use(world, granting, 1000)
    await use(world, granting, 1000 + SLICE // 2 - 1)
    assert (await world.lease(1)).allowance == 1000 + SLICE
    await use(world, granting, 1000 + SLICE // 2)
    assert (await world.lease(1)).allowance == 1000 + SLICE // 2 + SLICE


async def test_leases_never_promise_more_than_is_left(world: Any, granting: Granting) -> None:
    used = [0, 0]
    for step in range(200):
        node = step % 2
        lease = await world.lease(1, node=node)
        limit = lease.allowance if lease is not None else SLICE // 2
        used[node] += (limit - used[node] + 1) // 2
        await use(world, granting, used[node], node)
        held = await rows(world)
        assert sum(allowance - count for allowance, _, count in held.values()) <= QUOTA - sum(used)
    assert QUOTA - 10 <= sum(used) <= QUOTA


async def test_accounts_without_a_quota_get_none(world: Any, granting: Granting) -> None:
    await world.store(world.stats("s9", account=2, rx=5), used={2: 5, 77: 5})
    await granting.renew()
    assert await rows(world) == {}


async def test_a_quota_that_goes_takes_its_leases_along(world: Any, granting: Granting) -> None:
    await use(world, granting, 1000)
    await world.change("alice", quota_bytes=None)
    assert await rows(world) == {}
    assert await world.lease(1) is None


async def test_a_smaller_quota_makes_leases_smaller_but_they_stay_reserved(world: Any, granting: Granting) -> None:
    await use(world, granting, 1000)
    await world.change("alice", quota_bytes=100_000)
    assert (await world.lease(1)).allowance == 1000 + 10_000
    assert await rows(world) == {NODES[0]: (11_000, 1000 + SLICE, 1000)}


async def test_a_used_up_account_can_begin_again_where_it_was(world: Any, granting: Granting) -> None:
    await world.change("alice", quota_bytes=1000)
    await use(world, granting, 1000)
    assert (await rows(world))[NODES[0]][0] == 0
    await world.change("alice", used_bytes=0)
    assert (await world.lease(1)).allowance == 1000 + 50  # as a node without a lease: half of a slice


async def test_a_node_that_lost_its_disk_begins_anew(world: Any, granting: Granting) -> None:
    await use(world, granting, 500_000)
    async with world.database.transaction() as tx:
        await tx.session.execute(sa.update(NodeRow).where(NodeRow.id == NODES[0]).values(ledger="new"))
    await world.store(used={1: 10}, complete=True)
    await granting.renew()
    assert await world.lease(1) == Lease(account=1, allowance=10 + SLICE, ledger="new")


async def test_an_older_count_changes_nothing(world: Any, granting: Granting) -> None:
    await use(world, granting, 5000)
    await world.store(used={1: 4000})
    assert (await rows(world))[NODES[0]][2] == 5000


async def test_an_idle_lease_is_free_only_when_the_node_has_let_go(
    world: Any, granting: Granting, nodes: Nodes
) -> None:
    await use(world, granting, 1000)
    nodes.now += IDLE - 1
    await granting.take_back()
    assert (await world.lease(1)).allowance == 1000 + SLICE
    nodes.now += 1
    await granting.take_back()
    assert (await world.lease(1)).allowance == 1000 + SLICE // 2
    assert (await rows(world))[NODES[0]] == (1000 + SLICE // 2, 1000 + SLICE, 1000)
    task = asyncio.create_task(granting.run())
    async with asyncio.timeout(10):
        await nodes.asked.wait()
    assert (await rows(world))[NODES[0]][1] == 1000 + SLICE
    nodes.seen.set()
    async with asyncio.timeout(10):
        while (await rows(world))[NODES[0]][1] != 1000 + SLICE // 2:  # noqa: ASYNC110 - a row has no event
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_node_that_starves_gets_what_others_do_not_use(world: Any, granting: Granting, nodes: Nodes) -> None:
    await world.change("alice", quota_bytes=1000)
    await use(world, granting, 10, node=1)  # leaves it 100
    nodes.now += 120
    used = 10
    for _ in range(60):
        lease = await world.lease(1)
        used = lease.allowance if lease is not None else used
        await use(world, granting, used)
    assert used < 990
    nodes.seen.set()
    task = asyncio.create_task(granting.run())
    async with asyncio.timeout(20):
        while used < 990:
            await asyncio.sleep(0.01)
            lease = await world.lease(1)
            if lease.allowance > used:
                used = lease.allowance
                await world.store(world.stats("s0", rx=used), used={1: used})
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert used == 990
    assert await world.used("alice") == 1000


async def test_reports_are_waited_for_until_a_later_one_is_stored(world: Any) -> None:
    await world.store()
    world.report()
    waiting = asyncio.create_task(world.live.wait_reported(NODES[0], 30))
    await asyncio.sleep(0)
    await world.live.flush()
    assert not waiting.done()
    await world.store()
    assert await waiting
    assert not await world.live.wait_reported(NODES[0], 0.01)


async def test_an_absurd_count_of_a_node_is_not_taken(world: Any, granting: Granting) -> None:
    await use(world, granting, 1000)
    await world.store(used={1: 2**63 - 1})
    await granting.renew()
    assert (await rows(world))[NODES[0]][2] == 1000


async def test_a_node_that_only_repeats_itself_gets_nothing(world: Any, granting: Granting, nodes: Nodes) -> None:
    await world.store(used={1: 0}, node=1)
    await granting.renew()
    assert await rows(world) == {}
    await use(world, granting, 1000)
    nodes.now += IDLE
    await granting.take_back()
    lease = await world.lease(1)
    await world.store(used={1: 1000}, complete=True)
    await granting.renew()
    assert await world.lease(1) == lease
