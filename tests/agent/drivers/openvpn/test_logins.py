"""Who is let in: what OpenVPN has verified decides, and nothing that a client says of itself."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from agent.drivers.openvpn import logins
from agent.drivers.openvpn.logins import BUSY, EXPIRED, WRONG, Logins
from shared.access import Credential
from shared.crypt import hash_password
from shared.resource import Protocol

PASSWORD = "correct horse"
SECRET = hash_password(PASSWORD)
FINGERPRINT = os.urandom(32)


def credential(username: str = "alice", **fields: object) -> Credential:
    made = Credential(protocol=Protocol.OPENVPN, username=username, account=1, **fields)  # type: ignore[arg-type]
    made.check()
    return made


BY_PASSWORD = credential(secret=SECRET)
BY_CERTIFICATE = credential(fingerprint=FINGERPRINT)
BY_BOTH = credential(secret=SECRET, fingerprint=FINGERPRINT)

TYPED = {"username": "alice", "password": PASSWORD, "common_name": ""}
SHOWN = {"username": "", "password": "", "common_name": "alice", "tls_digest_sha256_0": FINGERPRINT.hex(":")}


class Asked:
    def __init__(self) -> None:
        self.names: list[str] = []
        self.reason: str | None = None

    def __call__(self, username: str) -> str | None:
        self.names.append(username)
        return self.reason


@pytest.fixture
def admit() -> Asked:
    return Asked()


async def decided(held: Logins, variables: dict[str, str], *, again: bool = False, username: str = "alice") -> str:
    return await held.examine(username, variables, again=again)


def holding(admit: Asked, *credentials: Credential) -> Logins:
    held = Logins(admit)
    held.put(credentials)
    return held


@pytest.mark.parametrize(
    ("held", "variables", "reason"),
    [
        (BY_PASSWORD, TYPED, ""),
        (BY_PASSWORD, {**TYPED, "password": "wrong"}, WRONG),
        (BY_PASSWORD, {**TYPED, "password": ""}, WRONG),
        (BY_PASSWORD, {**TYPED, "password": "a\udcff"}, WRONG),
        (BY_PASSWORD, SHOWN, WRONG),
        (BY_PASSWORD, {**SHOWN, "password": PASSWORD}, WRONG),
        (BY_CERTIFICATE, SHOWN, ""),
        (BY_CERTIFICATE, {**SHOWN, "tls_digest_sha256_0": FINGERPRINT.hex()}, ""),
        (BY_CERTIFICATE, TYPED, WRONG),
        (BY_CERTIFICATE, {**SHOWN, "tls_digest_sha256_0": os.urandom(32).hex(":")}, WRONG),
        (BY_CERTIFICATE, {**SHOWN, "tls_digest_sha256_0": ""}, WRONG),
        (BY_CERTIFICATE, {**SHOWN, "tls_digest_sha256_0": "\udcff"}, WRONG),
        # What is left over from an earlier handshake of the same client, and what a client may set by itself.
        (BY_CERTIFICATE, {**SHOWN, "common_name": ""}, WRONG),
        (BY_CERTIFICATE, {**TYPED, "tls_digest_sha256_0": FINGERPRINT.hex(":")}, WRONG),
        (BY_CERTIFICATE, {**TYPED, "UV_tls_digest_sha256_0": FINGERPRINT.hex(":")}, WRONG),
        (BY_CERTIFICATE, {**SHOWN, "common_name": "bob"}, WRONG),
        (BY_BOTH, {**SHOWN, **TYPED, "common_name": "alice"}, ""),
        (BY_BOTH, TYPED, WRONG),
        (BY_BOTH, SHOWN, WRONG),
        (BY_BOTH, {**SHOWN, **TYPED, "common_name": "alice", "password": "wrong"}, WRONG),
    ],
)
async def test_only_the_factors_of_the_credential_let_in(
    admit: Asked, held: Credential, variables: dict[str, str], reason: str
) -> None:
    assert await decided(holding(admit, held), variables) == reason
    assert admit.names == ([] if reason else ["alice"])


async def test_an_unknown_name_is_refused_in_the_same_words(admit: Asked) -> None:
    assert await decided(holding(admit, BY_PASSWORD), {**TYPED, "username": "bob"}, username="bob") == WRONG


async def test_the_agent_has_the_last_word_on_a_new_session_and_none_on_a_renewal(admit: Asked) -> None:
    admit.reason = "too many sessions"
    held = holding(admit, BY_CERTIFICATE)
    assert held.decide("alice", SHOWN, again=False) == "too many sessions"
    assert held.decide("alice", SHOWN, again=True) == ""


@pytest.mark.parametrize("again", [False, True])
async def test_an_expired_credential_lets_nobody_in(admit: Asked, again: bool) -> None:
    held = holding(admit, credential(fingerprint=FINGERPRINT, not_after=int(time.time())))
    assert held.decide("alice", SHOWN, again=again) == EXPIRED
    held.put([credential(fingerprint=FINGERPRINT, not_after=int(time.time()) + 60)])
    assert held.decide("alice", SHOWN, again=again) == ""


async def test_a_password_is_hashed_once(admit: Asked) -> None:
    held = holding(admit, BY_PASSWORD)
    assert held.decide("alice", TYPED, again=False) is None
    assert await decided(held, TYPED) == ""
    assert held.decide("alice", TYPED, again=False) == ""
    assert held.decide("alice", TYPED, again=True) == ""
    assert held.decide("alice", {**TYPED, "password": "another"}, again=False) is None


async def test_what_was_verified_is_forgotten_with_the_password(admit: Asked) -> None:
    held = holding(admit, BY_PASSWORD)
    assert await decided(held, TYPED) == ""
    held.put([credential(secret=hash_password("a new one"))])
    assert await decided(held, TYPED) == WRONG
    held.put([BY_PASSWORD])
    assert await decided(held, TYPED) == ""
    held.remove(["alice"])
    assert await decided(held, TYPED) == WRONG


async def test_a_login_that_goes_while_its_password_is_checked_is_gone(admit: Asked) -> None:
    held = holding(admit, BY_PASSWORD)
    check = asyncio.create_task(decided(held, TYPED))
    await asyncio.sleep(0)
    held.remove(["alice"])
    assert await check == WRONG
    assert admit.names == []


async def test_a_starting_agent_asks_for_patience_until_it_has_its_credentials(admit: Asked) -> None:
    held = Logins(admit)
    assert held.decide("alice", SHOWN, again=False) is None
    check = asyncio.create_task(decided(held, SHOWN))
    await asyncio.sleep(0)
    held.put([BY_CERTIFICATE])
    assert await check == ""


async def test_one_without_credentials_refuses_in_the_end(admit: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logins, "_FIRST_PUT", 0.01)
    assert await decided(Logins(admit), SHOWN) == BUSY


async def test_strangers_cannot_queue_without_end(admit: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logins, "_WAITING", 3)
    held = holding(admit, BY_PASSWORD)
    wrong = {**TYPED, "password": "wrong"}
    answers = await asyncio.gather(*(decided(held, wrong) for _ in range(6)))
    assert sorted(answers) == sorted([WRONG] * 3 + [BUSY] * 3)
