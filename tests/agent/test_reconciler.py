"""The reconciler on a model host: what arrives, what the host has, what is answered."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agent.drivers.base import DriverError
from shared.desired import Kind, digest
from shared.protocol import Applied, Delta, Drift, Refused, Resource, Resync
from tests.agent.fleet import INTERFACE, KEY, SCOPE, Node, delta, peer, snapshot, until, welcome
from tests.agent.model_host import ModelWireGuard

PEERS = [peer(number) for number in range(20)]


async def test_snapshot_is_applied_and_answered_with_the_digest_of_the_host(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        answers = await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
    assert node.present() == {item.public_key for item in PEERS}
    assert node.firewall.loaded == (INTERFACE,)
    assert answers == [Applied(scope=SCOPE, revision=1, digest=digest([INTERFACE, *PEERS]))]


async def test_delta_costs_no_reading_of_the_host_and_keeps_the_digest(tmp_path: Path) -> None:
    changed = peer(1, keepalive=25)
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        node.wireguard.calls.clear()
        answers = await node.send(delta(1, 2, [changed, peer(50)], [PEERS[0]]))
        assert node.wireguard.calls == [
            ("remove_peers", [PEERS[0].public_key]),
            ("apply_peers", [changed.public_key, peer(50).public_key]),
        ]
    wanted = [INTERFACE, changed, *PEERS[2:], peer(50)]
    assert answers == [Applied(scope=SCOPE, revision=2, digest=digest(wanted))]


async def test_snapshot_in_parts_counts_when_the_last_part_is_here(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS[:10]], last=False))
        assert node.wireguard.devices == {}
        await node.send(snapshot(PEERS[10:], part=1))
        assert node.present() == {item.public_key for item in PEERS}


async def test_snapshot_with_a_lost_part_changes_nothing(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        await node.send(snapshot([INTERFACE], 2, last=False))
        answers = await node.send(snapshot(PEERS[:3], 2, part=2))
        assert isinstance(answers[0], Resync)
        assert len(node.present()) == len(PEERS)


# --- threat 8: replays, lower revisions, other epochs, unknown bases


async def test_replayed_delta_is_answered_and_changes_nothing(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]), delta(1, 2, removals=[PEERS[0]]))
        node.wireguard.calls.clear()
        answers = await node.send(delta(1, 2, removals=[PEERS[0]]), delta(0, 1, [PEERS[0]]))
        assert node.wireguard.calls == []
        assert [(type(answer), answer.revision) for answer in answers] == [(Applied, 2), (Applied, 2)]


@pytest.mark.parametrize(
    "frame",
    [delta(5, 6, [peer(60)]), delta(1, 2, [peer(60)], epoch="e0"), delta(1, 2, [peer(60)], scope="node:2")],
    ids=["unknown base", "other epoch", "unknown scope"],
)
async def test_delta_that_does_not_fit_asks_for_a_snapshot(tmp_path: Path, frame: object) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        answers = await node.send(frame)  # type: ignore[arg-type]
        assert [type(answer) for answer in answers] == [Resync]
        assert len(node.present()) == len(PEERS)


async def test_snapshots_of_an_older_revision_or_another_epoch_are_refused(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS], 7))
        fewer = [INTERFACE, *PEERS[:15]]  # so few are missing that the guard would let it pass
        answers = await node.send(snapshot(fewer, 6), snapshot(fewer, 9, epoch="e0"))
        assert [type(answer) for answer in answers] == [Refused, Refused]
        assert len(node.present()) == len(PEERS)
        assert node.reconciler.hello().revisions == {SCOPE: 7}


async def test_new_epoch_brings_a_snapshot_that_is_adopted_without_touching_peers(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS], 90))
        node.wireguard.calls.clear()
        await node.send(welcome(epoch="e2"), snapshot([INTERFACE, *PEERS], 3, epoch="e2"))
        assert node.wireguard.writes() == []
        assert (node.reconciler.hello().epoch, node.reconciler.hello().revisions) == ("e2", {SCOPE: 3})


async def test_resync_is_asked_once_and_then_more_and_more_seldom(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE]))
        answers = await node.send(*[delta(number, number + 1) for number in range(5, 30)])
        assert [type(answer) for answer in answers] == [Resync]


# --- threat 9: an empty or gutted snapshot


@pytest.mark.parametrize("kept", [0, 5])
async def test_snapshot_that_removes_too_much_is_refused_until_it_is_confirmed(tmp_path: Path, kept: int) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        (answer,) = await node.send(snapshot([INTERFACE, *PEERS[:kept]], 2))
        assert isinstance(answer, Refused)
        assert (answer.removes, answer.present) == (20 - kept, 20)
        assert len(node.present()) == 20
        assert node.counters.refused_snapshots == 1
        await node.send(snapshot([INTERFACE, *PEERS[:kept]], 2, confirmed=True))
        assert len(node.present()) == kept


async def test_snapshot_without_anything_is_refused(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        (answer,) = await node.send(snapshot([], 2))
        assert isinstance(answer, Refused)
        assert len(node.present()) == 20


async def test_poisoned_snapshot_counts_as_removal_of_what_it_spoils(tmp_path: Path) -> None:
    poisoned = [Resource(Kind.WIREGUARD_PEER, item.key, b"\xc1") for item in PEERS]
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        frame = snapshot([INTERFACE], 2)
        (answer,) = await node.send(snapshot([], 2, resources=[*frame.resources, *poisoned]))
        assert isinstance(answer, Refused)
        assert len(node.present()) == 20


async def test_scopes_that_vanish_from_the_welcome_are_guarded_too(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        answers = await node.send(welcome("protocol:wireguard"))
        assert [type(answer) for answer in answers] == [Refused]
        assert len(node.present()) == 20


async def test_a_scope_of_few_peers_is_dropped_when_the_controller_does_not_name_it(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        other = snapshot([peer(100)], scope="node:other")
        await node.send(welcome(SCOPE, "node:other"), snapshot([INTERFACE, *PEERS]), other)
        assert len(node.present()) == 21
        await node.send(welcome(SCOPE))
        assert len(node.present()) == 20


# --- adoption


async def test_running_interface_is_adopted_and_nothing_is_removed_before_the_first_sync(tmp_path: Path) -> None:
    wireguard = ModelWireGuard()
    device = wireguard.create(INTERFACE, KEY)
    await wireguard.apply_peers("wg0", PEERS)
    async with Node(tmp_path, wireguard) as node:
        await node.reconciler.recheck()
        assert len(device.peers) == 20
        await node.send(welcome(), snapshot([INTERFACE, *PEERS[:15]]))
        assert wireguard.devices["wg0"] is device
        assert node.present() == {item.public_key for item in PEERS[:15]}


async def test_first_snapshot_is_guarded_by_what_the_host_has(tmp_path: Path) -> None:
    wireguard = ModelWireGuard()
    wireguard.create(INTERFACE, KEY)
    await wireguard.apply_peers("wg0", PEERS)
    async with Node(tmp_path, wireguard) as node:
        (answer,) = await node.send(welcome(), snapshot([INTERFACE]))
        assert isinstance(answer, Refused)
        assert len(node.present()) == 20


async def test_restart_writes_nothing_to_a_host_that_is_as_desired(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
    node.wireguard.calls.clear()
    async with Node(tmp_path, node.wireguard) as again:
        answers = await again.send(welcome())
        assert node.wireguard.writes() == []
        assert again.reconciler.hello().revisions == {SCOPE: 1}
    assert answers == [Applied(scope=SCOPE, revision=1, digest=digest([INTERFACE, *PEERS]))]


async def test_reboot_without_a_controller_brings_all_peers_back(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]), delta(1, 2, removals=PEERS[:2]))
    async with Node(tmp_path) as rebooted:
        assert rebooted.present() == {item.public_key for item in PEERS[2:]}


# --- threat 10: peers that would take over traffic


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (peer(90, allowed_ips=("0.0.0.0/0",)), "wider"),
        (peer(90, allowed_ips=("10.66.0.0/24",)), "wider"),
        (peer(90, allowed_ips=("10.66.0.1/32",)), "node itself"),
        (peer(90, allowed_ips=("fd66::1/128",)), "node itself"),
        (peer(90, allowed_ips=PEERS[3].allowed_ips), "belongs to peer"),
        (peer(90, allowed_ips=("::ffff:10.66.0.9/128",)), "IPv4-mapped"),
        (peer(90, allowed_ips=("10.66.9.9/32", "10.66.9.9/32")), "twice"),
        (peer(90, public_key=bytes(32)), "all zero"),
    ],
)
async def test_dangerous_peer_is_refused_with_the_reason_and_the_rest_is_applied(
    tmp_path: Path, bad: object, words: str
) -> None:
    async with Node(tmp_path) as node:
        (answer,) = await node.send(welcome(), snapshot([INTERFACE, *PEERS, bad]))  # type: ignore[list-item]
        assert isinstance(answer, Applied)
        (failure,) = answer.failures
        assert words in failure.message
        assert answer.digest == digest([INTERFACE, *PEERS])
        assert node.present() == {item.public_key for item in PEERS}
        (answer,) = await node.send(delta(1, 2, [bad, peer(91)]))  # type: ignore[list-item]
        assert isinstance(answer, Applied)
        assert len(answer.failures) == 1
        assert answer.digest == digest([INTERFACE, *PEERS, peer(91)])


async def test_peer_of_two_scopes_is_refused_in_the_second(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(SCOPE, "x"), snapshot([INTERFACE, *PEERS]))
        twin = peer(0, allowed_ips=("10.66.200.1/32",))
        (answer,) = await node.send(snapshot([twin], scope="x"))
        assert isinstance(answer, Applied)
        assert "same public key" in answer.failures[0].message
        assert node.wireguard.devices["wg0"].peers[twin.public_key].allowed_ips == PEERS[0].allowed_ips


async def test_refused_peer_gets_the_address_when_its_holder_goes(tmp_path: Path) -> None:
    waiting = peer(90, allowed_ips=PEERS[3].allowed_ips)
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS, waiting]))
        (answer,) = await node.send(delta(1, 2, removals=[PEERS[3]]))
        assert answer == Applied(scope=SCOPE, revision=2, digest=digest([INTERFACE, *PEERS[:3], *PEERS[4:], waiting]))
        assert waiting.public_key in node.present()


async def test_addresses_are_swapped_without_loss(tmp_path: Path) -> None:
    first, second = peer(0, allowed_ips=PEERS[1].allowed_ips), peer(1, allowed_ips=PEERS[0].allowed_ips)
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        (answer,) = await node.send(delta(1, 2, [first, second]))
        assert answer == Applied(scope=SCOPE, revision=2, digest=digest([INTERFACE, first, second, *PEERS[2:]]))
        node.wireguard.calls.clear()
        await node.reconciler.recheck()
        assert node.wireguard.writes() == []


async def test_resource_of_an_unknown_kind_is_reported_and_kept_for_a_newer_version(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        (answer,) = await node.send(
            Delta(epoch="e1", scope=SCOPE, base=1, revision=2, upserts=[Resource("quantum.tunnel", "q", b"\x80")])
        )
        assert isinstance(answer, Applied)
        assert answer.failures[0].kind == "quantum.tunnel"
        assert answer.digest == digest([INTERFACE, *PEERS])


# --- drivers that fail


async def test_one_bad_peer_does_not_keep_out_the_others(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        node.wireguard.poison[PEERS[7].public_key] = "wg: no room for this peer"
        (answer,) = await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        assert isinstance(answer, Applied)
        assert [(failure.key, failure.message) for failure in answer.failures] == [
            (PEERS[7].key, "wg: no room for this peer")
        ]
        assert answer.digest == digest([INTERFACE, *PEERS[:7], *PEERS[8:]])
        node.wireguard.poison.clear()
        await node.reconciler.recheck()
        assert node.last(Applied) == Applied(scope=SCOPE, revision=1, digest=digest([INTERFACE, *PEERS]))


async def test_missing_program_is_reported_in_its_words_and_retried_until_it_is_there(tmp_path: Path) -> None:
    async with Node(tmp_path, recheck_seconds=3600.0) as node:
        node.wireguard.failing["ensure"] = DriverError("wireguard-go: No such file or directory")
        await node.send(welcome())
        (answer,) = await node.send(snapshot([INTERFACE, *PEERS]))
        assert isinstance(answer, Applied)
        assert len(answer.failures) == 21
        assert "wireguard-go: No such file" in answer.failures[0].message
        assert answer.digest == digest([])
        node.wireguard.failing.clear()
        await until(lambda: node.frames[-1].failures == [])  # type: ignore[attr-defined]
        assert node.last(Applied).digest == digest([INTERFACE, *PEERS])


async def test_firewall_that_fails_is_reported_while_the_tunnels_serve(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        node.firewall.failing = DriverError("nft: Operation not permitted")
        (answer,) = await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        assert isinstance(answer, Applied)
        assert [(failure.kind, failure.key) for failure in answer.failures] == [(Kind.WIREGUARD_INTERFACE, "wg0")]
        assert "Operation not permitted" in answer.failures[0].message
        assert len(node.present()) == 20


async def test_removal_that_fails_is_not_acknowledged_as_done(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        node.wireguard.failing["remove_peers"] = DriverError("interrupted")
        (answer,) = await node.send(delta(1, 2, removals=[PEERS[0]]))
        assert isinstance(answer, Applied)
        assert answer.failures[0].key == PEERS[0].key
        node.wireguard.failing.clear()
        await node.reconciler.recheck()
        assert PEERS[0].public_key not in node.present()


# --- drift


async def test_recheck_heals_and_reports_what_somebody_changed_by_hand(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        peers = node.wireguard.devices["wg0"].peers
        del peers[PEERS[0].public_key]
        peers[PEERS[1].public_key].keepalive = 99
        await node.wireguard.apply_peers("wg0", [peer(500)])
        await node.reconciler.recheck()
        assert node.last(Drift) == Drift(scope=SCOPE, missing=1, unexpected=1, changed=1)
        assert node.present() == {item.public_key for item in PEERS}
        node.wireguard.calls.clear()
        await node.reconciler.recheck()
        assert [call for call, _ in node.wireguard.calls] == ["fingerprint", "observe", "fingerprint"]
        node.wireguard.calls.clear()
        await node.reconciler.recheck()
        assert [call for call, _ in node.wireguard.calls] == ["fingerprint"]


async def test_what_was_proven_once_is_proven_again_when_the_host_or_the_wish_changes(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        await node.reconciler.recheck()
        node.wireguard.devices["wg0"].peers[PEERS[3].public_key].keepalive = 99
        await node.reconciler.recheck()
        assert node.last(Drift) == Drift(scope=SCOPE, changed=1)
        assert node.wireguard.devices["wg0"].peers[PEERS[3].public_key].keepalive == 0
        await node.reconciler.recheck()
        proven = await node.wireguard.fingerprint("wg0")
        await node.send(delta(1, 2, removals=[PEERS[0]]))
        await node.wireguard.apply_peers("wg0", [PEERS[0]])  # by hand: the host is again as it was when it was proven
        node.wireguard.devices["wg0"].peers = {
            item.public_key: node.wireguard.devices["wg0"].peers[item.public_key] for item in PEERS
        }
        assert await node.wireguard.fingerprint("wg0") == proven
        await node.reconciler.recheck()
        assert PEERS[0].public_key not in node.present()


async def test_interface_that_was_deleted_comes_back_with_the_next_change(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        node.wireguard.devices.clear()
        (answer,) = await node.send(delta(1, 2, [peer(70)]))
        assert answer == Applied(scope=SCOPE, revision=2, digest=digest([INTERFACE, *PEERS, peer(70)]))
        assert len(node.present()) == 21


async def test_firewall_rules_that_somebody_flushed_are_loaded_again(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        node.firewall.loaded = None
        await node.reconciler.recheck()
        assert node.firewall.loaded == (INTERFACE,)
        assert node.firewall.loads == 2


async def test_renamed_interface_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    renamed = type(INTERFACE)(name="wg1", listen_port=51820, addresses=INTERFACE.addresses)
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        (answer,) = await node.send(delta(1, 2, [renamed], [INTERFACE]))
        assert answer == Applied(scope=SCOPE, revision=2, digest=digest([renamed, *PEERS]))
        assert set(node.wireguard.devices) == {"wg1"}


# --- leases


async def test_lease_ends_on_the_host_without_the_controller(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        leased = peer(80, not_after=int(node.now) + 60)
        await node.send(welcome(), snapshot([INTERFACE, *PEERS, leased]))
        assert leased.public_key in node.present()
        node.now += 59.5
        await asyncio.sleep(0)
        assert leased.public_key in node.present()
        node.now += 0.5
        await until(lambda: leased.public_key not in node.present())
        await until(lambda: node.last(Applied).digest == digest([INTERFACE, *PEERS]))


async def test_expired_lease_is_not_applied_after_a_restart(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS, peer(80, not_after=int(node.now) + 60)]))
    rebooted = Node(tmp_path)
    rebooted.now += 61
    async with rebooted:
        assert len(rebooted.present()) == 20


async def test_renewed_lease_keeps_the_peer_and_a_clock_set_back_brings_it_again(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        leased = peer(80, not_after=int(node.now) + 60)
        await node.send(welcome(), snapshot([INTERFACE, *PEERS, leased]))
        await node.send(delta(1, 2, [peer(80, not_after=int(node.now) + 600)]))
        node.now += 100
        await node.reconciler.recheck()
        assert leased.public_key in node.present()
        node.now += 1000
        await until(lambda: leased.public_key not in node.present())
        node.now -= 1000
        await node.reconciler.recheck()
        assert leased.public_key in node.present()


async def test_address_of_an_expired_peer_can_be_given_to_another(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        leased = peer(80, not_after=int(node.now) + 60)
        await node.send(welcome(), snapshot([INTERFACE, leased]))
        node.now += 60
        await until(lambda: not node.present())
        other = peer(81, allowed_ips=leased.allowed_ips)
        (answer,) = await node.send(delta(1, 2, [other]))
        assert isinstance(answer, Applied)
        assert [(failure.key, failure.message) for failure in answer.failures] == [(leased.key, "its lease has ended")]
        assert node.present() == {other.public_key}


async def test_nothing_is_removed_until_every_scope_of_the_session_is_here(tmp_path: Path) -> None:
    wireguard = ModelWireGuard()
    wireguard.create(INTERFACE, KEY)
    await wireguard.apply_peers("wg0", PEERS)
    async with Node(tmp_path, wireguard) as node:
        await node.send(welcome(SCOPE, "second"), snapshot([INTERFACE, *PEERS[:5]]))
        assert len(node.present()) == 20
        await node.send(snapshot(PEERS[5:18], scope="second"))
        assert node.present() == {item.public_key for item in PEERS[:18]}


async def test_removal_by_snapshot_that_fails_is_named(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        node.wireguard.failing["remove_peers"] = DriverError("interrupted")
        answer = (await node.send(snapshot([INTERFACE, *PEERS[1:]], 2)))[0]
        assert isinstance(answer, Applied)
        assert [(failure.key, failure.message) for failure in answer.failures] == [(PEERS[0].key, "interrupted")]


async def test_stopping_never_hangs_on_a_host_that_has_just_begun_to_fail(tmp_path: Path) -> None:
    for attempt in range(20):
        async with asyncio.timeout(10):
            async with Node(tmp_path / str(attempt)) as node:
                node.wireguard.failing["ensure"] = DriverError("no")
                await node.reconciler.inbox.put(welcome())
                await node.reconciler.inbox.put(snapshot([INTERFACE]))
                await until(lambda node=node: node.counters.applies == 2)
