"""A node that is enrolled and hostile gets its share of the controller, and no more."""

from __future__ import annotations

from collections.abc import Callable

import aiohttp
import pytest
from structlog.testing import capture_logs

from controller import ratelimit
from controller.channel import pace as pace_module
from controller.channel.pace import (
    CONNECTS_PER_MINUTE,
    REFUSALS_PER_MINUTE,
    RENEWALS_PER_MINUTE,
    Act,
    NodeTooFast,
    Pace,
)
from controller.desired.service import node_scope
from shared.protocol import Certificate, Frame, Refused, Renew, Welcome
from tests.support.node_port import FakeAgent, NodePort, signing_request, until


class Clock:
    def __init__(self) -> None:
        self.now = 600_000.0

    def time(self) -> float:
        return self.now

    monotonic = time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Stands still unless the test moves it, for the limits only."""
    clock = Clock()
    monkeypatch.setattr(ratelimit, "time", clock)
    monkeypatch.setattr(pace_module, "time", clock)
    return clock


def told(logs: list[dict[str, object]]) -> list[object]:
    return [entry["act"] for entry in logs if entry["event"] == "channel.node_too_fast"]


def taken(pace: Pace, node_id: str, act: Act, times: int) -> int:
    count = 0
    for _ in range(times):
        try:
            pace.check(node_id, act)
        except NodeTooFast:
            continue
        count += 1
    return count


def test_each_node_and_each_act_is_counted_by_itself(clock: Clock) -> None:
    pace = Pace()
    for node_id in ("one", "two"):
        assert taken(pace, node_id, Act.RENEWAL, 100) == RENEWALS_PER_MINUTE
        assert taken(pace, node_id, Act.REFUSAL, 100) == REFUSALS_PER_MINUTE
        assert taken(pace, node_id, Act.CONNECT, 100) == CONNECTS_PER_MINUTE


def test_an_hour_of_hammering_is_one_line_and_the_next_time_another(clock: Clock) -> None:
    pace = Pace()
    with capture_logs() as logs:
        count = 0
        for _ in range(3600):
            count += taken(pace, "node", Act.RENEWAL, 2)
            clock.now += 1
        assert told(logs) == [Act.RENEWAL]  # although one is let in now and then
        assert count <= 62 * RENEWALS_PER_MINUTE
        clock.now += 120
        assert taken(pace, "node", Act.RENEWAL, RENEWALS_PER_MINUTE) == RENEWALS_PER_MINUTE
        assert told(logs) == [Act.RENEWAL]
        taken(pace, "node", Act.RENEWAL, 5)
        assert told(logs) == [Act.RENEWAL] * 2


def renewal(agent: FakeAgent) -> Frame:
    return Renew(csr=signing_request(agent.key))


def refusal(agent: FakeAgent) -> Frame:
    return Refused(scope=node_scope(agent.node_id), revision=1, reason="would remove all")


@pytest.mark.parametrize(
    ("frame", "allowed", "act"),
    [(renewal, RENEWALS_PER_MINUTE, Act.RENEWAL), (refusal, REFUSALS_PER_MINUTE, Act.REFUSAL)],
)
async def test_too_many_frames_end_the_session_also_the_next_one(
    port: NodePort, clock: Clock, frame: Callable[[FakeAgent], Frame], allowed: int, act: Act
) -> None:
    agent, honest = await port.enrolled("hostile"), await port.enrolled("honest")
    await honest.connect()
    agent.silent = True
    with capture_logs() as logs:
        await agent.connect()
        for _ in range(allowed + 1):
            await agent.send(frame(agent))
        await until(lambda: agent.closed)
        assert agent.bye is not None
        assert (agent.bye.retry, f"too many {act}" in agent.bye.reason) == (True, True)
        for _ in range(3):
            await agent.connect()
            await agent.send(frame(agent))
            await until(lambda: agent.closed)
    assert told(logs) == [act]
    assert port.value("skynetvpn_node_violations_total", node="hostile") == 4
    renewed = [entry for entry in logs if entry["event"] == "fleet.certificate_renewed"]
    refused = [entry for entry in logs if entry["event"] == "channel.snapshot_refused"]
    assert len(renewed) + len(refused) == allowed
    assert not honest.closed
    clock.now += 120
    await agent.connect()
    await agent.send(renewal(agent))
    await until(lambda: agent.received(Certificate))
    await agent.close()
    await honest.close()


async def test_too_many_connects_are_refused_before_the_database_is_asked(
    port: NodePort, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, honest = await port.enrolled("hostile"), await port.enrolled("honest")
    admitted: list[str] = []
    admit = port.identities.admit

    async def counted(identity: object) -> object:
        admitted.append("")
        return await admit(identity)  # type: ignore[arg-type]

    monkeypatch.setattr(port.identities, "admit", counted)
    with capture_logs() as logs:
        for _ in range(CONNECTS_PER_MINUTE):
            await agent.open()
        for _ in range(3):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await agent.open()
            assert refused.value.status == 429
    assert len(admitted) == CONNECTS_PER_MINUTE
    assert told(logs) == [Act.CONNECT]
    await honest.connect()
    assert honest.received(Welcome)
    clock.now += 120
    await agent.connect()
    assert agent.received(Welcome)
    await agent.close()
    await honest.close()
