"""How many requests a client may make of each contract."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from controller.config import RateLimit
from controller.contracts.kit.failures import RateLimited
from controller.ratelimit import Budget, Limit, WindowStorage
from shared.addresses import rate_limit_key

_LOCAL = "local"
_key = lru_cache(4096)(rate_limit_key)


class RateLimits:
    def __init__(self, settings: Mapping[str, RateLimit], contracts: Mapping[str, bool]) -> None:
        """`contracts`: each mounted contract, and whether it tells what is left."""
        storage = WindowStorage()
        self._general: dict[str, Limit] = {}
        self._auth: dict[str, Limit] = {}
        self._tells = {name for name, tells in contracts.items() if tells}
        for name in contracts:
            limit = settings.get(name, RateLimit())
            if limit.requests:
                self._general[name] = Limit(f"http-{name}", limit.requests, limit.window_seconds, storage)
            if limit.auth_requests:
                self._auth[name] = Limit(f"auth-{name}", limit.auth_requests, limit.auth_window_seconds, storage)

    def count(self, contract: str, address: str, *, auth: bool) -> Budget | None:
        """Count a request; raise RateLimited. What is left is answered for contracts that tell it."""
        general = self._general.get(contract)
        strict = self._auth.get(contract) if auth else None
        if general is None and strict is None:
            return None
        key = _key(address) if address else _LOCAL
        for limit in (strict, general):
            if limit is not None and not limit.hit(key):
                raise RateLimited(retry_after=limit.budget(key, False).retry_after)
        return general.budget(key, True) if general is not None and contract in self._tells else None
