"""Settings: a mapping (from YAML) and the environment, read into frozen dataclasses, every problem found at once.

A settings class is a frozen dataclass whose fields are str, int, float, bool, Path, an enum, a tuple of these, a
dict with str keys, another settings class, or one of these or None. A field without a default is required. A field
may carry `metadata=check(function)`: the function returns the value to use, or raises ValueError with the reason.

The environment overrides the file: PREFIX_DATABASE_URL for `database_url`, PREFIX_LOG__LEVEL for `log.level`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class SettingsError(Exception):
    """The settings cannot be used; `problems` has a line for each reason."""

    def __init__(self, source: str, problems: list[str]) -> None:
        super().__init__(f"{source}: " + "; ".join(problems))
        self.source = source
        self.problems = problems


def check(function: Callable[[Any], Any]) -> dict[str, Any]:
    """Field metadata: a rule that the value has to meet beyond its type."""
    return {"check": function}


def load(
    cls: type[T], mapping: Mapping[str, Any], *, environ: Mapping[str, str], prefix: str, source: str = "settings"
) -> T:
    """Build `cls` from the file's mapping and the environment; raise SettingsError with all problems."""
    problems: list[str] = []
    value = _build(cls, mapping, environ, prefix, "", problems)
    if problems:
        raise SettingsError(source, problems)
    assert isinstance(value, cls)
    return value


def _build(
    cls: type[Any], mapping: object, environ: Mapping[str, str], prefix: str, path: str, problems: list[str]
) -> Any:
    if not isinstance(mapping, Mapping):
        problems.append(f"{path or 'the file'}: expected keys and values")
        return None
    hints = get_type_hints(cls)
    known = {field.name: field for field in fields(cls)}
    problems += [f"{_join(path, str(key))}: unknown setting" for key in mapping if key not in known]
    values: dict[str, Any] = {}
    for name, field in known.items():
        where, variable = _join(path, name), f"{prefix}_{name.upper()}"
        nested = _settings_class(hints[name])
        if nested is not None:
            if name in mapping or _has_environment(environ, variable) or _required(field):
                values[name] = _build(nested, mapping.get(name, {}), environ, f"{variable}_", where, problems)
        elif variable in environ:
            _put(values, field, hints[name], environ[variable], f"{where} (from {variable})", problems, text=True)
        elif name in mapping:
            _put(values, field, hints[name], mapping[name], where, problems, text=False)
        elif _required(field):
            problems.append(f"{where}: missing")
    if problems:
        return None
    return cls(**values)


def _put(
    values: dict[str, Any],
    field: Field[Any],
    hint: Any,
    raw: object,
    where: str,
    problems: list[str],
    *,
    text: bool,
) -> None:
    try:
        value = _convert(hint, raw, text)
        rule = field.metadata.get("check")
        values[field.name] = rule(value) if rule is not None and value is not None else value
    except ValueError as error:
        problems.append(f"{where}: {error}")


def _convert(hint: Any, raw: object, text: bool) -> Any:
    """Turn a YAML value (or, with `text`, an environment string) into the hinted type, or raise ValueError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if raw is None or (text and raw == ""):
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _convert(inner, raw, text)
    if origin is tuple:
        items = [part.strip() for part in raw.split(",") if part.strip()] if text and isinstance(raw, str) else raw
        if not isinstance(items, list):
            raise ValueError("expected a list")
        return tuple(_convert(arguments[0], item, text) for item in items)
    if origin is dict:
        if not isinstance(raw, Mapping):
            raise ValueError("expected keys and values")
        return {str(key): _convert_entry(arguments[1], item, text) for key, item in raw.items()}
    return _scalar(hint, raw, text)


def _convert_entry(hint: Any, item: object, text: bool) -> Any:
    nested = _settings_class(hint)
    if nested is None:
        return _convert(hint, item, text)
    problems: list[str] = []
    value = _build(nested, item, {}, "", "", problems)
    if problems:
        raise ValueError("; ".join(problems))
    return value


def _scalar(hint: Any, raw: object, text: bool) -> Any:
    if hint is bool:
        if text and isinstance(raw, str) and raw.lower() in ("true", "false"):
            return raw.lower() == "true"
        if not isinstance(raw, bool):
            raise ValueError("expected true or false")
        return raw
    if hint in (int, float):
        if isinstance(raw, bool) or not isinstance(raw, int | float | str) or (isinstance(raw, str) and not text):
            raise ValueError("expected a number")
        try:
            return hint(raw)
        except ValueError as error:
            raise ValueError("expected a number") from error
    if not isinstance(raw, str):
        raise ValueError("expected text")
    if isinstance(hint, type) and issubclass(hint, Enum):
        try:
            return hint(raw)
        except ValueError as error:
            raise ValueError("expected one of " + ", ".join(str(member.value) for member in hint)) from error
    return Path(raw) if hint is Path else raw


def _settings_class(hint: Any) -> type[Any] | None:
    candidates = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((item for item in candidates if isinstance(item, type) and is_dataclass(item)), None)


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _has_environment(environ: Mapping[str, str], variable: str) -> bool:
    return any(name.startswith(f"{variable}__") for name in environ)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
