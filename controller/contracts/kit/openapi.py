"""The OpenAPI 3.1 document of a contract, made from the models that validate its requests; pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from controller.contracts.kit.contract import JSON, Access, Contract, Route

_REFS = "#/components/schemas/{model}"
_ALWAYS = {
    400: "The request is malformed; each wrong field is named",
    408: "The body took too long to arrive",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "Too many requests; Retry-After says when to come back",
    500: "Internal server error",
    503: "The service cannot do this now; Retry-After says when to try again",
}


def document(contract: Contract) -> dict[str, Any]:
    schemas = _Schemas(contract)
    paths: dict[str, dict[str, Any]] = {}
    for route in contract.routes:
        paths.setdefault(contract.base + route.path, {})[route.method.lower()] = _operation(contract, route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": contract.title, "version": "1", "description": contract.description},
        "servers": [
            {"url": f"/{contract.name}", "description": "always this contract"},
            {"url": "/", "description": "where the contracts share their paths"},
        ],
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "description": "the token of a login"}},
        },
    }


class _Schemas:
    """The schema of each body, by what uses it."""

    def __init__(self, contract: Contract) -> None:
        inputs: list[tuple[str, Any, TypeAdapter[Any]]] = [("error", "serialization", TypeAdapter(contract.error))]
        for route in contract.routes:
            if route.body is not None:
                inputs.append((f"{_key(route)} body", "validation", TypeAdapter(route.body)))
            if route.query is not None:
                inputs.append((f"{_key(route)} query", "validation", TypeAdapter(route.query)))
            for media, answer in answers(route).items():
                if answer is not bytes:
                    inputs.append((f"{_key(route)} {media}", "serialization", TypeAdapter(answer)))
        by_use, definitions = TypeAdapter.json_schemas(inputs, ref_template=_REFS)
        self._by_use = {use: schema for (use, _), schema in by_use.items()}
        self.components: dict[str, Any] = definitions.get("$defs", {})

    def of(self, use: str) -> dict[str, Any]:
        return self._by_use[use]

    def properties(self, use: str) -> tuple[dict[str, Any], list[str]]:
        schema = self.of(use)
        if "$ref" in schema:
            schema = self.components[schema["$ref"].rpartition("/")[2]]
        return schema.get("properties", {}), schema.get("required", [])


def answers(route: Route) -> Mapping[str, Any]:
    """The type of the body for each media type of the answer."""
    return route.answer if isinstance(route.answer, Mapping) else {JSON: route.answer}


def _key(route: Route) -> str:
    return f"{route.method} {route.path}"


def _operation(contract: Contract, route: Route, schemas: _Schemas) -> dict[str, Any]:
    words = re.findall(r"[a-z]+", route.path)
    operation: dict[str, Any] = {
        "operationId": "_".join([route.method.lower(), *words]),
        "summary": route.summary,
        "tags": [words[0]],
        "security": [] if route.access is Access.PUBLIC else [{"token": []}],
        "parameters": _parameters(route, schemas),
        "responses": _responses(contract, route, schemas),
    }
    if route.description:
        operation["description"] = route.description
    if route.body is not None:
        content: dict[str, Any] = {"schema": schemas.of(f"{_key(route)} body")}
        if route.request_example is not None:
            content["example"] = route.request_example
        operation["requestBody"] = {"required": True, "content": {JSON: content}}
    return operation


def _parameters(route: Route, schemas: _Schemas) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", route.path)
    ]
    if route.query is not None:
        properties, required = schemas.properties(f"{_key(route)} query")
        for name, schema in properties.items():
            parameter = {"name": name, "in": "query", "required": name in required, "schema": schema}
            if "description" in schema:
                parameter["description"] = schema["description"]
            parameters.append(parameter)
    return parameters


def _responses(contract: Contract, route: Route, schemas: _Schemas) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for media, answer in answers(route).items():
        content[media] = {} if answer is bytes else {"schema": schemas.of(f"{_key(route)} {media}")}
    if route.answer_example is not None:
        content[JSON]["example"] = route.answer_example
    refusals = dict(_ALWAYS)
    if route.access is not Access.PUBLIC:
        refusals[401] = "The token is missing, wrong or has ended"
    if route.access is Access.ADMIN:
        refusals[403] = "This needs the admin role"
    if "{" in route.path:
        refusals[404] = "There is no such record, or it is somebody else's"
    refusals |= route.refusals
    error = {JSON: {"schema": schemas.of("error")}}
    return {str(route.status): {"description": "Success", "content": content}} | {
        str(contract.statuses.get(status, status)): {"description": text, "content": error}
        for status, text in sorted(refusals.items())
    }
