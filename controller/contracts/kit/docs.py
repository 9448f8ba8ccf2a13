"""Pages that do not change while the process runs: each contract's OpenAPI document, and the reader for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import orjson

from controller.contracts.kit.contract import JSON, Contract
from controller.contracts.kit.openapi import document

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


@dataclass(frozen=True, slots=True)
class Page:
    body: bytes
    headers: Mapping[str, str]


def pages(contracts: Sequence[Contract]) -> dict[str, Page]:
    """By path. `/docs` shows the first contract."""
    static = files(__package__) / "static"
    reader = _page((static / "docs.html").read_bytes(), "text/html; charset=utf-8")
    names = [{"name": contract.name, "title": contract.title} for contract in contracts]
    found = {
        "/docs": reader,
        "/docs/assets/docs.css": _page((static / "docs.css").read_bytes(), "text/css; charset=utf-8"),
        "/docs/assets/docs.js": _page((static / "docs.js").read_bytes(), "text/javascript; charset=utf-8"),
        "/docs/assets/contracts.json": _page(orjson.dumps(names), JSON),
    }
    for contract in contracts:
        found[f"/docs/{contract.name}"] = reader
        found[f"/{contract.name}/openapi.json"] = _page(orjson.dumps(document(contract)), JSON)
    return found


def _page(body: bytes, media: str) -> Page:
    return Page(
        body,
        {
            "Content-Type": media,
            "Content-Security-Policy": _POLICY,
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        },
    )
