"""The protocol's rules, without sockets or a database."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from controller.channel.pushes import merge
from controller.channel.session import REPAIR_INTERVAL, ProtocolViolation, Session, Wanted
from controller.desired.service import Changes
from shared.protocol import PROTOCOL_VERSION, Applied, Failure, Hello, Refused, Resource, ResourceName, Resync

SCOPE, DIGEST = "node:1", b"d" * 16


def greeted(epoch: str = "e", at: int | None = None) -> Session:
    session = Session("1", "e", (SCOPE,))
    known = {SCOPE: at} if at is not None else {}
    hello = Hello(version=PROTOCOL_VERSION, agent="a", boot_id="b", epoch=epoch, revisions=known)
    session.check(hello)
    session.hello(hello)
    return session


def synchronised(revision: int = 5) -> Session:
    session = greeted(at=revision)
    assert push(session, revision)
    return session


def push(session: Session, revision: int, digest: bytes = DIGEST) -> bool:
    """Send what is wanted, as if it was read in no time."""
    wanted = session.wanted()
    assert wanted is not None
    return session.pushing(wanted, revision, digest)


def applied(revision: int, digest: bytes = DIGEST, *failures: Failure) -> Applied:
    return Applied(scope=SCOPE, revision=revision, digest=digest, failures=list(failures))


def test_nothing_is_wanted_before_the_hello() -> None:
    session = Session("1", "e", (SCOPE,))
    session.poke(SCOPE, 0)
    assert session.wanted() is None


@pytest.mark.parametrize(("epoch", "at"), [("other", 7), ("", None), ("e", None)])
def test_another_history_or_none_needs_the_whole(epoch: str, at: int | None) -> None:
    assert greeted(epoch, at).wanted() == Wanted(SCOPE, None)


@pytest.mark.parametrize("boot_id", ["", "a b", "a\nb", "x" * 65, "ü"])
def test_a_boot_id_is_one_plain_word(boot_id: str) -> None:
    with pytest.raises(ProtocolViolation):
        Session("1", "e", ()).check(Hello(version=PROTOCOL_VERSION, agent="a", boot_id=boot_id))


def test_versions_one_apart_talk_and_older_ones_are_told() -> None:
    session = Session("1", "e", ())
    session.check(Hello(version=PROTOCOL_VERSION + 1, agent="a", boot_id="b"))
    with pytest.raises(ProtocolViolation, match="update"):
        session.check(Hello(version=PROTOCOL_VERSION - 2, agent="a", boot_id="b"))


def test_a_second_hello_is_refused() -> None:
    with pytest.raises(ProtocolViolation):
        greeted().check(Hello(version=PROTOCOL_VERSION, agent="a", boot_id="b"))


def test_a_node_that_has_everything_is_asked_once_what_it_really_has() -> None:
    session = synchronised()
    session.poke(SCOPE, 0)
    assert not push(session, 5)


def test_an_answer_counts_only_for_what_this_session_sent() -> None:
    session = greeted(at=57)  # ahead of this database
    assert session.applied(applied(57), 0) is None
    push(session, 50)
    with pytest.raises(ProtocolViolation, match="never sent"):
        session.applied(applied(51), 0)


def test_the_time_of_a_push_runs_from_its_first_change() -> None:
    session = synchronised()
    session.poke(SCOPE, 10)
    session.poke(SCOPE, 11)
    push(session, 7)
    answer = session.applied(applied(7), 14)
    assert answer is not None
    assert answer.seconds == (4,)
    again = session.applied(applied(7), 20)
    assert again is not None
    assert again.seconds == ()


def test_a_mismatch_is_repaired_by_a_snapshot_but_not_in_a_loop() -> None:
    session = synchronised()
    answer = session.applied(applied(5, b"x" * 16), 100)
    assert answer is not None
    assert answer.mismatch
    assert session.wanted() == Wanted(SCOPE, None)
    session.pushing(Wanted(SCOPE, None), 5, DIGEST)
    session.applied(applied(5, b"x" * 16), 101)
    assert session.wanted() is None
    session.applied(applied(5, b"x" * 16), 100 + REPAIR_INTERVAL)
    assert session.wanted() == Wanted(SCOPE, None)


def test_failures_explain_a_mismatch() -> None:
    answer = synchronised().applied(applied(5, b"x" * 16, Failure("wireguard.peer", "k", "no such device")), 0)
    assert answer is not None
    assert not answer.mismatch
    assert answer.problem == "1 not applied; wireguard.peer k: no such device"


def test_an_answer_to_an_earlier_push_is_not_compared() -> None:
    session = synchronised()
    session.poke(SCOPE, 0)
    push(session, 6, b"e" * 16)
    answer = session.applied(applied(5), 0)
    assert answer is not None
    assert not answer.mismatch


def test_a_refused_snapshot_is_held_until_it_is_confirmed() -> None:
    session = greeted("other", at=1)
    push(session, 5)
    session.refused(Refused(scope=SCOPE, revision=5, reason="too much"), 0)
    session.poke(SCOPE, 1)
    assert session.wanted() is None
    assert not session.confirm(SCOPE, 4)  # of an earlier refusal
    assert session.confirm(SCOPE, 5)
    assert session.wanted() == Wanted(SCOPE, None, confirmed=True)
    session.pushing(Wanted(SCOPE, None, confirmed=True), 5, DIGEST)
    session.applied(applied(5), 2)
    session.resync(Resync(scope=SCOPE, reason="r"), 3)
    assert session.wanted() == Wanted(SCOPE, None, confirmed=False)  # it was allowed once


def test_a_refused_snapshot_is_offered_again_later_when_the_rows_have_changed() -> None:
    session = greeted("other", at=1)
    push(session, 5)
    session.refused(Refused(scope=SCOPE, revision=5, reason="too much"), 0)
    assert not session.compare(SCOPE, 6, REPAIR_INTERVAL - 1)
    assert not session.compare(SCOPE, 5, REPAIR_INTERVAL + 1)
    assert session.compare(SCOPE, 6, REPAIR_INTERVAL + 1)
    assert session.wanted() == Wanted(SCOPE, None)


def test_a_confirmation_with_nothing_to_confirm_changes_nothing() -> None:
    session = synchronised()
    assert not session.confirm(SCOPE, 5)
    assert not session.confirm("protocol:ssh", 5)  # it was one of the node's when it was refused
    assert session.wanted() is None


def test_a_node_that_asks_for_snapshots_all_the_time_is_stopped() -> None:
    session = synchronised()
    with pytest.raises(ProtocolViolation, match="snapshots"):
        for second in range(60):
            session.resync(Resync(scope=SCOPE, reason="again"), second)
    patient = synchronised()
    for minute in range(60):
        patient.resync(Resync(scope=SCOPE, reason="again"), 60.0 * minute)


def test_the_sweep_finds_what_was_missed() -> None:
    session = synchronised()
    assert not session.compare(SCOPE, 5, 0)
    assert session.compare(SCOPE, 6, 0)
    assert session.wanted() == Wanted(SCOPE, 5)


def test_a_change_that_the_sweep_saw_before_its_commit_told_is_timed_once() -> None:
    session = synchronised()
    assert session.compare(SCOPE, 6, 10)
    assert push(session, 6)
    session.poke(SCOPE, 11)
    assert not push(session, 6)
    done = session.applied(applied(6), 12)
    assert done is not None
    assert done.seconds == (2,)


def test_what_could_not_be_read_stays_wanted() -> None:
    session = greeted(at=5)
    session.wanted()
    session.postpone(SCOPE)
    assert session.wanted() == Wanted(SCOPE, 5)


@pytest.mark.parametrize(
    "cause",
    [
        lambda session: session.resync(Resync(scope=SCOPE, reason="r"), 0),
        lambda session: session.applied(applied(5, b"x" * 16), REPAIR_INTERVAL),
    ],
)
def test_a_delta_that_was_being_read_does_not_stand_for_the_whole(cause: Callable[[Session], object]) -> None:
    session = synchronised()
    session.poke(SCOPE, 0)
    reading = session.wanted()
    assert reading == Wanted(SCOPE, 5)
    cause(session)
    assert not session.pushing(reading, 6, DIGEST)
    assert session.wanted() == Wanted(SCOPE, None)
    assert session.pushing(Wanted(SCOPE, None), 6, DIGEST)
    acknowledged = session.applied(applied(6), 3)
    assert acknowledged is not None
    assert acknowledged.seconds == (3,)  # the change is timed although its delta was not sent


def test_a_snapshot_that_was_being_read_when_it_was_refused_is_not_sent() -> None:
    session = synchronised()
    session.resync(Resync(scope=SCOPE, reason="r"), 0)
    reading = session.wanted()
    assert reading == Wanted(SCOPE, None)
    session.refused(Refused(scope=SCOPE, revision=5, reason="too much"), 0)
    assert not session.pushing(reading, 5, DIGEST)


def test_a_snapshot_that_was_being_read_when_it_was_confirmed_is_sent_confirmed() -> None:
    session = synchronised()
    session.resync(Resync(scope=SCOPE, reason="r"), 0)
    reading = session.wanted()
    assert reading == Wanted(SCOPE, None)
    session.refused(Refused(scope=SCOPE, revision=5, reason="too much"), 0)
    assert session.confirm(SCOPE, 5)
    assert not session.pushing(reading, 5, DIGEST)
    assert session.wanted() == Wanted(SCOPE, None, confirmed=True)
    assert session.pushing(Wanted(SCOPE, None, confirmed=True), 5, DIGEST)


def change(base: int, upserts: dict[str, bytes], removals: tuple[str, ...] = ()) -> Changes:
    return Changes(
        SCOPE,
        base,
        base + 1,
        bytes([base]),
        [Resource("k", key, payload) for key, payload in upserts.items()],
        [ResourceName("k", key) for key in removals],
    )


def test_one_transactions_changes_become_one() -> None:
    merged = merge([change(1, {"a": b"1", "b": b"1"}), change(2, {"c": b"2"}, ("a",)), change(3, {"a": b"3"}, ("b",))])
    assert merged is not None
    assert (merged.base, merged.revision, merged.digest) == (1, 4, b"\x03")
    assert {(item.key, item.payload) for item in merged.upserts} == {("a", b"3"), ("c", b"2")}
    assert [item.key for item in merged.removals] == ["b"]


def test_changes_that_do_not_follow_each_other_are_not_merged() -> None:
    assert merge([change(1, {}), change(3, {})]) is None
