"""The plan's rules, on hosts and desired states that nobody thought of."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.desired import Desired, Scope
from agent.host import Host
from agent.plan import EnsureInterface, RemovePeer, SetPeer, plan, steps
from shared.desired import Interface, Peer
from shared.keys import PrivateKey
from tests.agent.fleet import INTERFACE, KEY, SCOPE, name, peer, resource
from tests.agent.model_host import ModelFirewall, ModelWireGuard

PUBLIC = KEY.public().raw

keys = st.integers(0, 12).map(lambda number: number.to_bytes(2) + b"\x01" * 30)
addresses = st.integers(2, 15).map(lambda number: f"10.66.0.{number}/32")
peers = st.builds(
    Peer,
    public_key=keys,
    allowed_ips=st.lists(addresses, min_size=1, max_size=3).map(tuple),
    preshared_key=st.sampled_from([None, bytes(32), b"\x05" * 32]),
    keepalive=st.sampled_from([0, 25]),
)
specs = st.builds(
    Interface,
    name=st.just("wg0"),
    listen_port=st.sampled_from([51820, 51821]),
    addresses=st.sampled_from([("10.66.0.1/16",), ("10.66.0.1/16", "fd66::1/64")]),
    mtu=st.sampled_from([1420, 1380]),
)


def desired_of(spec: Interface, wanted: list[Peer]) -> Desired:
    scope = Scope("e1", 1)
    scope.put(resource(spec))
    for item in wanted:
        scope.put(resource(item))
    return Desired({SCOPE: scope}, 0)


def host_on(model: ModelWireGuard) -> Host:
    async def opened() -> ModelWireGuard:
        return model

    return Host(opened, ModelFirewall(), KEY, PUBLIC)


async def observed_peers(model: ModelWireGuard) -> dict[bytes, Peer]:
    device = await model.observe("wg0")
    assert device is not None
    return {item.public_key: item for item in device.peers}


@settings(deadline=None)
@given(
    before=st.none() | st.tuples(specs, st.lists(peers), st.sampled_from([KEY, None, PrivateKey(b"\x09" * 32)])),
    spec=specs,
    wanted=st.lists(peers),
)
def test_carried_out_plan_gives_the_desired_state_and_the_next_plan_is_empty(
    before: tuple[Interface, list[Peer], PrivateKey | None] | None, spec: Interface, wanted: list[Peer]
) -> None:
    async def scenario() -> None:
        model, desired = ModelWireGuard(), desired_of(spec, wanted)
        if before is not None:
            model.create(before[0], before[2])
            await model.apply_peers("wg0", before[1])
        actions = plan(await model.observe("wg0"), spec, desired.peers, public_key=PUBLIC)
        assert await host_on(model).carry_out("wg0", actions) == {}
        assert (await observed_peers(model)).keys() == desired.peers.keys()
        assert plan(await model.observe("wg0"), spec, desired.peers, public_key=PUBLIC) == []

    asyncio.run(scenario())


@settings(deadline=None)
@given(first=st.lists(peers), upserts=st.lists(peers), removals=st.lists(peers))
def test_steps_of_a_change_lead_where_a_whole_plan_would(
    first: list[Peer], upserts: list[Peer], removals: list[Peer]
) -> None:
    async def scenario() -> None:
        model, desired = ModelWireGuard(), desired_of(INTERFACE, first)
        host = host_on(model)
        await host.carry_out("wg0", plan(None, INTERFACE, desired.peers, public_key=PUBLIC))
        gone = [(removal.kind, removal.key) for removal in map(name, removals)]
        change = desired.change(SCOPE, [resource(item) for item in upserts], gone, 0)
        await host.carry_out("wg0", steps(change))
        assert plan(await model.observe("wg0"), INTERFACE, desired.peers, public_key=PUBLIC) == []

    asyncio.run(scenario())


@settings(deadline=None)
@given(observed=st.lists(peers), wanted=st.lists(peers))
def test_removals_come_before_changes_and_changes_before_additions(observed: list[Peer], wanted: list[Peer]) -> None:
    async def scenario() -> None:
        model = ModelWireGuard()
        model.create(INTERFACE, None)
        await model.apply_peers("wg0", observed)
        device = await model.observe("wg0")
        actions = plan(device, INTERFACE, desired_of(INTERFACE, wanted).peers, public_key=PUBLIC)
        ranks = [rank(action) for action in actions]
        assert ranks == sorted(ranks)
        kept = plan(device, INTERFACE, desired_of(INTERFACE, wanted).peers, public_key=PUBLIC, prune=False)
        assert kept == [action for action in actions if not isinstance(action, RemovePeer)]

    asyncio.run(scenario())


def rank(action: object) -> int:
    match action:
        case EnsureInterface():
            return 0
        case RemovePeer():
            return 1
        case SetPeer(new=False):
            return 2
        case _:
            return 3


@given(wanted=st.lists(peers))
def test_admitted_peers_never_share_a_key_or_an_address(wanted: list[Peer]) -> None:
    desired = desired_of(INTERFACE, wanted)
    claimed = [prefix for item in desired.peers.values() for prefix in item.allowed_ips]
    assert len(claimed) == len(set(claimed))
    latest = {item.public_key: item for item in wanted}
    assert len(desired.peers) + len(desired.refusals(SCOPE)) == len(latest)


def test_address_is_released_before_another_peer_gets_it() -> None:
    model = ModelWireGuard()
    model.create(INTERFACE, KEY)
    taker, giver = peer(1), peer(2, allowed_ips=("10.66.9.1/32", "10.66.9.2/32"))
    wanted = [peer(1, allowed_ips=(*taker.allowed_ips, "10.66.9.2/32")), peer(2, allowed_ips=("10.66.9.1/32",))]

    async def scenario() -> list[object]:
        await model.apply_peers("wg0", [taker, giver])
        return list(plan(await model.observe("wg0"), INTERFACE, desired_of(INTERFACE, wanted).peers, public_key=PUBLIC))

    assert asyncio.run(scenario()) == [SetPeer(wanted[1], new=False), SetPeer(wanted[0], new=False)]


def test_actions_read_as_a_log() -> None:
    (ensure, add) = plan(None, INTERFACE, {peer(1).public_key: peer(1)}, public_key=PUBLIC)
    assert str(ensure) == "set up interface wg0: it is not there"
    assert str(add) == f"add peer {peer(1).key} (10.66.1.2/32)"
    assert str(RemovePeer(peer(1).public_key)) == f"remove peer {peer(1).key}"
