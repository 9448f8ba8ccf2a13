"""Limits are checked, kept and enforced: by the clock to the second, by bytes, by the number of sessions."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from controller.errors import InvalidInput
from controller.store.types import now as real_now
from controller.usage import limits
from controller.usage.enforcement import Enforcement, Kept
from controller.usage.limits import AccountLimits, Period
from shared import access
from shared.access import SessionEnd

LONG, SHORTLY = (Kept(sessions=each, usage=each, events=each) for each in (timedelta(days=9999), timedelta(days=1)))

MEGABYTE = 10**6


async def read(world: Any, user_id: str = "alice") -> AccountLimits:
    async with world.database.read() as session:
        return await limits.read(session, user_id)


async def test_an_account_without_limits_has_none(world: Any) -> None:
    found = await read(world)
    assert found == AccountLimits()
    assert found.blocked(world.now) is None
    assert found.wire(3) == access.NO_LIMITS


async def test_changes_are_kept_and_told_to_the_nodes(world: Any) -> None:
    expiry = world.now + timedelta(days=30)
    await world.change("alice", quota_bytes=20 * MEGABYTE, max_sessions=2, rate_down=10**7, expires_at=expiry)
    await world.change("alice", rate_up=5 * 10**6)
    found = await read(world)
    assert (found.quota_bytes, found.max_sessions, found.rate_up, found.rate_down, found.expires_at) == (
        20 * MEGABYTE, 2, 5 * 10**6, 10**7, expiry,
    )  # fmt: skip
    assert world.refreshed == ["alice", "alice"]
    assert found.wire(2) == access.Limits(
        max_sessions=2, rate_up=5 * 10**6, rate_down=10**7, metered=True, opening=MEGABYTE
    )
    await world.change("alice", quota_bytes=None, max_sessions=None, rate_up=None, rate_down=None, expires_at=None)
    assert (await read(world)).wire(2) == access.NO_LIMITS


async def test_every_wrong_field_is_named_and_nothing_changes(world: Any) -> None:
    wrong = {
        "quota_bytes": -1,
        "quota_period": "yearly",
        "used_bytes": 5,
        "expires_at": datetime(2026, 1, 1),  # noqa: DTZ001
        "max_sessions": 0,
        "rate_up": 1.5,
        "rate_down": True,
        "colour": "red",
    }
    with pytest.raises(InvalidInput) as caught:
        await world.change("alice", max_sessions=2, **{name: wrong[name] for name in wrong if name != "max_sessions"})
    assert caught.value.problems.keys() == wrong.keys() - {"max_sessions"}
    with pytest.raises(InvalidInput, match="max_sessions"):
        await world.change("alice", max_sessions=wrong["max_sessions"])
    for name in ("quota_period", "used_bytes"):
        with pytest.raises(InvalidInput, match=name):
            await world.change("alice", **{name: None})
    assert await read(world) == AccountLimits()
    assert world.refreshed == []


async def test_numbers_that_no_column_holds_are_refused(world: Any) -> None:
    with pytest.raises(InvalidInput, match="quota_bytes"):
        await world.change("alice", quota_bytes=2**63)
    await world.change("alice", quota_bytes=2**63 - 1)


async def test_an_account_is_blocked_from_the_moment_of_its_expiry(world: Any) -> None:
    await world.change("alice", expires_at=world.now)
    found = await read(world)
    assert found.blocked(world.now - timedelta(microseconds=1)) is None
    assert found.blocked(world.now) == "expired"


async def test_expiry_is_warned_of_once_and_happens_once(world: Any) -> None:
    await world.change("alice", expires_at=world.now + timedelta(days=4))
    await world.enforcement.enforce()
    assert await world.told() == []
    world.pass_(days=1)
    for _ in range(2):
        await world.enforcement.enforce()
    assert await world.told() == [("expiry.3d", "alice")]
    world.refreshed.clear()
    world.pass_(days=3)
    for _ in range(2):
        await world.enforcement.enforce()
    assert await world.told() == [("expiry.3d", "alice"), ("expired", "alice")]
    assert world.refreshed == ["alice"]
    await world.change("alice", expires_at=world.now + timedelta(days=9))
    assert world.refreshed == ["alice", "alice"]
    world.pass_(days=9)
    await world.enforcement.enforce()
    assert (await world.told())[-1] == ("expired", "alice")


async def test_an_account_that_cannot_be_brought_to_its_limits_holds_up_no_other(world: Any) -> None:
    await world.change("alice", expires_at=world.now)
    await world.change("bob", expires_at=world.now)
    world.broken.add("alice")
    await world.enforcement.enforce()
    assert await world.told() == [("expired", "bob")]
    world.broken.clear()
    world.pass_(minutes=1)
    await world.enforcement.enforce()
    assert await world.told() == [("expired", "bob"), ("expired", "alice")]


async def test_an_expiry_takes_effect_within_a_second(world: Any) -> None:
    enforcement = Enforcement(world.database, world.live.book, world.sessions, world.events, world.refresh)
    told: asyncio.Queue[datetime] = asyncio.Queue()
    world.events.listen(lambda event: told.put_nowait(real_now()) if event.kind == "expired" else None)
    task = asyncio.create_task(enforcement.run())
    await asyncio.sleep(0)
    expiry = real_now() + timedelta(seconds=1.5)
    await world.change("alice", expires_at=expiry)
    async with asyncio.timeout(30):
        seen = await told.get()
    assert expiry <= seen < expiry + timedelta(seconds=1)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_quota_thresholds_are_told_once_and_the_block_follows(world: Any) -> None:
    await world.change("alice", quota_bytes=100)
    world.refreshed.clear()
    for rx, expected in ((79, []), (80, ["quota.80"]), (99, ["quota.80"]), (130, ["quota.80", "quota.100"])):
        await world.store(world.stats("s1", rx=rx))
        await world.enforcement.enforce()
        assert [kind for kind, _ in await world.told()] == expected
        assert (await read(world)).blocked(world.now) == ("quota" if rx >= 100 else None)
    assert world.refreshed == ["alice"]
    await world.store(world.stats("s1", rx=140))
    await world.enforcement.enforce()
    assert len(await world.told()) == 2
    assert world.refreshed == ["alice"]


async def test_bytes_of_all_protocols_and_nodes_and_both_directions_count(world: Any) -> None:
    await world.change("alice", quota_bytes=10**9)
    await world.store(world.stats("a", rx=1, tx=2), world.stats("b", protocol="ssh", rx=4))
    await world.store(world.stats("a", rx=8, protocol="l2tp"), node=1)
    assert await world.used("alice") == 15


async def test_a_quota_that_is_given_back_lifts_the_block(world: Any) -> None:
    await world.change("alice", quota_bytes=100)
    await world.store(world.stats("s1", rx=100))
    await world.enforcement.enforce()
    world.refreshed.clear()
    await world.change("alice", used_bytes=0)
    assert world.refreshed == ["alice"]
    assert (await read(world)).blocked(world.now) is None
    await world.store(world.stats("s1", rx=199))
    await world.enforcement.enforce()
    assert [kind for kind, _ in await world.told()] == ["quota.80", "quota.100", "quota.80"]
    assert await world.used("alice") == 99


async def test_only_bytes_since_the_quota_was_set_count(world: Any) -> None:
    await world.store(world.stats("s1", rx=1000))
    await world.change("alice", quota_bytes=100)
    await world.store(world.stats("s1", rx=1010))
    assert await world.used("alice") == 10


async def test_a_period_begins_anew_at_midnight(world: Any) -> None:
    await world.change("alice", quota_bytes=100, quota_period="daily")
    assert (await read(world)).period_ends_at == datetime(2026, 3, 11, tzinfo=UTC)
    await world.store(world.stats("s1", rx=150))
    await world.enforcement.enforce()
    assert (await read(world)).blocked(world.now) == "quota"
    world.refreshed.clear()
    world.now = datetime(2026, 3, 11, tzinfo=UTC)
    for _ in range(2):
        await world.enforcement.enforce()
    found = await read(world)
    assert (found.used_bytes, found.blocked(world.now)) == (0, None)
    assert found.period_ends_at == datetime(2026, 3, 12, tzinfo=UTC)
    assert world.refreshed == ["alice"]
    assert await world.told() == [("quota.80", "alice"), ("quota.100", "alice"), ("limits.reset", "alice")]


async def test_periods_that_passed_while_nobody_looked_are_one_reset(world: Any) -> None:
    await world.change("alice", quota_bytes=100, quota_period=Period.MONTHLY)
    assert (await read(world)).period_ends_at == datetime(2026, 3, 31, tzinfo=UTC)
    world.pass_(days=100)
    await world.enforcement.enforce()
    assert [kind for kind, _ in await world.told()] == ["limits.reset"]
    assert (await read(world)).period_ends_at == datetime(2026, 6, 30, tzinfo=UTC)
    await world.change("alice", quota_period="none")
    assert (await read(world)).period_ends_at is None


async def test_of_too_many_sessions_the_newest_end(world: Any) -> None:
    await world.change("alice", max_sessions=2)
    await world.store(world.stats("s1"), node=1)
    world.pass_(seconds=1)
    await world.store(world.stats("s2", protocol="ssh"))
    await world.enforcement.enforce()
    assert await world.wanted() == {}
    world.pass_(seconds=1)
    await world.store(world.stats("s3"), world.stats("other", account=2))
    await world.enforcement.enforce()
    assert await world.wanted(0) == {"s3": SessionEnd(session="s3")}
    assert await world.wanted(1) == {}
    assert await world.told() == [("session.kicked", "alice")]
    await world.enforcement.enforce()
    assert await world.told() == [("session.kicked", "alice")]


async def test_events_are_heard_after_the_commit_only(world: Any) -> None:
    heard: list[str] = []
    world.events.listen(lambda event: heard.append(event.kind))
    await world.change("alice", expires_at=world.now)
    await world.enforcement.enforce()
    assert heard == ["expired"]
    [event] = await world.events.after("")
    assert event.data == {"expires_at": world.now.isoformat()}
    assert await world.events.after(event.id) == []
    assert await world.events.purge(real_now() - timedelta(minutes=1)) == 0
    assert await world.events.purge(real_now() + timedelta(minutes=1)) == 1


async def test_history_is_kept_for_a_time(world: Any) -> None:
    await world.store(world.stats("s1", rx=1, ended=world.seconds), world.stats("s2", rx=1))
    later = world.now + timedelta(days=1)
    assert await world.sessions.purge(world.now, world.now - timedelta(days=1)) == 0
    assert await world.sessions.purge(later, world.now - timedelta(days=1)) == 1
    assert [session.id for session in await world.sessions.history()] == ["s2"]  # it lives
    assert await world.sessions.purge(later, later) == 1
    assert await world.usage("alice") == {}


@pytest.mark.parametrize(("kept", "left"), [(LONG, (2, 1, 1)), (SHORTLY, (1, 0, 0))])
async def test_the_settings_say_how_long_history_is_kept(world: Any, kept: Kept, left: tuple[int, int, int]) -> None:
    await world.store(world.stats("s1", rx=1, ended=world.seconds), world.stats("s2", rx=1))
    await world.sessions.kick(session=world.sessions.find("s2"))
    world.now = real_now() + timedelta(days=2)
    enforcement = Enforcement(
        world.database, world.live.book, world.sessions, world.events, world.refresh, kept=kept, clock=world.clock
    )
    await enforcement.purge()
    history, events = await world.sessions.history(), await world.events.after("")
    assert (len(history), len(await world.usage("alice")), len(events)) == left
