"""What every driver of a protocol's server must do: the same tests over each, with real clients of the protocol."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agent.drivers.base import DriverError, LiveSession, ServiceDriver
from tests.support.l2tp import L2tpRig
from tests.support.openssh import SshRig
from tests.support.openvpn import OpenVpnDcoRig, OpenVpnRig, OpenVpnUnitsRig
from tests.support.rig import Rig, ServiceClient

RIGS = [
    pytest.param(OpenVpnRig, id="openvpn", marks=pytest.mark.netns),
    pytest.param(OpenVpnUnitsRig, id="openvpn-units", marks=pytest.mark.netns),
    pytest.param(SshRig, id="ssh", marks=pytest.mark.netns),
    pytest.param(L2tpRig, id="l2tp", marks=[pytest.mark.netns, pytest.mark.kernel]),
]


# What depends on who passes the data; tests/kernel has the rest of it.
by_any_data_path = pytest.mark.parametrize(
    "rig",
    [*RIGS, pytest.param(OpenVpnDcoRig, id="openvpn-dco", marks=[pytest.mark.netns, pytest.mark.kernel])],
    indirect=True,
)


@pytest.fixture(params=RIGS)
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    with request.param(tmp_path) as made:
        yield made


@dataclass
class Agent:
    """The driver's other side: what it asks, and what it is told."""

    rig: Rig
    refusals: dict[str, str] = field(default_factory=dict)
    notices: int = 0
    ended: list[LiveSession] = field(default_factory=list)
    driver: ServiceDriver = field(init=False)

    def __post_init__(self) -> None:
        self.driver = self.new_driver()

    def new_driver(self) -> ServiceDriver:
        return self.rig.driver(self.refusals.get, self._notify)

    def _notify(self) -> None:
        self.notices += 1

    async def restart(self) -> None:
        """As after a kill: another driver over the same host, which knows nothing."""
        await self.driver.close()
        self.driver = self.new_driver()

    async def serve(self, *usernames: str) -> None:
        await self.driver.ensure(self.rig.spec())
        assert await self.driver.put([self.rig.credential(username) for username in usernames]) == {}

    async def live(self) -> dict[str, list[LiveSession]]:
        """By user name; those that ended are put aside."""
        found: dict[str, list[LiveSession]] = {}
        for session in await self.driver.sessions():
            if session.ended:
                self.ended.append(session)
            else:
                found.setdefault(session.username, []).append(session)
        return found

    async def one(self, username: str) -> LiveSession:
        (session,) = (await self.live())[username]
        return session

    async def until(self, condition: Callable[[], Awaitable[bool]], timeout: float = 30) -> None:
        async with asyncio.timeout(timeout):
            while not await condition():  # noqa: ASYNC110 — the host changes, and tells nobody
                await asyncio.sleep(0.02)

    async def until_ended(self, session_id: str) -> LiveSession:
        async def ended() -> bool:
            await self.live()
            return any(session.id == session_id for session in self.ended)

        await self.until(ended)
        (session,) = (session for session in self.ended if session.id == session_id)
        return session


@pytest.fixture
async def agent(rig: Rig) -> AsyncIterator[Agent]:
    made = Agent(rig)
    await rig.prepare(made.driver)
    yield made
    await made.driver.stop()
    await made.driver.close()


async def connected(rig: Rig, username: str) -> ServiceClient:
    client = rig.client(username)
    await asyncio.to_thread(client.connect)
    return client


async def passes(client: ServiceClient) -> bool:
    return await asyncio.to_thread(client.passes)


@by_any_data_path
async def test_a_client_gets_in_is_counted_and_reported_once_when_it_left(agent: Agent, rig: Rig) -> None:
    began = int(time.time())
    await agent.serve("alice")
    client = await connected(rig, "alice")
    assert await passes(client)

    session = await agent.one("alice")
    assert began - 1 <= session.since <= time.time() + 1
    assert session.remote
    assert session.rx > 0
    assert session.tx > 0
    assert await passes(client)
    later = await agent.one("alice")
    assert later.id == session.id
    assert later.rx > session.rx
    assert later.tx > session.tx

    await asyncio.to_thread(client.end)
    last = await agent.until_ended(session.id)
    assert last.rx >= later.rx
    assert last.tx >= later.tx
    assert last.username == "alice"
    assert began <= last.ended <= time.time() + 1
    assert await agent.live() == {}
    assert len(agent.ended) == 1


async def test_the_agent_is_told_when_a_client_comes_and_when_it_goes(agent: Agent, rig: Rig) -> None:
    await agent.serve("alice")
    before = agent.notices
    client = await connected(rig, "alice")

    async def told_more_than(count: int) -> bool:
        return agent.notices > count

    await agent.until(lambda: told_more_than(before))
    await agent.live()
    between = agent.notices
    await asyncio.to_thread(client.end)
    await agent.until(lambda: told_more_than(between))


async def test_a_wrong_secret_and_an_unknown_name_are_refused(agent: Agent, rig: Rig) -> None:
    await agent.serve("alice")
    assert await asyncio.to_thread(rig.client("alice", wrong=True).refused)
    assert await asyncio.to_thread(rig.client("mallory").refused)
    assert await agent.live() == {}
    assert agent.ended == []


async def test_the_agent_may_refuse_a_right_login(agent: Agent, rig: Rig) -> None:
    if not rig.asks:
        pytest.skip("this protocol's server asks nobody; the agent ends the session")
    agent.refusals["alice"] = "too many sessions"
    await agent.serve("alice", "bob")
    assert await asyncio.to_thread(rig.client("alice").refused)
    await connected(rig, "bob")
    agent.refusals.clear()
    await connected(rig, "alice")


async def test_what_the_host_would_let_in_is_read_back(agent: Agent, rig: Rig) -> None:
    wanted = [rig.credential(username) for username in ("alice", "bob", "carol")]
    await agent.serve("alice", "bob", "carol")
    found = await agent.driver.credentials()
    assert {name: each.digest() for name, each in found.items()} == {each.username: each.digest() for each in wanted}

    assert await agent.driver.remove(["bob"]) == {}
    assert set(await agent.driver.credentials()) == {"alice", "carol"}


@by_any_data_path
async def test_taking_a_login_away_ends_its_sessions_and_no_other(agent: Agent, rig: Rig) -> None:
    await agent.serve("alice", "bob")
    alice, bob = await connected(rig, "alice"), await connected(rig, "bob")
    assert await passes(alice)
    session = await agent.one("alice")

    assert await agent.driver.remove(["alice", "nobody"]) == {}

    assert not await passes(alice)
    assert set(await agent.live()) == {"bob"}
    assert (await agent.until_ended(session.id)).rx >= session.rx
    assert await passes(bob)
    await asyncio.to_thread(alice.end)
    assert await asyncio.to_thread(rig.client("alice").refused)


@by_any_data_path
async def test_a_kick_ends_one_session_and_the_login_stays(agent: Agent, rig: Rig) -> None:
    await agent.serve("alice", "bob")
    alice, bob = await connected(rig, "alice"), await connected(rig, "bob")
    session = await agent.one("alice")
    agent.refusals["alice"] = "not now"  # a client that comes back by itself would be in again at once

    await agent.driver.kick(session.id)
    await agent.driver.kick(session.id)
    await agent.driver.kick("a session that never was")

    assert (await agent.until_ended(session.id)).id == session.id
    assert set(await agent.live()) <= {"bob"} if rig.asks else True
    assert await passes(bob)
    await asyncio.to_thread(alice.end)
    agent.refusals.clear()
    await connected(rig, "alice")
    assert (await agent.one("alice")).id != session.id
    assert len([each for each in agent.ended if each.id == session.id]) == 1


async def test_a_starting_driver_adopts_the_server_with_its_sessions(agent: Agent, rig: Rig) -> None:
    await agent.serve("alice")
    client = await connected(rig, "alice")
    assert await passes(client)
    before = await agent.one("alice")

    await agent.restart()
    await agent.serve("alice")

    after = await agent.one("alice")
    assert (after.id, after.since, after.address, after.remote) == (
        before.id,
        before.since,
        before.address,
        before.remote,
    )
    assert after.rx >= before.rx
    assert after.tx >= before.tx
    assert await passes(client)
    assert agent.ended == []
    assert (await agent.one("alice")).id == before.id

    agent.refusals["alice"] = "not now"
    await agent.driver.kick(before.id)
    assert (await agent.until_ended(before.id)).rx >= after.rx


async def test_sessions_are_told_before_the_server_is_ensured(agent: Agent, rig: Rig) -> None:
    await agent.serve("alice")
    client = await connected(rig, "alice")
    before = await agent.one("alice")

    await agent.restart()

    assert (await agent.one("alice")).id == before.id
    await agent.serve("alice")
    assert (await agent.one("alice")).id == before.id
    assert await passes(client)
    assert agent.ended == []


async def test_ensuring_again_touches_nothing(agent: Agent, rig: Rig) -> None:
    await agent.serve("alice")
    client = await connected(rig, "alice")
    session = await agent.one("alice")
    for _ in range(3):
        await agent.driver.ensure(rig.spec())
        assert await agent.driver.put([rig.credential("alice")]) == {}
    assert (await agent.one("alice")).id == session.id
    assert await passes(client)


@by_any_data_path
async def test_changed_settings_are_taken_over(agent: Agent, rig: Rig) -> None:
    await agent.serve("alice")
    await agent.driver.ensure(rig.changed_spec())
    client = await connected(rig, "alice")
    assert await passes(client)


async def test_a_port_that_is_taken_is_named_and_used_when_it_is_free(agent: Agent, rig: Rig) -> None:
    with rig.taken(), pytest.raises(DriverError, match="in use"):
        await agent.driver.ensure(rig.spec())
    await agent.serve("alice")
    await connected(rig, "alice")


@by_any_data_path
async def test_a_stopped_server_has_no_sessions_and_lets_nobody_in(agent: Agent, rig: Rig) -> None:
    await agent.serve("alice")
    client = await connected(rig, "alice")
    session = await agent.one("alice")
    await agent.driver.stop()
    assert not await passes(client)
    assert (await agent.until_ended(session.id)).rx >= session.rx
    await agent.driver.stop()
