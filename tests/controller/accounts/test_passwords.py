"""The bounded pool that makes and checks password hashes."""

from __future__ import annotations

import asyncio
import threading

import pytest

from controller.accounts.errors import PasswordsBusy
from controller.accounts.passwords import Passwords
from controller.config import Passwords as PasswordSettings


async def test_a_hash_fits_its_password_only(passwords: Passwords) -> None:
    hashed = await passwords.hash("correct horse battery")
    assert hashed.startswith("$argon2id$")
    assert await passwords.verify(hashed, "correct horse battery")
    assert not await passwords.verify(hashed, "correct horse batter")
    assert not await passwords.verify(None, "nobody's password")
    for hashed in ("!disabled", "$argon2id$cut", "$2b$12$cut", ""):
        assert not await passwords.verify(hashed, "x")


async def test_composed_and_decomposed_characters_are_the_same_password(passwords: Passwords) -> None:
    assert await passwords.verify(await passwords.hash("caf\u00e9 au lait"), "cafe\u0301 au lait")


async def test_a_hash_of_other_parameters_is_outdated(passwords: Passwords) -> None:
    stronger = Passwords(PasswordSettings(memory_kib=128, time_cost=2))
    hashed = await passwords.hash("correct horse battery")
    assert stronger.outdated(hashed)
    assert not passwords.outdated(hashed)
    assert await stronger.verify(hashed, "correct horse battery")
    stronger.close()


async def test_the_default_parameters_are_no_weaker_than_advised(passwords: Passwords) -> None:
    settings = PasswordSettings()
    assert (settings.memory_kib, settings.time_cost, settings.parallelism) >= (19 * 1024, 2, 1)


async def test_more_than_may_wait_are_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    passwords = Passwords(PasswordSettings(memory_kib=64, time_cost=1, workers=1, queue=2))
    hashed = await passwords.hash("correct horse battery")
    gate, check = threading.Event(), passwords._check

    def held(hashed: str, password: bytes) -> bool:
        assert gate.wait(30)
        return check(hashed, password)

    monkeypatch.setattr(passwords, "_check", held)
    waiting = [asyncio.ensure_future(passwords.verify(hashed, "correct horse battery")) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(PasswordsBusy) as caught:
        await passwords.verify(hashed, "correct horse battery")
    assert caught.value.params["retry_after"]
    gate.set()
    assert await asyncio.gather(*waiting) == [True] * 3
    assert await passwords.verify(hashed, "correct horse battery")
    passwords.close()
