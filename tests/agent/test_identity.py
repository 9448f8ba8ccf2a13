"""A renewal that a crash cut anywhere leaves a pair that fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.errors import AgentError
from agent.identity import Identity, new_key, signing_request
from shared.keys import PrivateKey
from tests.agent.fake_controller import Authority


@pytest.fixture
def identity(tmp_path: Path) -> Identity:
    made, authority = Identity(tmp_path), Authority()
    for pair in (made.current, made.next):
        made.ensure_key(pair.key)
        made.store(pair, authority.sign_request(signing_request(pair.key.read_bytes())), authority.pem)
    return made


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_promotion_that_was_cut_is_finished_or_not_begun(identity: Identity, done: int) -> None:
    order = [
        (identity.next.ca, identity.current.ca),
        (identity.next.key, identity.current.key),
        (identity.next.certificate, identity.current.certificate),
    ]
    renewed = identity.next.certificate.read_bytes()
    for source, target in order[:done]:
        source.replace(target)
    again = Identity(identity.directory)
    again.recover()
    again.tls(again.current)
    assert (again.current.certificate.read_bytes() == renewed) is (done > 0)
    assert again.pending() is (done == 0)


def test_key_without_a_certificate_is_no_renewed_pair(identity: Identity) -> None:
    identity.next.certificate.unlink()
    assert not identity.pending()
    identity.recover()
    identity.tls(identity.current)


def test_discarded_pair_is_gone_and_the_current_one_works(identity: Identity) -> None:
    identity.discard_next()
    assert not list(identity.directory.glob("*.next.*"))
    identity.tls(identity.current)


def test_pair_that_does_not_fit_is_named(identity: Identity) -> None:
    identity.current.key.write_bytes(new_key())
    with pytest.raises(AgentError, match=r"node\.crt"):
        identity.tls(identity.current)


def test_public_key_follows_the_private_one(identity: Identity) -> None:
    for number in (1, 2):
        key = PrivateKey(bytes([number]) * 32)
        identity.store_wireguard_key(key)
        assert identity.public_key() == key.public().raw
        assert identity.public_key() == key.public().raw
    (identity.directory / "wireguard.pub").write_bytes(b"\xff garbage")
    assert identity.public_key() == key.public().raw
