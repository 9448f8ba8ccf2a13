"""Request models: strict JSON in, every wrong field named."""

from __future__ import annotations

import json
from typing import Annotated, Any, NoReturn, TypeVar
from urllib.parse import parse_qsl

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, ValidationError, WithJsonSchema

from controller.errors import InvalidInput

M = TypeVar("M", bound="Model")
_MAX_QUERY_FIELDS = 100


class Model(BaseModel):
    """Types are exact (no "1" for 1), unknown fields are ignored, nothing is changed after validation."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


def _printable(text: str) -> str:
    if any(ord(character) < 0x20 or ord(character) in (0x7F, 0x2028, 0x2029) for character in text):
        raise ValueError("has control characters")
    return text


Text = Annotated[
    str,
    StringConstraints(min_length=1, max_length=255),
    AfterValidator(_printable),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": 255, "pattern": r"^[^\x00-\x1f\x7f\u2028\u2029]+$"}),
]
"""One line of text."""

Id = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._~-]+$", max_length=64)]
"""An opaque identifier."""

Secret = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
"""A password as it is typed; accounts decide which may be set."""


def parse_body(model: type[M], raw: bytes) -> M:
    """Raise InvalidInput that names each bad field."""
    if not raw:
        raise InvalidInput({"body": "is missing"})
    try:
        json.loads(raw, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise InvalidInput({"body": "is nested too deeply"}) from None
    except _Repeated as error:
        raise InvalidInput({error.key: "is given twice"}) from None
    except ValueError:
        raise InvalidInput({"body": "is not JSON"}) from None
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise InvalidInput(_problems(error)) from None


def parse_query(model: type[M], text: str) -> M:
    """Raise InvalidInput that names each bad parameter."""
    try:
        pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=_MAX_QUERY_FIELDS)
    except ValueError:
        raise InvalidInput({"query": "cannot be read"}) from None
    values: dict[str, str] = {}
    for key, value in pairs:
        if key in values and key in model.model_fields:
            raise InvalidInput({key: "is given twice"})
        values[key] = value
    try:
        return model.model_validate(values, strict=False)
    except ValidationError as error:
        raise InvalidInput(_problems(error)) from None


def fields_of(raw: bytes) -> frozenset[str]:
    """The names at the top of a body; none where it is not an object."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return frozenset()
    return frozenset(value) if isinstance(value, dict) else frozenset()


class _Repeated(ValueError):
    def __init__(self, key: str) -> None:
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Repeated(key.encode("ascii", "replace").decode()[:64])
            seen.add(key)
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _problems(error: ValidationError) -> dict[str, str]:
    problems: dict[str, str] = {}
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        path = ".".join(str(part) for part in item["loc"]) or "body"
        message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
        problems.setdefault(path[:128], message[:1].lower() + message[1:])
    return problems
