"""Slows the guessing of passwords down without ever locking an account's owner out."""

from __future__ import annotations

from controller.accounts.errors import TooManyAttempts
from controller.ratelimit import Limit, WindowStorage
from shared.addresses import rate_limit_key

WINDOW = 900  # seconds
PER_ADDRESS = 10  # attempts on one account from one address
PER_ACCOUNT = 100  # attempts on one account from everywhere; beyond them it is under attack
PER_ADDRESS_UNDER_ATTACK = 2


class Throttle:
    """Attempts are counted per account *and* address, so a stranger's failures never stop the owner.

    While an account is under attack from many addresses, each address still has a few attempts: enough for the owner,
    wherever he is, and few enough for a guesser with many addresses.
    """

    def __init__(self) -> None:
        storage = WindowStorage()
        self._pair = Limit("guess", PER_ADDRESS, WINDOW, storage)
        self._pair_under_attack = Limit("guess-under-attack", PER_ADDRESS_UNDER_ATTACK, WINDOW, storage)
        self._account = Limit("guess-account", PER_ACCOUNT, WINDOW, storage)

    def attempt(self, account: str, address: str) -> None:
        """Count an attempt before it is judged, so that parallel ones are counted too; raise TooManyAttempts."""
        pair = _pair(account, address)
        quiet = self._account.hit(account)
        limit = self._pair if quiet else self._pair_under_attack
        if not limit.hit(pair):
            budget = limit.budget(pair, False)
            raise TooManyAttempts(retry_after=budget.retry_after)

    def succeeded(self, account: str, address: str) -> None:
        pair = _pair(account, address)
        self._pair.clear(pair)
        self._pair_under_attack.clear(pair)


def _pair(account: str, address: str) -> str:
    return f"{account} {rate_limit_key(address) if address else 'local'}"
