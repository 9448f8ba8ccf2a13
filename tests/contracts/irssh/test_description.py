"""The OpenAPI document of the panel says what it does."""

from __future__ import annotations

import pytest
from openapi_spec_validator import validate

from controller.accounts.service import Client
from tests.contracts.fuzz import drive
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

    async def token() -> str:
        return (await world.accounts.login("root-a", PASSWORD, "irssh", Client()))[0]

    url = api.url + "/irssh"
    assert await drive(document, url, held=await token(), fresh=token, spends="refresh", examples=10) >= 60
