"""The OpenAPI document of the panel says what it does."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from openapi_spec_validator import validate
from schemathesis.specs.openapi.checks import positive_data_acceptance

from controller.accounts.service import Client
from tests.contracts.world import PASSWORD, Api, World

from .conftest import Panel


async def test_the_document_is_valid_and_has_every_route(api: Api, panel: Panel) -> None:
    document = (await api.at("").get("/irssh/openapi.json")).body
    validate(document)
    operations = {(method.upper(), path) for path, found in document["paths"].items() for method in found}
    assert operations == {(route.method, f"/api{route.path}") for route in panel.contract.routes}
    assert {
        ("POST", "/api/auth/login"),
        ("POST", "/api/auth/refresh"),
        ("GET", "/api/users"),
        ("POST", "/api/users"),
        ("GET", "/api/protocols"),
        ("PUT", "/api/protocols/{name}"),
        ("GET", "/api/monitoring/system"),
        ("GET", "/api/monitoring/users"),
    } <= operations


async def test_examples_of_requests_are_what_is_accepted(panel: Panel) -> None:
    for route in panel.contract.routes:
        if route.body is not None:
            route.body.model_validate(route.request_example)


@pytest.mark.timeout(110)
async def test_no_generated_request_gets_an_answer_that_is_not_described(api: Api, world: World, panel: Panel) -> None:
    document = (await api.at("").get("/irssh/openapi.json")).body
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=api.url + "/irssh")
    loop = asyncio.get_running_loop()
    calls = 0

    async def token() -> str:
        return (await world.accounts.login("root-a", PASSWORD, "irssh", Client()))[0]

    held = await token()

    def drive(operation: Any) -> None:
        @given(case=operation.as_strategy())
        @settings(
            max_examples=10,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def run(case: Any) -> None:
            nonlocal calls
            calls += 1
            spent = "refresh" in case.path  # it ends the token that it is called with
            bearer = asyncio.run_coroutine_threadsafe(token(), loop).result(20) if spent else held
            response = case.call(headers={"Authorization": f"Bearer {bearer}"})
            assert response.status_code < 500, (case, response.text)
            case.validate_response(response, excluded_checks=[positive_data_acceptance])

        run()

    for operation in [found.ok() for found in schema.get_all_operations()]:  # type: ignore[union-attr]
        await asyncio.to_thread(drive, operation)
    assert calls >= 60
