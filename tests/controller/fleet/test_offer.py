"""What a host says that it offers: another's words, of perhaps another version."""

from __future__ import annotations

import pytest

from controller.channel.session import ProtocolViolation, Session
from controller.fleet.offer import Offer, scopes_of
from shared.protocol import PROTOCOL_VERSION, Hello
from shared.resource import Protocol

KEY = "ssh-ed25519 " + "A" * 68


def hello(protocols: list[str] | None = None, keys: list[str] | None = None, ledger: str = "") -> Hello:
    return Hello(
        version=PROTOCOL_VERSION,
        agent="a",
        boot_id="b",
        protocols=protocols or [],
        ssh_host_keys=keys or [],
        ledger=ledger,
    )


def test_an_agent_that_names_no_protocol_has_wireguard() -> None:
    assert Offer.of(hello()) == Offer()
    assert Offer().protocols == (Protocol.WIREGUARD,)


def test_names_that_this_version_does_not_know_are_left_out() -> None:
    assert Offer.of(hello(["masque", "ssh", "openvpn", "ssh", "SSH", "ssh\n"])).protocols == (
        Protocol.OPENVPN,
        Protocol.SSH,
    )
    assert Offer.of(hello(["masque"])).protocols == ()


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "ssh-ed25519",
        f"{KEY}\n{KEY}",
        f'command="id" {KEY}',
        f"ssh-dss {'A' * 68}",
        f"ssh-ed25519-of-tomorrow {'A' * 68}",
        f"ssh-ed25519 {'A' * 20}\x00",
    ],
)
def test_a_host_key_that_no_known_hosts_should_have_is_left_out(bad: str) -> None:
    assert Offer.of(hello(keys=[bad, f"{KEY} host"])).ssh_host_keys == (KEY,)


def test_a_host_has_few_keys() -> None:
    keys = [f"ssh-ed25519 {'A' * 60}{number:08}" for number in range(100)]
    assert Offer.of(hello(keys=keys)).ssh_host_keys == tuple(keys[:8])


def test_a_node_listens_to_itself_and_to_what_it_offers() -> None:
    assert scopes_of("1", [Protocol.WIREGUARD]) == ("node:1",)
    assert scopes_of("1", [Protocol.WIREGUARD, Protocol.SSH]) == ("node:1", "protocol:ssh")
    assert scopes_of("1", Protocol) == ("node:1", "protocol:openvpn", "protocol:ssh", "protocol:l2tp")


@pytest.mark.parametrize("ledger", ["a b", "a\nb", "x" * 65, "ü", "a/b"])
def test_a_ledger_is_one_plain_word(ledger: str) -> None:
    with pytest.raises(ProtocolViolation):
        Session("1", "e", ()).check(hello(ledger=ledger))
