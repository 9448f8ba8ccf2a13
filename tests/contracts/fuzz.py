"""Schemathesis makes requests, right and wrong ones, from a document; each answer has to be described there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

# Many a request of the right form is refused for what it says: a key of a node, a common password, another's address.
_NOT_OURS: list[Any] = [positive_data_acceptance]


async def drive(
    document: Any, url: str, *, held: str, fresh: Callable[[], Coroutine[Any, Any, str]], spends: str, examples: int
) -> int:
    """Call every operation; return the number of calls.

    They are made with the token `held`, but for those with `spends` in their path, which end the token that they are
    called with: each of them gets a fresh one.
    """
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=url)
    loop = asyncio.get_running_loop()
    calls = 0

    def call(operation: Any) -> None:
        @given(case=operation.as_strategy())
        @settings(
            max_examples=examples,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def run(case: Any) -> None:
            nonlocal calls
            calls += 1
            token = asyncio.run_coroutine_threadsafe(fresh(), loop).result(20) if spends in case.path else held
            response = case.call(headers={"Authorization": f"Bearer {token}"})
            assert response.status_code < 500, (case, response.text)
            case.validate_response(response, excluded_checks=_NOT_OURS)

        run()

    for operation in [found.ok() for found in schema.get_all_operations()]:  # type: ignore[union-attr]
        await asyncio.to_thread(call, operation)
    return calls
